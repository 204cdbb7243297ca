"""Ranks that share every pack compute what one rank alone does: losses, metrics, router loads and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from mmagent import dist
from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.models.context import mtp_traffic
from mmagent.models.decoder import PackedAttention
from mmagent.models.mtp import MODES, MTPConfig
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.train.hooks import evaluate
from mmagent.train.step import StepResult, train_step
from mmagent.types import PackedBatch
from tests.model_kit import make_document, make_pack
from tests.traffic_kit import Traffic

ALONE = World(0, 1, 0, torch.device("cpu"))
PACKS = (
    ([[3, (1, 4, 4), 5], [1], [7, (1, 6, 10), 4, (1, 4, 2), 2], [11], [2, (1, 4, 4), 3]], 3),
    ([[6], [9, (2, 2, 4), 1, (1, 2, 2), 5]], 0),
    ([[2], [1], [12], [4]], 2),
    ([[1, (1, 6, 8), 3], [8]], 0),
)
"""Documents and padding. Half of the first pack ends within an image of its third document, half of the second within
a text; the third has no image at all, and the last has one image, which one rank encodes for both."""


@dataclass(frozen=True)
class Case:
    mode: str
    tied: bool = True
    recompute: bool = False
    parallel: str = "ddp"
    experts: int = 1
    dtype: str = "float32"


@dataclass(frozen=True)
class Outcome:
    """``weights`` after one step of plain gradient descent moved by the gradient itself; only rank 0 has them."""

    weights: dict[str, Tensor]
    result: StepResult
    load: Tensor


def build(mode: str = "shared", tied: bool = True) -> LanguageModeling:
    torch.manual_seed(0)
    config = presets.debug()
    config.mtp = MTPConfig(depths=2, tied=tied, mode=mode)
    model = AgentModel(config)
    with torch.no_grad():
        model.head.weight[4:] = 0.0  # few words to say, so that drafts are accepted now and then
        model.head.weight[:4] *= 10
    # the auxiliary loss is heavy here, so that its gradient does not hide behind the others
    return LanguageModeling(model, LanguageModelingConfig(balance_weight=0.5))


def packs(of: Sequence[int]) -> list[PackedBatch]:
    return [
        make_pack([make_document(parts, 10 * n + i) for i, parts in enumerate(PACKS[n][0])], PACKS[n][1]) for n in of
    ]


def train(world: World, case: Case) -> Outcome:
    objective = build(case.mode, case.tied)
    if case.recompute:
        objective.model.set_recompute(["encoder", "decoder", "mtp"])
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    sizes = {"context_parallel": world.context, "expert_parallel": case.experts}
    config = EngineConfig(case.parallel, case.dtype, clip_norm=0.0, **sizes)
    engine = build_engine(objective, optimizer, config, world)
    mine = packs(range(len(PACKS))[world.data_rank :: world.data_size])
    result = train_step(objective, engine, mine, world)
    return Outcome(gather_weights(objective), result, objective.router_load)


def train_all(world: World, runs: Sequence[tuple[int, Case]]) -> list[Outcome]:
    return [train(world.with_context(context), case) for context, case in runs]


def check(got: Outcome, wanted: Outcome, case: object) -> None:
    """fp32: sums of a few hundred terms of size 1, in another order, differ by some 1e-6 of themselves."""
    assert set(got.weights) in (set(), set(wanted.weights))
    for name, tensor in got.weights.items():
        torch.testing.assert_close(
            tensor, wanted.weights[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{case}: {n}: {m}"
        )
    for field in ("loss", "losses", "metrics"):
        assert getattr(got.result, field) == pytest.approx(getattr(wanted.result, field), rel=1e-5), (case, field)
    assert got.result.grad_norm == pytest.approx(wanted.result.grad_norm, rel=1e-4), case
    assert (got.result.counts, got.result.volume) == (wanted.result.counts, wanted.result.volume), case
    assert torch.equal(got.load, wanted.load), case


def test_two_ranks_share_packs():
    cases = [Case(mode, tied, recompute=tied) for mode, tied in product(MODES, (True, False))]
    half = Case("fused", recompute=True, dtype="bfloat16")
    wanted = {(case.mode, case.tied): train(ALONE, case) for case in cases}
    close = train(ALONE, half).result
    for *outcomes, in_half in run_ranks(train_all, 2, [(2, case) for case in (*cases, half)]):
        for got, case in zip(outcomes, cases, strict=True):
            check(got, wanted[case.mode, case.tied], case)
        # products round at 2**-8, at other places where heads and tokens are split; sums over all tokens average it
        assert in_half.result.losses == pytest.approx(close.losses, rel=2e-3)
        assert in_half.result.grad_norm == pytest.approx(close.grad_norm, rel=2e-2)
    for depth, context in product((1, 2), ("accept", "accept_after_image", "accept_text_only")):
        accepted = wanted["shared", True].result.metrics[f"mtp_{depth}/{context}"]
        assert 0 < accepted < 1, "nothing is tested where all drafts fare alike"


def test_four_ranks_share_packs_by_twos_and_all_together():
    """All together they are more than the key-value heads. Experts are shared by the ranks of a context, by those of
    two contexts, and by half of one."""
    runs = [
        (2, Case("shared", recompute=True, parallel="fsdp2", experts=2)),
        (2, Case("shared", experts=4)),
        (2, Case("fused", tied=False, parallel="fsdp2")),
        (4, Case("fused", tied=False, recompute=True, experts=2)),
        (4, Case("masked", recompute=True, experts=2)),
    ]
    wanted = {mode: train(ALONE, Case(mode, tied=mode != "fused")) for mode in MODES}
    for outcomes in run_ranks(train_all, 4, runs):
        for got, (context, case) in zip(outcomes, runs, strict=True):
            check(got, wanted[case.mode], (context, case))


def share(world: World, objective: LanguageModeling) -> LanguageModeling:
    objective.share_packs(world.mesh({"dp": 1, "cp": world.size}).get_group("cp"))
    return objective


def travelled(world: World) -> list[tuple[dict[str, int], list[int], int]]:
    """Of a forward in every mode and of one without MTP: collectives, bytes sent to others, and those computed."""
    batch = make_pack([make_document([1, (1, 4, 12), 2, (1, 4, 8), 20], 5)])  # half of it ends in the smaller image
    found = []
    for mode in (*MODES, ""):
        model = share(world, build(mode or "shared")).model
        with torch.no_grad(), Traffic() as traffic:
            model(batch, mtp=bool(mode))
        computed = mtp_traffic(batch, model.config.mtp, 2, model.config.decoder.width, 4, world.size).context
        found.append((dict(traffic.calls), traffic.sent, computed))
    return found


def test_what_mtp_is_fed_travels_in_fused_mode_alone():
    """A depth's own block trades tokens for heads and back, and sums its router's counts. Beside that the shared and
    the masked mode bring no collective and not one byte; what the fused mode needs rides in the images' exchange."""
    per_rank = run_ranks(travelled, 2)
    depths, halo = 2, 0
    for shared, fused, masked, without in per_rank:
        assert shared == (fused[0], masked[1], 0)
        assert shared[0]["alltoall_base"] == without[0]["alltoall_base"] + 2 * depths
        assert shared[0]["allreduce"] == without[0]["allreduce"] + depths
        images, *attention = shared[1]
        assert images == without[1][0]
        assert attention == fused[1][1:]
        halo += fused[1][0] - images
    assert halo == per_rank[0][1][2] == depths * 32 * 4  # measured on both ranks together, and computed for both


