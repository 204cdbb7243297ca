"""Work of the heaviest rank over the mean, and the time of steps, with and without balance.

Documents are real in size: texts are the modules of Python's standard library (three and a half bytes a token),
pictures all images that the installed packages hold, at their own size up to 1,280 visual tokens. Two in five documents
are a text, three in ten a picture with a caption, three in ten tell of many pictures, how many by a Pareto law (its
exponent is the tail; 1.2 unless named). Packs of 8,192 tokens and patches at most, four a rank and step, are formed as
the stream forms them; work is the operations that the 1B preset (``small``) needs. Simulated ranks: `in turn` gives
each the packs of its own stream; `samples in turn` gives each equally many documents, as samplers of torch and splits
of webdataset do; `by eights` deals within groups of eight, which needs no traffic. Rows that
`met` are of engines whose ranks wait for one another in every micro-batch (FSDP2, shared experts); `dealt by sums` is
how packs are dealt to ranks that do so once a step.

Rows of `2 ranks` are measured: two processes over gloo train a model whose encoder costs 1.5 of a token a patch (1.7 in
the 1B preset) in fp32, dealing and trading included. `skewed` gives one rank all the pictures.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mmagent import dist
from mmagent.balance import CostWeights, deal, fit_weights, max_over_mean
from mmagent.dealing import deal_batches, deal_hands
from mmagent.dist import World, run_ranks
from mmagent.engine.config import EngineConfig
from mmagent.engine.torch_engine import TorchEngine
from mmagent.geometry import GeometryConfig, ImageView, image_grid
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.cogvit import CogViTConfig
from mmagent.models.flops import cost_weights
from mmagent.models.vision_balance import VisionBalanceConfig, balance_vision, pays, plan_images
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.packing import Size, empty_pack, pack, select
from mmagent.train.step import train_step
from mmagent.types import Cost, Document, PackedBatch, PatchedImage
from tools.benchmarks.row import Row, Settings, smaller_is_better

BUDGET = Size(8192, 8192)
GEOMETRY = GeometryConfig(max_tokens=1280)
PACKS, BUFFER, WARM = 4, 64, 4  # a rank and step; documents that wait; packs of a stream before it is looked at
PARTS = ("measured", "simulated")
RANKS = (64, 1024, 12288)
TAILS = (1.6, 1.2, 0.9)
ON_GPU = 8000.0
"""Operations in the time of a byte, as :class:`VisionBalanceConfig` takes it of an accelerator."""
Grid = tuple[int, int, int]


class Item(NamedTuple):
    """A document by its size."""

    tokens: int
    grids: tuple[Grid, ...]

    @property
    def size(self) -> Size:
        return Size(self.tokens, sum(f * r * c for f, r, c in self.grids))

    @property
    def cost(self) -> Cost:
        squares = sum(f * (r * c) ** 2 for f, r, c in self.grids)
        return Cost(squares, self.size.patches, self.tokens**2, self.tokens)


@dataclass(frozen=True)
class Plan:
    """A pack by its documents."""

    items: tuple[Item, ...]

    @property
    def cost(self) -> Cost:
        return Cost(*map(sum, zip(*(item.cost for item in self.items), strict=True)))

    @property
    def grids(self) -> list[Grid]:
        return [grid for item in self.items for grid in item.grids]


@cache
def text_lengths() -> list[int]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    return [int(path.stat().st_size / 3.5) for path in files if path.stat().st_size > 56]


@cache
def picture_grids() -> list[Grid]:
    found = []
    for path in sorted(p for kind in ("*.png", "*.jpg") for p in Path(sysconfig.get_paths()["purelib"]).rglob(kind)):
        try:
            with Image.open(path) as picture:
                found.append(image_grid(picture.height, picture.width, GEOMETRY))
        except (UnidentifiedImageError, ValueError):
            continue  # no image after all, or of a shape that no geometry accepts
    if len(found) < 20:
        raise ValueError(f"only {len(found)} pictures in the installed packages: matplotlib has enough")
    return found


def documents(seed: int, budget: Size, tail: float = 1.2) -> Iterator[Item]:
    """The mix, without end, of documents that a pack can hold."""
    random = np.random.default_rng(seed)
    texts, pictures = text_lengths(), picture_grids()
    while True:
        kind = random.random()
        shown = 0 if kind < 0.4 else 1 if kind < 0.7 else min(1 + int(2 * random.pareto(tail)), 64)
        grids = tuple(pictures[n] for n in random.integers(len(pictures), size=shown))
        words = texts[random.integers(len(texts))] if not shown else int(shown * random.integers(20, 150))
        item = Item(words + sum(f * r * c // 4 for f, r, c in grids), grids)
        if item.size.fits(budget):
            yield item


def plans(seed: int, count: int, budget: Size, tail: float = 1.2) -> list[Plan]:
    """The first packs of a stream after ``WARM`` ones."""
    arriving, waiting, found = documents(seed, budget, tail), [], []
    for _ in range(WARM + count):
        tokens = sum(item.tokens for item in waiting)
        while len(waiting) < BUFFER or tokens < 2 * budget.tokens:
            waiting.append(next(arriving))
            tokens += waiting[-1].tokens
        chosen = set(select([item.size for item in waiting], budget))
        found.append(Plan(tuple(item for n, item in enumerate(waiting) if n in chosen)))
        waiting = [item for n, item in enumerate(waiting) if n not in chosen]
    return found[WARM:]


def rows(settings: Settings) -> Iterator[Row]:
    if settings.part != "simulated":
        yield from measured(settings)
    if settings.part != "measured":
        yield from uneven(settings)


def uneven(settings: Settings) -> Iterator[Row]:
    """Rows of simulated ranks."""
    weights = cost_weights(presets.small())
    most = RANKS[0] if settings.quick else RANKS[-1]
    started = time.perf_counter()
    packs = [plan for seed in range(most) for plan in plans(seed, PACKS, BUDGET)]
    forming = (time.perf_counter() - started) * PACKS / (PACKS + WARM) / most
    for ranks in RANKS[:1] if settings.quick else RANKS:
        yield from simulated(f"max/mean work, {ranks:,} ranks", packs[: ranks * PACKS], ranks, weights)
        costs = [weights(plan.cost) for plan in packs[: ranks * PACKS]]
        started = time.perf_counter()
        deal(costs, ranks)
        dealing = time.perf_counter() - started
        name = f"planning a step, {ranks:,} ranks"
        yield smaller_is_better(name, 1e3 * (forming + dealing), 8e3 * forming, "by eights", "ms")
        yield from met(packs[: ranks * PACKS], ranks, weights)
    few = packs[: RANKS[0] * PACKS] if settings.quick else packs[: 1024 * PACKS]
    ranks = len(few) // PACKS
    yield from simulated(f"max/mean work, {ranks:,} ranks, GLM-4.5-Air", few, ranks, cost_weights(presets.glm45_air()))
    yield encoders(few, weights)
    for tail in TAILS:
        packs = [plan for seed in range(ranks) for plan in plans(seed, PACKS, BUDGET, tail)]
        yield from simulated(f"growth tail {tail}, {ranks:,} ranks", packs, ranks, weights)


def simulated(name: str, packs: Sequence[Plan], ranks: int, weights: CostWeights) -> Iterator[Row]:
    costs = [weights(plan.cost) for plan in packs]

    def heaviest(hands: Sequence[Sequence[float]]) -> float:
        return max_over_mean([sum(hand) for hand in hands])

    dealt = heaviest([[costs[n] for n in hand] for hand in deal(costs, ranks)])
    groups = [costs[n : n + 8 * PACKS] for n in range(0, len(costs), 8 * PACKS)]
    samples = [weights(item.cost) for plan in packs for item in plan.items]
    each = len(samples) // ranks
    shuffled = np.random.default_rng(0).permutation(samples)[: each * ranks].reshape(ranks, each)
    peers = {
        "in turn": heaviest([costs[rank * PACKS : (rank + 1) * PACKS] for rank in range(ranks)]),
        "samples in turn": heaviest(shuffled.tolist()),
        "by eights": heaviest([[group[n] for n in hand] for group in groups for hand in deal(group, 8)]),
    }
    for peer, value in peers.items():
        yield over_mean(name, dealt, value, peer)


def met(packs: Sequence[Plan], ranks: int, weights: CostWeights) -> Iterator[Row]:
    """What ranks that meet in every micro-batch wait for, over the mean: the heaviest pack of each; and those that meet
    in every layer, where groups of eight trade images on ``auto``: the most to encode, then the most to decode."""
    costs = [weights(plan.cost) for plan in packs]
    kept = [costs[rank * PACKS : (rank + 1) * PACKS] for rank in range(ranks)]
    hands = [[packs[home * PACKS + place] for home, place in hand] for hand in deal_hands(kept, meets=True).packs]
    evened = [[costs[n] for n in hand] for hand in deal(costs, ranks)]
    total = sum(costs)

    def waited(table: Sequence[Sequence[float]]) -> float:
        return sum(max(some) for some in zip(*table, strict=True)) * ranks / total

    dealt = waited([[weights(plan.cost) for plan in hand] for hand in hands])
    for peer, table in {"in turn": kept, "dealt by sums": evened}.items():
        yield over_mean(f"met in every micro-batch, {ranks:,} ranks", dealt, waited(table), peer)
    traded = _in_layers(hands, weights, True)
    in_turn = _in_layers([packs[rank * PACKS : (rank + 1) * PACKS] for rank in range(ranks)], weights, False)
    for peer, seconds in {"in turn": in_turn, "dealt, images kept": _in_layers(hands, weights, False)}.items():
        name = f"met in every layer, images on auto, {ranks:,} ranks"
        yield over_mean(name, traded * ranks / total, seconds * ranks / total, peer)


def _in_layers(hands: Sequence[Sequence[Plan]], weights: CostWeights, trading: bool) -> float:
    """The time of a step, micro-batch by micro-batch."""
    vision = np.array([[weights.vision(plan.cost) for plan in hand] for hand in hands])
    text = np.array([[weights.text(plan.cost) for plan in hand] for hand in hands])
    config, model = VisionBalanceConfig(), presets.small()
    bytes_a_patch = 4.0 * (model.vision.patch_values + 2 * model.decoder.width / model.vision.merge_size**2)
    for start in range(0, len(hands) if trading else 0, config.ranks):
        group = slice(start, start + config.ranks)
        images = [plan_images([plan.grids for plan in plans], weights) for plans in zip(*hands[group], strict=True)]
        if pays(images, text[group].T.tolist(), bytes_a_patch, ON_GPU, config.min_gain, meets=True):
            vision[group] = np.array([plan.after for plan in images]).T
    return float(vision.max(axis=0).sum() + text.max(axis=0).sum())


def over_mean(name: str, ours: float, peer: float, peer_name: str) -> Row:
    """Shown as what is above the mean; the ratio is that of the heaviest ranks, so of step times."""
    return Row(name, 100 * (ours - 1), 100 * (peer - 1), peer_name, peer / ours, "% above mean", 0.0)


def encoders(packs: Sequence[Plan], weights: CostWeights) -> Row:
    """Encoder work alone of eight ranks that trade images, in every micro-batch."""
    groups = [[plan.grids for plan in packs[n : n + 8]] for n in range(0, len(packs), 8)]
    traded = [plan_images(group, weights) for group in groups]
    after, before = (
        statistics.mean(max_over_mean(loads) for loads in some)
        for some in ([plan.after for plan in traded], [plan.before for plan in traded])
    )
    return over_mean("max/mean encoder work, eight ranks trade images", after, before, "kept")


# ---------------------------------------------------------------------------------------------- two real ranks


SMALL = Size(2048, 2048)
SIDES = {
    "kept": (False, "off"),
    "dealt": (True, "off"),
    "traded": (False, "always"),
    "dealt and traded": (True, "auto"),
}
"""Whether finished packs are dealt, and whether images are."""


def model_config() -> AgentModelConfig:
    """The laptop's decoder behind an encoder that costs 1.5 of its tokens a patch."""
    vision = CogViTConfig(width=256, depth=6, heads=4, ffn=688, position_table=16)
    return replace(presets.laptop(), vision=vision)


