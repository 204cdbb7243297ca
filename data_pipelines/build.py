"""Make the shard sets of a lineage from seeds, with no download:

    python -m data_pipelines.build [--preset laptop] [--print-config] [folder=data/laptop] [seed=0] [key=value ...]

``FOLDER/pretrain/SOURCE`` and ``FOLDER/sft/SOURCE`` hold webdataset shards, each set with a ``card.json`` of what is
in it; ``FOLDER/tokenizer.json`` is a vocabulary trained on their texts. ``FOLDER/validation/SOURCE`` holds all their
sources anew, from seeds that neither training nor evaluation uses. Same seed, same bytes. A build can be killed at any
moment and goes on where it was when started again; a finished one is left as it is.

Screens need a Chromium, and pages in some languages a font. Where there is none, ``browser=auto`` makes what needs none
and says what is missing; ``browser=required`` stops instead.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines import gui_pages
from data_pipelines.documents import DocumentBuilder
from data_pipelines.making import BuildError, Maker, build_source, is_finished, read_card, write_card, write_whole
from data_pipelines.mixture import digest, permute
from data_pipelines.pictures import Captions, Interleaved
from data_pipelines.record_texts import texts_of
from data_pipelines.screens import ExpertEpisodes, ScreenQuestions
from data_pipelines.shards import ShardError, ShardSet
from data_pipelines.texts import Texts
from data_pipelines.web_pages import PageQuestions, PageSources, Tiles
from data_pipelines.worlds import STRIDE, CodePairs, WorldQuestions
from mmagent.browser import BrowserPool, find_chromium
from mmagent.chat import ChatConfig
from mmagent.config import ConfigError, parse_cli
from mmagent.geometry import GeometryConfig
from mmagent.records import from_sample
from mmagent.vocab import Vocab
from mmagent.worlds.languages import NAMES as LANGUAGES
from mmagent.worlds.miniwob import TASKS, html_folder
from mmagent.worlds.pages import fonts
from mmagent.worlds.questions import WEIGHTS

_VOCAB_PLAN = "tokenizer.plan.json"
_BLOCK = 20  # records made together, of one task where there are tasks
_SMALL_BLOCK = 5  # the same of records that take long


@dataclass
class BuildConfig:
    """``pretrain``, ``sft`` and ``validation`` give the number of samples of every source; 0 leaves one out. ``tasks``
    of MiniWoB++ are shown, all that have an expert when empty; experts act in the ``demonstrated`` ones, in all of
    ``tasks`` when that is empty. ``pages`` are open at a time in ``processes`` browsers. ``vocab_texts`` samples of
    every training source train the vocabulary. A screen is asked at most ``questions``, ``ask`` weighs their kinds.
    Pages and apps of the sources in :data:`data_pipelines.gui_pages.NAMES` speak ``languages``; with ``large_screens``
    pages are as large as those of phones, tablets and desks, too."""

    folder: str = "data/laptop"
    seed: int = 0
    pretrain: dict[str, int] = field(default_factory=dict)
    sft: dict[str, int] = field(default_factory=dict)
    validation: dict[str, int] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    demonstrated: list[str] = field(default_factory=list)
    browser: str = "auto"
    processes: int = 1
    pages: int = 8
    shard_samples: int = 1000
    vocab_size: int = 2048
    vocab_texts: int = 2000
    questions: int = 8
    ask: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))
    large_screens: bool = False

    def __post_init__(self) -> None:
        if self.browser not in ("auto", "required", "none"):
            raise ValueError(f"browser: {self.browser!r} is none of auto, required, none")
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"tasks: there is no expert for {unknown[0]!r}")
        if unknown := sorted(set(self.demonstrated) - set(self.tasks or TASKS)):
            raise ValueError(f"demonstrated: {unknown[0]!r} is not among the tasks")
        if not self.languages or (unknown := sorted(set(self.languages) - set(LANGUAGES))):
            raise ValueError(f"languages: {self.languages} is not some of {', '.join(LANGUAGES)}")
        if not any(weight > 0 for weight in self.ask.values()):
            raise ValueError(f"ask: no kind of question has a weight above 0; there are {', '.join(WEIGHTS)}")


def laptop() -> BuildConfig:
    """What a laptop's lineage trains on: three minutes on two idle cores."""
    return BuildConfig(
        pretrain={
            "screens": 3000,
            "tiles": 3000,
            "pages": 2500,
            "html": 500,
            "captions": 1200,
            "interleaved": 400,
            "text": 1500,
            "worlds": 480,
            "code-pairs": 100,
            "lessons": 600,
            "changes": 100,
            "page-code": 150,
        },
        sft={"episodes": 3000, "clicks": 500, "html": 200, "solutions": 120}
        | {"traces": 200, "steps": 200, "critic": 250, "polish": 150},
        validation={
            "screens": 192,
            "tiles": 96,
            "pages": 120,
            "html": 40,
            "captions": 60,
            "interleaved": 20,
            "text": 100,
            "worlds": 60,
            "code-pairs": 16,
            "episodes": 128,
            "clicks": 40,
            "solutions": 60,
            **dict.fromkeys(gui_pages.NAMES, 24),
        },
    )


