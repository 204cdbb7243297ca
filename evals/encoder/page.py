"""Scores of encoders side by side: a table for the terminal, and a page with bars and pictures of what they saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from evals.encoder.battery import Measured, Shown
from evals.statistics import Estimate
from mmagent.html.charts import bar_chart
from mmagent.html.pieces import Section, facts, heading, image, join, page, table, tag

_UNBOUNDED = ("rmse", "r2")  # scores that are no shares
_COLOURS = (
    (68, 68, 68), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (145, 209, 194), (132, 145, 180),
    (220, 190, 60), (126, 97, 72), (176, 58, 140), (60, 84, 136), (150, 200, 60),
)  # fmt: skip
_PIXELS = 116  # of the longer side of a picture on the page

Results = Mapping[str, Mapping[str, Measured]]
"""``{encoder: {set of images: what was measured}}``."""


def score_names(results: Results) -> list[tuple[str, str]]:
    """``(set, score)`` in the order in which they were measured."""
    found = [(data, name) for sets in results.values() for data, one in sets.items() for name in one.scores]
    return sorted(dict.fromkeys(found), key=lambda pair: list(dict.fromkeys(d for d, _ in found)).index(pair[0]))


def score_table(results: Results) -> str:
    """Encoders side by side, a score a line, each with its 95 % interval; aligned, for a terminal."""
    names = score_names(results)
    several = len({data for data, _ in names}) > 1
    head = ["", *results]
    rows = [
        [f"{data} {name}" if several else name, *(_figure(_score(sets, data, name)) for sets in results.values())]
        for data, name in names
    ]
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    )


def _score(sets: Mapping[str, Measured], data: str, name: str) -> Estimate | None:
    return sets[data].scores.get(name) if data in sets else None


def _figure(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def render(results: Results, classes: Mapping[str, Sequence[str]], about: Mapping[str, object]) -> str:
    """A whole HTML page that needs nothing but itself: bars with intervals, figures, and test images with the truth and
    every encoder's answers. ``classes`` are the names of the labels of each set, where they have some."""
    names = score_names(results)
    shares = [pair for pair in names if not pair[1].endswith(_UNBOUNDED)]
    sets = list(dict.fromkeys(data for data, _ in names))
    charts = [
        bar_chart(
            {
                name: {encoder: value for encoder, s in results.items() if (value := _score(s, data, name))}
                for one, name in shares
                if one == data
            },
            data,
        )
        for data in sets
        if any(one == data for one, _ in shares)
    ]
    rows = [
        {
            **({"set": data} if len(sets) > 1 else {}),
            "score": name,
            **{e: _cell(_score(s, data, name), name) for e, s in results.items()},
        }
        for data, name in names
    ]
    sections = [
        Section("Scores", Markup('<div class="charts">{}</div>').format(join(charts)), "Whiskers: 95 % intervals."),
        Section("Figures", table(rows)),
    ]
    for data in sets:
        shown = {encoder: one[data].shown for encoder, one in results.items() if data in one}
        if cards := _cards(shown, classes.get(data, ())):
            intro = "Test images, each with the truth and what every encoder's probes say of it."
            sections.append(Section(f"Pictures: {data}", cards, intro))
    told = [
        heading(f"{encoder}: {data}") + facts(one.facts)
        for encoder, s in results.items()
        for data, one in s.items()
        if one.facts
    ]
    sections.append(Section("How it was measured", facts(about) + join(told)))
    return page("Encoders", sections, subtitle=", ".join(results))


def _cell(value: Estimate | None, name: str) -> object:
    return _figure(value) if value is not None and name.endswith(_UNBOUNDED) else value


def _cards(shown: Mapping[str, Mapping[str, Shown]], classes: Sequence[str]) -> Markup:
    first = next((found for found in shown.values() if found), {})
    cards = [_card(key, {encoder: found.get(key) for encoder, found in shown.items()}, classes) for key in first]
    style = "display:flex;flex-wrap:wrap;gap:18px 26px;align-items:flex-start"
    return Markup('<div style="{}">{}</div>').format(style, join(cards)) if cards else Markup("")


def _card(key: str, answers: Mapping[str, Shown | None], classes: Sequence[str]) -> Markup:
    one = next(answer for answer in answers.values() if answer is not None)
    pictures = [_figure_of(one.image, "image")]
    if one.mask is not None:
        pictures.append(_figure_of(painted(one.mask), "true classes"))
        found = {e: a.predicted_mask for e, a in answers.items() if a is not None}
        pictures += [
            _figure_of(painted(mask), f"{encoder}: classes") for encoder, mask in found.items() if mask is not None
        ]
    if one.depth is not None:
        ends = _ends(one.depth)
        pictures.append(_figure_of(shaded(one.depth, ends), "true distance"))
        found = {e: a.predicted_depth for e, a in answers.items() if a is not None}
        pictures += [
            _figure_of(shaded(depth, ends), f"{encoder}: distance")
            for encoder, depth in found.items()
            if depth is not None
        ]
    said = []
    if one.label is not None:
        said.append(Markup("<div><b>{}</b></div>").format(_name(one.label, classes)))
    for encoder, answer in answers.items():
        for probe, predicted in (answer.predicted if answer is not None else {}).items():
            kind = "" if one.label is None else "good" if predicted == one.label else "bad"
            mark = {"good": "✓ ", "bad": "✗ ", "": ""}[kind]
            told = tag(mark + _name(predicted, classes), kind)
            said.append(Markup("<div>{} {} {}</div>").format(encoder, probe, told))
    row = "display:flex;flex-wrap:wrap;gap:8px;align-items:flex-end"
    return Markup('<div><div style="{}">{}</div><div class="quiet" style="font-size:12px">{}</div>{}</div>').format(
        row, join(pictures), key, Markup('<div style="font-size:13px">{}</div>').format(join(said))
    )


def _figure_of(pixels: np.ndarray, caption: str) -> Markup:
    scale = max(pixels.shape[:2]) / _PIXELS
    size = f"width:{pixels.shape[1] / scale:.0f}px;height:{pixels.shape[0] / scale:.0f}px"
    sized = Markup(str(image(pixels, caption)).replace("<img ", f'<img style="{size}" ', 1))
    return Markup('<figure>{}<figcaption class="quiet">{}</figcaption></figure>').format(sized, caption)


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if label < len(classes) else f"class {label}"


def painted(mask: np.ndarray) -> np.ndarray:
    """``(h, w)`` classes to ``(h, w, 3)`` uint8, a colour a class (they repeat after twelve); white where there is
    none."""
    colours = np.array(_COLOURS, dtype=np.uint8)[np.maximum(mask, 0) % len(_COLOURS)]
    return np.where((mask >= 0)[..., None], colours, np.uint8(255))


def _ends(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)


def shaded(values: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    """``(h, w)`` values to ``(h, w, 3)`` uint8: from yellow at the low end over green to dark blue at the high one;
    white where they are unknown."""
    low, high = ends
    at = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12), 0.0, 1.0)
    stops = np.array([(250, 225, 60), (90, 190, 100), (35, 130, 140), (60, 30, 90)], dtype=np.float64)
    colours = np.stack([np.interp(at, np.linspace(0, 1, 4), stops[:, c]) for c in range(3)], axis=-1)
    return np.where(np.isfinite(values)[..., None], colours, 255).astype(np.uint8)
