"""Chart to code: the matplotlib code of a chart from its picture, run in a cell and judged by what it draws.

After ChartMimic (Yang et al. 2024), which compares what stands in the figures, not how the code is written: its
``text``, ``type`` and ``color`` as F1 of what both figures hold, here with the plotted ``values`` and with ``visual``
(:mod:`mmagent.tasks.visual`) for the whole, in place of its judge by a model. The value is the mean of the five.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageColor
from scipy.optimize import linear_sum_assignment

from mmagent.sandbox import CellLimits, Sandbox
from mmagent.tasks.base import malformed, score_of
from mmagent.tasks.block_match import to_lab
from mmagent.tasks.design2code import likeness
from mmagent.tasks.remembered import Remembered
from mmagent.trajectories import Item, Observation, Score, Trajectory
from mmagent.worlds.drawing import COLOURS, generator
from mmagent.worlds.plots import Plot, draw_plot
from mmagent.worlds.seeds import SPLITS, seed_for

PRELOAD = ("matplotlib.pyplot", "matplotlib.backends.backend_agg", "numpy", "json", "random")
LIMITS = CellLimits(seconds=20.0, cpu_seconds=15.0, memory_mb=1024, files_mb=32)
LEVELS = 4
MAX_CHARACTERS = 100_000
STRIDE, REMEMBERED = 1_000_000, 32
REQUEST = (
    "Write Python code with matplotlib that draws this chart as exactly as you can: its kind, its numbers, its words, "
    "its colours and its layout. Answer with the code alone."
)
FAR_COLOUR = 30.0
"""A CIEDE2000 difference at which two colours have nothing in common."""
NEAR_VALUE = 0.02
"""Numbers agree that differ by no more than this share of the range of the chart's own."""
MOST_MARKS = 300
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class ChartBroken(ValueError):
    """A chart whose own code does not run here; the message names it."""