def full() -> BuildConfig:
    """The rich mixture, half a million screens of it: hours on many cores. Set ``processes`` to half of those."""
    config = laptop()
    config.folder, config.large_screens, config.vocab_size = "data/full", True, 32000
    config.pretrain = {
        **{name: 20 * count for name, count in config.pretrain.items()},
        **{"lessons": 150_000, "changes": 20_000, "page-code": 30_000, "worlds": 150_000, "code-pairs": 20_000},
    }
    config.sft = {
        **{name: 10 * count for name, count in config.sft.items()},
        **{"traces": 20_000, "steps": 20_000, "critic": 30_000, "polish": 15_000, "solutions": 30_000},
    }
    return config


def debug() -> BuildConfig:
    """Seconds."""
    return BuildConfig(
        folder="data/debug",
        pretrain={"screens": 80, "tiles": 48, "pages": 60, "html": 20, "captions": 40, "interleaved": 20, "text": 60}
        | {"lessons": 10, "changes": 5, "page-code": 5},
        sft={"episodes": 80, "clicks": 20, "html": 20} | dict.fromkeys(("traces", "steps", "critic", "polish"), 5),
        validation={"screens": 16, "tiles": 16, "pages": 12, "html": 8, "captions": 12, "interleaved": 8, "text": 20}
        | {"episodes": 16, "clicks": 8}
        | dict.fromkeys(gui_pages.NAMES, 2),
        tasks=["click-test", "click-button", "focus-text", "enter-text"],
        vocab_size=600,
    )


def makers(config: BuildConfig) -> dict[str, list[Maker]]:
    """Every source there is, by stage. Both training stages see train seeds only, and not the same pages;
    ``validation`` holds all their sources, from the seeds of its own split."""
    return {
        "pretrain": _to_read(config, "train"),
        "sft": [*_to_act(config, "train"), PageSources(digest(config.seed, "sft"))],
        "validation": [*_to_read(config, "validation"), *_to_act(config, "validation")],
    }


def _to_read(config: BuildConfig, split: str) -> list[Maker]:
    seed, tasks = config.seed, config.tasks or list(TASKS)
    asked = {"questions": config.questions, "weights": config.ask, "split": split}
    return [
        ScreenQuestions(tasks, seed, block=_block(config, "screens", split, len(tasks)), **asked),
        Tiles(seed, **asked),
        PageQuestions(seed, block=_block(config, "pages", split), **asked),
        PageSources(seed, block=_block(config, "html", split), split=split),
        Captions(seed, _block(config, "captions", split), split),
        Interleaved(seed, _block(config, "interleaved", split), split),
        Texts(seed, split=split),
        WorldQuestions(seed * STRIDE, block=_block(config, "worlds", split), split=split),
        CodePairs(seed * STRIDE, _block(config, "code-pairs", split), split),
        *_factory(gui_pages.READING, config, split),
    ]


