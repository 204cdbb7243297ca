"""Images in chunks on several ranks: as many chunks as a rank needs, under every way of sharing weights, and nobody
waits for ever; the encoder frozen and unfrozen between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.models.flops import cost_weights
from mmagent.models.memory import MemoryConfig
from mmagent.models.vision_balance import VisionBalanceConfig, balance_vision
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.train.step import StepResult, train_step
from tests.engine_kit import ALONE
from tests.model_kit import make_document, make_pack

MANY = [3, (1, 4, 4), 2, (1, 4, 8), 5, (2, 4, 4), 1, (1, 4, 6), 2, (1, 6, 6), 3]
DOCUMENTS = [MANY, [9], [7, (1, 4, 4), 2], [2, (1, 2, 4), 6], [12]]
Split = tuple[tuple[tuple[int, ...], ...], ...]
"""``split[rank][micro-batch]`` lists documents."""
WHOLE: Split = (((0, 1, 2, 3, 4),),)
TWO: Split = (((0,), (3, 4)), ((2,), (1,)))  # five chunks beside one; then one beside a text-only pack
TEXT_RANK: Split = (((2, 0, 3),), ((1, 4),))  # seven chunks beside a rank that never sees an image
CHUNKS = MemoryConfig(chunk_patches=16)
THAWING = (("encoder",), (), ("encoder", "projector"), ())


@dataclass(frozen=True)
class Case:
    """One step for each entry of ``freeze``."""

    parallel: str = "none"
    split: Split = WHOLE
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    dtype: str = "float32"
    freeze: tuple[tuple[str, ...], ...] = ((),)
    experts: int = 1
    context: int = 1
    trade: bool = False  # images between ranks, before each takes its own in chunks


@dataclass
class Outcome:
    weights: dict[str, Tensor]
    results: list[StepResult]
    calls: list[int]  # of the encoder in the forward of each micro-batch


def train(world: World, case: Case) -> Outcome:
    torch.manual_seed(0)
    world = world.with_context(case.context)
    model = AgentModel(presets.debug())
    model.set_memory(case.memory)
    if case.trade:
        model.images = balance_vision(VisionBalanceConfig("always"), world, cost_weights(model.config), 2)
    objective = LanguageModeling(model, LanguageModelingConfig(bias_rate=0.0))
    shared = {"expert_parallel": case.experts, "context_parallel": case.context}
    config = EngineConfig(case.parallel, case.dtype, clip_norm=0.0, **shared)
    # plain descent, so weights move by the gradient itself
    engine = build_engine(objective, torch.optim.SGD(objective.parameters(), lr=0.1), config, world)
    packs = [make_pack([make_document(DOCUMENTS[n], n) for n in some]) for some in case.split[world.data_rank]]
    results, calls = [], []
    for freeze in case.freeze:
        model.freeze(freeze)
        seen = _count(model)
        results.append(train_step(objective, engine, packs, world))
        calls.append(seen())
    return Outcome(gather_weights(objective), results, calls)


def _count(model: nn.Module):
    """How often the encoder has been called since, in forwards and backwards."""
    calls: list[None] = []
    handle = model.encoder.register_forward_pre_hook(lambda *_: calls.append(None))

    def stop() -> int:
        handle.remove()
        return len(calls)

    return stop


def train_all(world: World, cases: Sequence[Case]) -> list[Outcome]:
    return [train(world, case) for case in cases]


def compare(got: Outcome, wanted: Outcome, atol: float, rtol: float = 1e-4) -> None:
    assert set(got.weights) == set(wanted.weights)
    for name, tensor in wanted.weights.items():
        torch.testing.assert_close(got.weights[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    for one, other in zip(got.results, wanted.results, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=10 * rtol)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=10 * rtol)


@pytest.fixture(scope="module")
def plain() -> dict[tuple, Outcome]:
    """One rank, all images at once."""
    return {freeze: train(ALONE, Case(freeze=freeze)) for freeze in (((),), THAWING)}


def test_one_process_is_the_same_with_chunks_while_the_encoder_thaws(plain):
    got = train(ALONE, Case(memory=CHUNKS, freeze=THAWING))
    compare(got, plain[THAWING], atol=2e-6)
    assert got.calls == [7, 14, 7, 14]  # frozen it is not computed twice
    assert plain[THAWING].calls == [1, 1, 1, 1]


def test_ranks_with_unequal_numbers_of_chunks_train_as_one(plain):
    cases = [Case(p, TEXT_RANK, CHUNKS, freeze=THAWING) for p in ("ddp", "fsdp2")]
    cases += [
        Case("fsdp2", TWO, MemoryConfig(["encoder", "projector"], chunk_patches=16)),
        Case("fsdp2", TEXT_RANK, MemoryConfig(["encoder", "projector"]), freeze=THAWING),  # without chunks
        Case("fsdp2", TEXT_RANK, MemoryConfig(offload=["encoder"], chunk_patches=16)),  # kept, not computed again
    ]
    ranks = run_ranks(train_all, 2, cases)
    for case, outcome, other in zip(cases, *ranks, strict=True):
        compare(outcome, plain[case.freeze], atol=2e-6)
        if case.memory == CHUNKS:
            assert outcome.calls == [7, 14, 7, 14]
            assert other.calls == [1, 1, 1, 1]


def test_experts_slices_of_packs_and_images_may_be_shared_beside_chunks(plain):
    cases = [
        Case("fsdp2", TEXT_RANK, CHUNKS, trade=True),
        Case("ddp", TEXT_RANK, CHUNKS, experts=2),
        Case("fsdp2", WHOLE, CHUNKS, context=2),
    ]
    ranks = run_ranks(train_all, 2, cases)
    for outcome in ranks[0]:
        compare(outcome, plain[((),)], atol=2e-6)
    traded = [outcomes[0].calls[0] for outcomes in ranks]
    assert min(traded) > 2  # both had several chunks: alone, one would have had all images


def test_deepspeed_sees_one_use_of_each_weight_and_zero3_is_refused_by_name(plain):
    (outcome,) = run_ranks(train_all, 2, [Case("zero2", TEXT_RANK, CHUNKS)])[0]
    compare(outcome, plain[((),)], atol=2e-6)
    with pytest.raises(RuntimeError, match=r"memory\.chunk_patches: ZeRO-3 gathers weights"):
        run_ranks(train_all, 2, [Case("zero3", TEXT_RANK, CHUNKS)])


def test_bfloat16_sums_over_chunks_are_no_coarser_than_those_of_one_chunk(plain):
    """Gradients of chunks are added up in float32: what is far from float32 with them is so without."""
    cases = [Case(p, TEXT_RANK, m, "bfloat16") for p in ("ddp", "fsdp2") for m in (MemoryConfig(), CHUNKS)]
    whole_ddp, ddp, whole_fsdp2, fsdp2 = (_distance(o, plain[((),)]) for o in run_ranks(train_all, 2, cases)[0])
    assert ddp < 1.2 * whole_ddp
    assert fsdp2 < 1.2 * whole_fsdp2


def _distance(got: Outcome, wanted: Outcome) -> float:
    names = [n for n in wanted.weights if n.startswith(("model.encoder.", "model.projector."))]
    return float(torch.stack([(got.weights[n] - wanted.weights[n]).norm() for n in names]).norm())


def test_chunks_cannot_be_switched_on_once_the_model_is_sharded():
    message = run_ranks(_switch_late, 2)[0]
    assert "before the model is sharded" in message


def _switch_late(world: World) -> str:
    model = AgentModel(presets.debug())
    objective = LanguageModeling(model, LanguageModelingConfig())
    build_engine(objective, torch.optim.SGD(model.parameters(), lr=0.1), EngineConfig("fsdp2"), world)
    with pytest.raises(ValueError) as caught:
        model.set_memory(CHUNKS)
    model.set_memory(MemoryConfig(["encoder"]))
    return str(caught.value)