@dataclass(frozen=True)
class Mark:
    """A bar, line, slice, cloud or area: its ``kind``, ``colour`` (0 to 255) and ``values``."""

    kind: str
    colour: tuple[float, float, float]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Drawn:
    """A figure: its ``image (height, width, 3)`` uint8, the ``texts`` in it and its ``marks``."""

    image: np.ndarray
    texts: tuple[str, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Chart:
    """A chart by its ``code``, and its published ``picture`` where there is one."""

    code: str
    picture: np.ndarray | None = None


class Charts(Protocol):
    """Where charts come from."""

    def items(self, task: str, split: str, seed: int) -> Iterator[Item]: ...

    def chart(self, item: Item) -> Chart: ...


class GeneratedCharts:
    """Plots of :mod:`mmagent.worlds.plots` as code: endless, of all levels in turn or of one ``level``; splits never
    share a chart."""

    def __init__(self, level: int | None = None):
        if level is not None and not 0 <= level < LEVELS:
            raise ValueError(f"charts have levels 0 to {LEVELS - 1}, not {level}")
        self.level = level

    def items(self, task: str, split: str, seed: int) -> Iterator[Item]:
        for n in count():
            chart = seed_for(split, seed * STRIDE + n)
            yield Item(task, f"{split}-{chart}", chart)

    def chart(self, item: Item) -> Chart:
        index, split = divmod(item.seed, len(SPLITS))
        random = generator("chart-to-code", index, tuple(SPLITS)[split])
        level = index % LEVELS if self.level is None else self.level
        return Chart(code_of(draw_plot(random, level), random))


class PublishedCharts:
    """A folder with ``NAME.py`` and ``NAME.png``, as ChartMimic has them; all are test items. Raises ``ValueError``
    where there are none."""

    def __init__(self, folder: str | Path):
        self._files = {
            path.stem: path for path in sorted(Path(folder).glob("*.py")) if path.with_suffix(".png").exists()
        }
        if not self._files:
            raise ValueError(f"{folder}: no NAME.py with a NAME.png there")

    def __len__(self) -> int:
        return len(self._files)

    def items(self, task: str, split: str, seed: int) -> Iterator[Item]:
        for number, name in enumerate(self._files if split == "test" else ()):
            yield Item(task, name, number)

    def chart(self, item: Item) -> Chart:
        path = self._files[item.key]
        with Image.open(path.with_suffix(".png")) as image:
            return Chart(path.read_text(encoding="utf-8"), np.asarray(image.convert("RGB")))


def code_of(plot: Plot, random: np.random.Generator) -> str:
    """Matplotlib code that draws ``plot``, in random looks."""

    def colour(name: str) -> str:
        return "#{:02x}{:02x}{:02x}".format(*COLOURS[name])

    width, height = (float(v) for v in random.choice([(5.0, 4.0), (6.0, 4.0), (4.8, 3.6)]))
    lines = ["import matplotlib.pyplot as plt", "", f"names = {list(plot.names)!r}"]
    lines += [f"fig, ax = plt.subplots(figsize=({width}, {height}))"]
    if plot.kind == "pie":
        colours = [colour(name) for name in plot.colours]
        label = ', autopct="%d%%"' if plot.printed else ""
        lines += [f"values = {list(plot.values[0])}", f"ax.pie(values, labels=names, colors={colours!r}{label})"]
    else:
        rows = list(zip(plot.series, plot.colours, plot.values, strict=True))
        share = 0.8 / len(rows)
        for n, (series, paint, values) in enumerate(rows):
            lines.append(f"values = {list(values)}")
            style = f"color={colour(paint)!r}, label={series!r}"
            place = f"[n + {round((n - (len(rows) - 1) / 2) * share, 3)} for n in range({len(values)})]"
            match plot.kind:
                case "line":
                    lines.append(f'ax.plot(range({len(values)}), values, marker="o", {style})')
                case "bar":
                    lines.append(f"ax.bar({place}, values, {share:.3f}, {style})")
                case _:
                    lines.append(f"ax.barh({place}, values, {share:.3f}, {style})")
        axis = ("y", "x") if plot.kind == "barh" else ("x", "y")
        lines += [f"ax.set_{axis[0]}ticks(range(len(names)), names)", f"ax.set_{axis[1]}lim(0, {plot.top})"]
        lines += ["ax.legend()"] if len(rows) > 1 else []
        lines += [f"ax.grid(axis={axis[1]!r})"] if random.random() < 0.5 else []
    return "\n".join([*lines, f"ax.set_title({plot.title!r})", "plt.show()", ""])


# ---------------------------------------------------------------------------------------------- running and comparing


@cache
def driver() -> str:
    """The program that runs an answer."""
    return Path(__file__).with_name("chart_driver.py").read_text(encoding="utf-8")


async def draw(sandbox: Sandbox, code: str) -> Drawn | str:
    """What ``code`` draws, or why it draws nothing. Raises :class:`~mmagent.sandbox.SandboxError`."""
    files = {"answer.py": code.encode("utf-8", "backslashreplace")}
    outcome = await sandbox.run(driver(), files, ("figure.png", "facts.json"), LIMITS)
    if outcome.status != "ok":
        return outcome.complaint
    return await asyncio.to_thread(_read, outcome.files)


def _read(files: dict[str, bytes]) -> Drawn | str:
    """What the program left; all of it may have been written by the answer."""
    try:
        with Image.open(io.BytesIO(files["figure.png"]), formats=("PNG",)) as image:
            if image.width * image.height > 4_000_000:
                return "a picture that is too large"
            pixels = np.asarray(image.convert("RGB"))
        told = json.loads(files["facts.json"])
        texts = tuple(str(text)[:200] for text in told["texts"][:1000])
        marks = tuple(
            Mark(str(kind)[:20], ImageColor.getrgb(str(colour)[:20])[:3], tuple(_finite(values)))
            for kind, colour, values in told["marks"][:1000]
        )
    except (
        KeyError,
        ValueError,
        TypeError,
        OSError,
        SyntaxError,
        RecursionError,
        Image.DecompressionBombError,
    ) as error:
        return f"what it left is no figure: {type(error).__name__}"
    return Drawn(pixels, texts, marks)


def _finite(values: Sequence[object]) -> Iterator[float]:
    for value in values[:1000]:
        if isinstance(value, int | float) and math.isfinite(value):
            yield float(value)


def compare_charts(candidate: Drawn, reference: Drawn) -> dict[str, float]:
    """``text``, ``type``, ``color``, ``values`` and ``visual``, each in [0, 1] and 1 for equal figures."""
    return {
        "text": f1(map(str.casefold, candidate.texts), map(str.casefold, reference.texts)),
        "type": f1((mark.kind for mark in candidate.marks), (mark.kind for mark in reference.marks)),
        "color": color_f1(candidate.marks, reference.marks),
        "values": value_f1(candidate.marks, reference.marks),
        "visual": likeness(reference.image, candidate.image),
    }


def f1(ours: Iterable[Hashable], theirs: Iterable[Hashable]) -> float:
    """Of two bags of things."""
    a, b = Counter(ours), Counter(theirs)
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def color_f1(ours: Sequence[Mark], theirs: Sequence[Mark]) -> float:
    """Marks of one kind are paired so that their colours agree best: 1 for the same, 0 from :data:`FAR_COLOUR` on."""
    from skimage.color import deltaE_ciede2000

    if not ours and not theirs:
        return 1.0
    found = 0.0
    for kind in {mark.kind for mark in ours} & {mark.kind for mark in theirs}:
        one, other = (
            np.array([to_lab(mark.colour) for mark in marks if mark.kind == kind][:MOST_MARKS])
            for marks in (ours, theirs)
        )
        alike = np.maximum(0.0, 1.0 - deltaE_ciede2000(one[:, None], other[None]) / FAR_COLOUR)
        rows, columns = linear_sum_assignment(-alike)
        found += float(alike[rows, columns].sum())
    return 2 * found / (len(ours) + len(theirs))


def value_f1(ours: Sequence[Mark], theirs: Sequence[Mark]) -> float:
    """Numbers of one kind of mark agree in order of their size, where they are within :data:`NEAR_VALUE`."""
    found = total = 0
    for kind in {mark.kind for mark in (*ours, *theirs)}:
        one, other = (sorted(v for mark in marks if mark.kind == kind for v in mark.values) for marks in (ours, theirs))
        total += len(one) + len(other)
        near = NEAR_VALUE * (max(other[-1], 0.0) - min(other[0], 0.0)) if other else 0.0
        i = j = 0
        while i < len(one) and j < len(other):
            if abs(one[i] - other[j]) <= near:
                found, i, j = found + 2, i + 1, j + 1
            elif one[i] < other[j]:
                i += 1
            else:
                j += 1
    return found / total if total else 1.0


def extract_code(answer: str) -> str | None:
    """The code in an answer: what a fence holds, else all of it; None where there is none."""
    fenced = _FENCE.search(answer)
    code = (fenced.group(1) if fenced else answer).strip()
    return code or None


# ---------------------------------------------------------------------------------------------- the task


class ChartToCodeTask:
    """Charts of ``charts``, whose code runs in ``sandbox`` (made with :data:`PRELOAD`)."""

    category = "chart-to-code"

    def __init__(self, sandbox: Sandbox, charts: GeneratedCharts | PublishedCharts, name: str = "chart-to-code"):
        self.name, self.sandbox, self.charts = name, sandbox, charts
        self._known = Remembered[str, Drawn](REMEMBERED)

    def items(self, split: str, seed: int) -> Iterator[Item]:
        return self.charts.items(self.name, split, seed)

    def environment(self, item: Item) -> ChartToCodeEnvironment:
        return ChartToCodeEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        yield self.charts.chart(item).code

    async def reference(self, item: Item) -> Drawn:
        """The chart as its own code draws it here. Raises :class:`ChartBroken`."""
        return await self._known.get(item.key, lambda: self._reference(item))

    async def _reference(self, item: Item) -> Drawn:
        drawn = await draw(self.sandbox, self.charts.chart(item).code)
        if isinstance(drawn, str):
            raise ChartBroken(f"{self.name}/{item.key}: its own code draws nothing here: {drawn}")
        return drawn

    async def shown(self, item: Item) -> np.ndarray:
        """The published picture where there is one, else the chart as it is drawn here."""
        picture = self.charts.chart(item).picture
        return (await self.reference(item)).image if picture is None else picture

    async def compare(self, item: Item, code: str) -> tuple[Score, Drawn | None]:
        """The score of an answer, and what it draws."""
        reference = await self.reference(item)
        drawn = await draw(self.sandbox, code)
        if isinstance(drawn, str):
            return Score(0.0, {"no_figure": 1.0}), None
        parts = await asyncio.to_thread(compare_charts, drawn, reference)
        return Score(sum(parts.values()) / len(parts), parts), drawn


class ChartToCodeEnvironment:
    """One chart, one answer."""

    def __init__(self, task: ChartToCodeTask, item: Item):
        self.task, self.item = task, item

    async def reset(self) -> Observation:
        return Observation(REQUEST, (await self.task.shown(self.item),))

    async def step(self, action: str) -> Observation:
        code = extract_code(action)
        if code is None:
            return malformed("the answer holds no code")
        if len(code) > MAX_CHARACTERS:
            return malformed(f"{len(code)} characters of code, at most {MAX_CHARACTERS} are run")
        score, _ = await self.task.compare(self.item, code)
        return Observation("run", done=True, reward=score.value, parts=score.parts)

    async def close(self) -> None:
        """Nothing is held."""