def handed_over(world: World) -> list[tuple[float, int, int]]:
    """The trunk on rank 0, multi-token prediction on rank 1, as on two pipeline stages. In every mode: how far the
    hidden states of the second stage are from those of one, and bytes sent beside those of the trunk, and computed."""
    (batch,) = packs([0])
    found = []
    for mode in MODES:
        model = build(mode).model
        slots, total, width = batch.visual_slots, batch.segments.total, model.config.decoder.width
        behind = ~torch.isin(slots, batch.segments.cu_seqlens)  # no token comes before the first of a document
        fused = mode == "fused"
        hidden, visual = torch.empty(total, width), torch.empty(int(behind.sum()) if fused else 0, width)
        worst = 0.0
        with torch.no_grad(), Traffic() as traffic:
            if world.rank == 0:
                merged = model.embed(batch)
                hidden = model.hidden(merged, batch.positions, PackedAttention(batch.segments))
                visual = merged[slots[behind]] if fused else visual
                dist.exchange([(hidden, 1), *([(visual, 1)] if fused else [])], [])
            else:
                dist.exchange([], [(hidden, 0), *([(visual, 0)] if fused else [])])
        if world.rank == 1:
            with torch.no_grad():
                text = model.embed_tokens(batch.input_ids)
                inputs = model.mtp.inputs(text, text.index_copy(0, slots[behind], visual) if fused else text, slots)
                attend = PackedAttention(batch.segments)
                got, _ = model.mtp(hidden, inputs, batch.positions, batch.segments, attend)
                wanted = model(batch).mtp_hidden
            worst = max(float((one - other).abs().max()) for one, other in zip(got, wanted, strict=True))
        computed = mtp_traffic(batch, model.config.mtp, 2, width, 4).stage
        found.append((worst, sum(traffic.sent) - total * width * 4 * (world.rank == 0), computed))
    return found