def _factory(kinds: Sequence[type[gui_pages.Factory]], config: BuildConfig, split: str) -> list[Maker]:
    shared = {"languages": config.languages, "large": config.large_screens, "split": split}
    blocks = [min(_SMALL_BLOCK, _block(config, kind.name, split)) for kind in kinds]
    return [kind(config.seed, block=block, **shared) for kind, block in zip(kinds, blocks, strict=True)]


def _to_act(config: BuildConfig, split: str) -> list[Maker]:
    tasks = config.demonstrated or config.tasks or list(TASKS)
    seed, weights = config.seed, {"locate": 2.0, "step": 1.0}
    clicks = _block(config, "clicks", split)
    return [
        ExpertEpisodes(tasks, seed, _block(config, "episodes", split, len(tasks)), split),
        PageQuestions(seed, "clicks", questions=4, weights=weights, block=clicks, split=split),
        WorldQuestions(
            seed * STRIDE + STRIDE // 2,
            name="solutions",
            block=_block(config, "solutions", split),
            split=split,
            reasoning=True,
        ),
        *_factory(gui_pages.ACTING, config, split),
    ]


def _block(config: BuildConfig, source: str, split: str, tasks: int = 1) -> int:
    """Records made together. Of few held-out ones no more than are wanted, and screens of every one of the tasks."""
    each = config.validation.get(source, 0) // tasks
    return _BLOCK if split == "train" else min(max(each, 1), _BLOCK)


def plan(config: BuildConfig) -> Iterator[tuple[str, Maker, int]]:
    """``(stage, maker, samples)`` of everything to build. Raises :class:`~mmagent.config.ConfigError` for a source
    that nobody makes."""
    for stage, known in makers(config).items():
        wanted = {"pretrain": config.pretrain, "sft": config.sft, "validation": config.validation}[stage]
        unknown = set(wanted) - {maker.name for maker in known}
        if unknown:
            names = ", ".join(maker.name for maker in known)
            raise ConfigError(f"{stage}.{sorted(unknown)[0]}: no such source; there are {names}")
        yield from ((stage, maker, wanted[maker.name]) for maker in known if wanted.get(maker.name))


def build(config: BuildConfig) -> dict[str, dict[str, Any]]:
    """Make what is missing and return the cards, ``{"pretrain/text": {...}, ...}``. Without a training source the
    vocabulary stays that of the folder; raises :class:`~data_pipelines.making.BuildError` where it has none."""
    root = Path(config.folder)
    todo = list(plan(_drawable(config)))
    if not todo:
        raise BuildError("nothing to build: pretrain, sft and validation want 0 samples; set one: pretrain.text=1000")
    blind = [f"{stage}/{maker.name}" for stage, maker, _ in todo if maker.screen is not None]
    if blind and (config.browser == "none" or find_chromium() is None):
        message = f"no Chromium: {', '.join(blind)} cannot be made"
        if config.browser == "required":
            raise BuildError(f"{message}; install the Debian package chromium-headless-shell, or set MMAGENT_CHROMIUM")
        print(f"{message}; building the other sources only", file=sys.stderr)
        todo = [(stage, maker, samples) for stage, maker, samples in todo if maker.screen is None]
    trained_on = [root / stage / maker.name for stage, maker, _ in todo if stage != "validation"]
    if not trained_on and not (root / "tokenizer.json").is_file():  # said before minutes go into what is held out
        raise BuildError(
            f"{root} has no tokenizer.json, and there is no pretrain or sft source to train a vocabulary on; "
            f"name one, or build into a folder that has a vocabulary"
        )
    asyncio.run(_build_all(config, root, todo))
    folders = {f"{stage}/{maker.name}": root / stage / maker.name for stage, maker, _ in todo}
    vocab = _vocab(config, root, trained_on) if trained_on else Vocab.load(root)
    builder = DocumentBuilder(vocab, GeometryConfig(), ChatConfig())
    return {name: read_card(folder, builder) or write_card(folder, builder) for name, folder in folders.items()}