def batch_of(plan: Plan, seed: int) -> PackedBatch:
    """Noise of the plan's sizes."""
    config, random = model_config(), torch.Generator().manual_seed(seed)
    found = []
    for n, item in enumerate(plan.items):
        images = []
        for grid in item.grids:
            patches = torch.randn(grid[0] * grid[1] * grid[2], config.vision.patch_values, generator=random)
            images.append(PatchedImage(patches, grid, ImageView((14, 14), (14, 14))))
        visual = sum(image.patches.shape[0] for image in images) // 4
        words = torch.randint(2, config.vocab_size, (item.tokens - visual,), generator=random)
        ids = torch.cat([torch.full((visual,), config.image_id), words])
        found.append(Document(ids, ids != config.image_id, tuple(images), f"document-{seed}-{n}", "mix"))
    return pack(found, image_id=config.image_id, merge_size=2)


def skewed(packs: int) -> list[list[Plan]]:
    """Rank 0 has packs of eight documents with a picture, rank 1 of eight texts; all are as long."""
    picture, text = Item(88, ((1, 16, 20),)), Item(88, ())
    return [[Plan((item,) * 8)] * packs for item in (picture, text)]


def time_sides(
    world: World, packs: Sequence[Sequence[Plan]], sides: Sequence[str], turns: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step by side, in turns, and of them those that this rank's processor worked; both ranks begin and
    end a step together."""
    torch.manual_seed(0)
    model = AgentModel(model_config())
    objective = LanguageModeling(model, LanguageModelingConfig())
    engine = TorchEngine(objective, torch.optim.SGD(objective.parameters(), lr=1e-4), EngineConfig(), world)
    own = [batch_of(plan, 100 * world.rank + n) for n, plan in enumerate(packs[world.rank])]
    weights = cost_weights(model.config)
    trades = {m: balance_vision(VisionBalanceConfig(m), world, weights, 2) for m in ("off", "auto", "always")}

    def step(side: str) -> tuple[float, float]:
        dealing, mode = SIDES[side]
        model.images = trades[mode]
        dist.barrier()
        started, worked = time.perf_counter(), time.process_time()
        batches = own
        if dealing:
            batches, _ = deal_batches(own, world, weights, lambda: empty_pack(0))
        train_step(objective, engine, batches, world)
        dist.barrier()
        return time.perf_counter() - started, time.process_time() - worked

    for side in sides:
        step(side)
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(turns):
        for side in sides if turn % 2 == 0 else reversed(sides):
            found[side].append(step(side))
    return found


def measured(settings: Settings) -> Iterator[Row]:
    mixed = plans(0, 2 * (1 if settings.quick else PACKS), SMALL)
    cases = {
        "skewed, one pack a rank, 2 ranks": (skewed(1), ("traded",)),
        "skewed, two packs a rank, 2 ranks": (skewed(2), ("dealt", "dealt and traded")),
        "mix, 2 ranks": ([mixed[::2], mixed[1::2]], ("dealt", "dealt and traded")),
    }
    for name, (packs, sides) in cases.items():
        ranks = run_ranks(time_sides, 2, packs, ("kept", *sides), settings.repeats, timeout=1200.0)
        times = {side: [seconds for seconds, _ in ranks[0][side]] for side in ("kept", *sides)}
        work = {
            side: [max(w for _, w in both) for both in zip(*(r[side] for r in ranks), strict=True)] for side in times
        }
        tokens = sum(plan.cost.tokens for own in packs for plan in own)
        for side in sides:
            yield compared(f"{name}, {side}", times[side], times["kept"], "kept", tokens)
            # on a machine that others use, too, the wall tells more of them
            yield compared(f"{name}, {side}: processor", work[side], work["kept"], "kept", tokens)
    weights = cost_weights(model_config())
    loads = [weights(plan.cost) for plan in mixed]
    dealt = max_over_mean([sum(loads[n] for n in hand) for hand in deal(loads, 2)])
    kept = max_over_mean([sum(loads[::2]), sum(loads[1::2])])
    yield over_mean("max/mean work, 2 ranks", dealt, kept, "in turn")
    yield predicted(settings)


def compared(name: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, tokens: int) -> Row:
    ratios = sorted(p / o for o, p in zip(ours, peer, strict=True))
    ratio, quarter = statistics.median(ratios), len(ratios) // 4
    spread = (ratios[-1 - quarter] - ratios[quarter]) / 2 / ratio
    pace = [tokens / statistics.median(times) for times in (ours, peer)]
    return Row(name, *pace, peer_name, ratio, "tokens/s", spread)


def predicted(settings: Settings) -> Row:
    """What the cost model misses of measured forwards and backwards: its weights fitted to them, and counted ones."""
    torch.manual_seed(0)
    objective = LanguageModeling(AgentModel(model_config()), LanguageModelingConfig())
    sizes = [Size(512, 512), Size(1024, 1024), SMALL]
    packs = [plan for n, size in enumerate(sizes) for plan in plans(n + 1, 2 if settings.quick else 6, size)]
    batches = [batch_of(plan, n) for n, plan in enumerate(packs)]

    def run(batch: PackedBatch) -> float:
        started = time.perf_counter()
        sum(objective(batch).sums.values()).backward()
        return time.perf_counter() - started

    run(batches[0])
    turns = [[run(batch) for batch in batches] for _ in range(settings.repeats)]
    seconds = [statistics.median(times) for times in zip(*turns, strict=True)]
    costs = [batch.cost() for batch in batches]
    counted = np.array([cost_weights(model_config())(cost) for cost in costs])
    times = np.array(seconds)
    rate = (counted / times).sum() / np.square(counted / times).sum()  # least squares of relative errors, as the fit
    missed = float(np.sqrt(np.square(counted * rate - times).mean()) / times.mean())
    fitted = fit_weights(costs, seconds)
    return smaller_is_better(
        "cost model, fitted", 100 * fitted.error, 100 * missed, "counted operations", "% rms error"
    )


def plot(found: Sequence[Row], path: Path) -> None:
    """How uneven work is as ranks grow, and as the tail gets heavier."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    by_ranks = [row for row in found if row.name.startswith("max/mean work,") and row.name.endswith("ranks")]
    by_ranks = [row for row in by_ranks if row.name != "max/mean work, 2 ranks"]
    by_tail = [row for row in found if row.name.startswith("growth tail") and row.unit == "% above mean"]
    number: tuple[Callable[[Row], float], ...] = (
        lambda row: int(row.name.split()[2].replace(",", "")),
        lambda row: float(row.name.split()[2].rstrip(",")),
    )
    for axis, some, x in zip(axes, (by_ranks, by_tail), number, strict=True):
        for peer in ("samples in turn", "in turn", "by eights"):
            chosen = [row for row in some if row.peer_name == peer]
            axis.plot([*map(x, chosen)], [1 + row.peer / 100 for row in chosen], "o--", label=peer)
        chosen = [row for row in some if row.peer_name == "by eights"]
        axis.plot(
            [x(row) for row in chosen], [1 + row.ours / 100 for row in chosen], "s-", label="dealt over all ranks"
        )
        axis.set_ylabel("work of the heaviest rank over the mean")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set(xscale="log", xlabel="ranks")
    axes[1].set(xlabel="exponent of pictures a document (smaller: heavier tail)")
    axes[1].invert_xaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