def test_what_mtp_is_fed_crosses_a_stage_in_fused_mode_alone():
    first, second = run_ranks(handed_over, 2)
    for (_, sent, computed), (worst, _, _), mode in zip(first, second, MODES, strict=True):
        assert worst < 1e-5, mode
        assert sent == computed
        assert (sent > 0) == (mode == "fused")


class Kept:
    """Inside the block, the bytes that autograd keeps for the backward are added up in ``total``, weights aside."""

    def __init__(self, model: AgentModel):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.total = 0
        seen: set[int] = set()
        self._alive: list[Tensor] = []  # a storage that is freed may come again at the same address

        def pack(x: Tensor) -> Tensor:
            place = x.untyped_storage().data_ptr()
            if place not in weights | seen:
                seen.add(place)
                self._alive.append(x)
                self.total += x.untyped_storage().nbytes()
            return x

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self._hooks.__exit__(*problem)


def kept(world: World) -> int:
    """For the backward of one long document."""
    model = build().model if world.size == 1 else share(world, build()).model
    with Kept(model) as activations:
        model(make_pack([make_document([1024], 1)]))
    return activations.total


def test_a_rank_keeps_the_activations_of_its_slice():
    """Half of them each, beside the rotary tables of MTP and what else is the whole stream's: a tenth at most."""
    assert max(run_ranks(kept, 2)) < 0.6 * kept(ALONE)


def small_and_wrong(world: World) -> list[object]:
    """A pack with fewer tokens than ranks; validation; packs that differ."""
    objective = share(world, build())
    one = make_pack([make_document([1], 3)])
    lone = {name: value.item() for name, value in objective(one).sums.items()}
    config = EngineConfig(context_parallel=2)
    shared = world.with_context(2)
    engine = build_engine(objective, torch.optim.SGD(objective.parameters(), lr=0.1), config, shared)
    validation = evaluate(objective, packs([0, 2]), shared, engine)
    try:
        objective.counts(packs([world.rank])[0])
    except ValueError as error:
        return [lone, validation, str(error)]
    return [lone, validation, "nothing was raised"]


def test_a_lone_token_a_validation_and_packs_that_differ():
    objective = build()
    config = EngineConfig("none")
    engine = build_engine(objective, torch.optim.SGD(objective.parameters(), lr=0.1), config, ALONE)
    wanted = evaluate(objective, packs([0, 2]), ALONE, engine)
    lone = {name: value.item() for name, value in objective(make_pack([make_document([1], 3)])).sums.items()}
    results = run_ranks(small_and_wrong, 2)
    for name in lone:
        assert sum(sums[name] for sums, *_ in results) == pytest.approx(lone[name], rel=1e-5), name
    for _, validation, error in results:
        assert validation == pytest.approx(wanted, rel=1e-5)
        assert "must read the same packs" in error