def _drawable(config: BuildConfig) -> BuildConfig:
    """``config`` with the languages that this machine has fonts for; says which it has not, or refuses them."""
    wanted = (config.pretrain, config.sft, config.validation)
    speaks = any(counts.get(name) for counts in wanted for name in gui_pages.NAMES)
    if not speaks or config.browser == "none" or find_chromium() is None:
        return config

    async def ask() -> dict[str, str]:
        async with BrowserPool() as pool, pool.page() as page:
            return await fonts.lacking(page, config.languages)

    problems = asyncio.run(ask())
    if not problems:
        return config
    left = [code for code in config.languages if code not in problems]
    message = f"no font: {'; '.join(problems.values())}, or set languages=[{','.join(left)}]"
    if config.browser == "required" or not left:
        raise BuildError(message)
    print(f"{message}; building without", file=sys.stderr)
    return replace(config, languages=left)


async def _build_all(config: BuildConfig, root: Path, todo: Sequence[tuple[str, Maker, int]]) -> None:
    async with AsyncExitStack() as stack:
        pool: BrowserPool | None = None
        for stage, maker, samples in todo:
            folder = root / stage / maker.name
            if maker.screen is not None and pool is None and not is_finished(folder, samples):
                browsers = BrowserPool(config.processes, config.pages, roots=[html_folder()])
                pool = await stack.enter_async_context(browsers)
            with tqdm(total=samples, desc=f"{stage}/{maker.name}", unit="sample", smoothing=0.05) as bar:

                def report(written: int, bar: tqdm = bar) -> None:
                    bar.update(written - bar.n)

                await build_source(
                    maker,
                    folder,
                    samples,
                    pool,
                    in_flight=config.pages,
                    shard_samples=config.shard_samples,
                    report=report,
                )


def _vocab(config: BuildConfig, root: Path, folders: Sequence[Path]) -> Vocab:
    """Train the vocabulary on samples from all over every source given, unless that was done for the same sources."""
    sets = [ShardSet(folder) for folder in folders]
    made = {"size": config.vocab_size, "texts": config.vocab_texts, "sources": [s.fingerprint() for s in sets]}
    if (root / _VOCAB_PLAN).is_file() and json.loads((root / _VOCAB_PLAN).read_text(encoding="utf-8")) == made:
        return Vocab.load(root)
    texts = [
        text
        for shards in sets
        for n in range(min(config.vocab_texts, len(shards)))
        for text in texts_of(from_sample(shards.read(permute(n, len(shards), 0))))
    ]
    vocab = Vocab.train(texts, config.vocab_size)
    vocab.save(root)
    write_whole(root / _VOCAB_PLAN, made)
    return vocab


def table(cards: dict[str, dict[str, Any]]) -> str:
    """The cards for people."""
    lines = [f"{'source':<24} samples  images    tokens  visual  trained  longest      MB"]
    for name, card in cards.items():
        tokens = card["tokens"]
        lines.append(
            f"{name:<24}{card['samples']:>9}{card['images']:>8}{tokens['total']:>10}"
            f"{tokens['visual'] / tokens['total']:>8.0%}{tokens['trainable'] / tokens['total']:>9.0%}"
            f"{tokens['longest']:>9}{card['bytes'] / 1e6:>8.1f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_cli({"laptop": laptop, "debug": debug, "full": full}, __doc__ or "", argv)
    started = time.perf_counter()
    try:
        cards = build(config)
    except (BuildError, ConfigError, ShardError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(cards))
    print(f"{config.folder}: built in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
