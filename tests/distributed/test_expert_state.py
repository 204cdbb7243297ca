"""What is kept of experts that two ranks share, the order in which these meet, and what they refuse."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from mmagent import dist
from mmagent.dist import World, run_ranks
from mmagent.engine import checkpoint
from mmagent.engine.average import AverageConfig, WeightAverage
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.generation.generator import Generator
from mmagent.models.mtp import MTPConfig
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.train.run import Run
from mmagent.train.step import train_step
from mmagent.trajectories import Limits, Trajectory
from tests.agent_kit import tiny_model, tiny_vocab
from tests.engine_kit import ALONE, Toy
from tests.expert_kit import TEXT_RANK, TWO, WHOLE, Case, Outcome, build_model, compare, engine_of, train

SAVED = Case("fsdp2", optimizer="muon")


@dataclass
class Seen:
    """What one of the ranks saw."""

    continued: tuple[Outcome, Outcome]
    averaged: tuple[dict[str, Tensor], dict[str, Tensor]]
    exchanges: list[list[tuple[object, ...]]]
    refused: list[str]
    left: float


def look(world: World, folder: str) -> Seen:
    return Seen(
        (resume(world, f"{folder}/alone", 0), resume(world, f"{folder}/ranks", 1, f"{folder}/alone")),
        average(world),
        [exchanges(world, recompute) for recompute in ((), ("decoder", "mtp"))],
        [message(call) for call in impossible(world)],
        leave_a_peer(world),
    )


def resume(world: World, folder: str, steps: int, start: str = "") -> Outcome:
    """What a run loads from ``start`` or ``folder``, trains for some steps, and saves."""
    case = replace(SAVED, split=SAVED.split if world.size > 1 else WHOLE)
    objective = LanguageModeling(build_model(case), LanguageModelingConfig(bias_rate=0.01))
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1)  # nothing that was not loaded can look as if it had been
    engine = engine_of(case, objective, objective.model, world)
    run = Run(folder, world, {"model": objective, "engine": engine})
    if start:
        run.load(checkpoint.steps(Path(start) / "checkpoints")[0])
    else:
        run.resume()
    results = [train_step(objective, engine, case.packs(world.rank), world) for _ in range(steps)]
    run.finish(run.saved_step + steps)
    load = torch.zeros(0) if objective.router_load is None else objective.router_load
    return Outcome(gather_weights(objective), engine.state_dict()["optimizer"], load, results)


def exchanges(world: World, recompute: tuple[str, ...]) -> list[tuple[object, ...]]:
    """Every all-to-all of a forward and backward, as this rank meets them: what is sent, and how wide."""
    case = Case("ddp", split=TEXT_RANK, mtp=MTPConfig(2), recompute=recompute, detach=True)
    met: list[tuple[object, ...]] = []
    plain = torch_dist.all_to_all_single

    def noted(out: Tensor, rows: Tensor, *args, **kwargs):
        met.append((rows.dtype, *rows.shape[1:]))
        return plain(out, rows, *args, **kwargs)

    torch_dist.all_to_all_single = noted
    try:
        train(world, case)
    finally:
        torch_dist.all_to_all_single = plain
    return met


def impossible(world: World) -> list[Callable[[], object]]:
    three = Case("ddp", total=5)
    return [
        lambda: engine_of(three, (objective := build_model(three)), objective, world),
        lambda: engine_of(replace(three, experts=3), (objective := build_model(Case())), objective, world),
        lambda: build_engine(
            (toy := Toy()), build_optimizer(toy, OptimConfig()), EngineConfig("ddp", expert_parallel=2), world
        ),
        lambda: generate(world),
    ]


def generate(world: World) -> None:
    model, case = tiny_model(), Case("ddp")
    engine_of(case, model, model, world)
    prompt = Trajectory("prompt", "test")
    prompt.extend([5, 6], trainable=False)
    Generator(model, tiny_vocab()).generate([(prompt, Limits(2))])


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def leave_a_peer(world: World) -> float:
    """Seconds after which a rank whose peer does not come to the same layer says so."""
    impatient, case = replace(world, timeout=1.0), Case("ddp")
    model = build_model(case)
    engine_of(case, model, model, impatient)
    started = time.monotonic()
    if world.rank == 0:
        with pytest.raises(RuntimeError, match="1000ms"):
            model(case.packs(0)[0])
    waited = time.monotonic() - started
    dist.barrier()
    return waited


def average(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average of weights after a step, and the weights while it stands in their place."""
    case = Case("fsdp2", split=TWO if world.size > 1 else WHOLE)
    objective = LanguageModeling(build_model(case), LanguageModelingConfig())
    engine = engine_of(case, objective, objective.model, world)
    kept = WeightAverage(objective.model, AverageConfig(decay=0.5))
    train_step(objective, engine, case.packs(world.rank), world)
    kept(1, {})
    with kept.in_place():
        return kept.state_dict()["average"], gather_weights(objective.model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one rank has saved the checkpoint of a first step."""
    folder = tmp_path_factory.mktemp("experts")
    resume(ALONE, str(folder / "alone"), 1)
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[Seen]:
    return run_ranks(look, 2, str(folder), timeout=300)


def test_checkpoints_know_nothing_of_ranks(seen, folder):
    """One rank's first step, loaded by two that share experts, is the same to the bit; so is what they save, back on
    one rank; and the step in between is the step that one rank takes."""
    loaded, trained = seen[0].continued
    saved = resume(ALONE, str(folder / "alone"), 0)
    for mine, theirs in ((loaded, saved), (trained, resume(ALONE, str(folder / "ranks"), 0))):
        assert set(mine.weights) == set(theirs.weights)
        assert all(torch.equal(mine.weights[name], tensor) for name, tensor in theirs.weights.items())
        for name, entries in theirs.state.items():
            assert all(torch.equal(mine.state[name][key], value) for key, value in entries.items()), name
    # orthogonalising magnifies rounding where singular values are tiny
    compare(trained, resume(ALONE, str(folder / "more"), 1, str(folder / "alone")), atol=2e-4, rtol=1e-3)


def test_ranks_meet_in_the_same_order_whatever_they_compute_again(seen):
    """Two MoE layers and two depths of MTP; one rank has images, the other none. A forward sends counts, tokens and
    results, a backward the gradients of the latter two, and what is computed again is sent again."""
    once, twice = zip(*(rank.exchanges for rank in seen), strict=True)
    assert once[0] == once[1]
    assert twice[0] == twice[1]
    assert len(once[0]) == 4 * (3 + 2)
    assert len(twice[0]) == 4 * (3 + 3 + 2)


def test_what_cannot_be_shared_is_refused(seen):
    for rank in seen:
        experts, ranks, nothing, decoding = rank.refused
        assert experts == "5 experts cannot be shared evenly by 2 ranks"
        assert ranks == "expert_parallel 3: 2 ranks do not divide into groups of 3"
        assert nothing == "expert_parallel 2: Toy has no experts that ranks can share"
        assert "is shared by ranks: generate from a whole copy" in decoding


def test_a_rank_that_is_left_alone_says_so(seen):
    """It does not wait for ever for a peer that went elsewhere: the world's timeout holds in groups of experts."""
    assert 1.0 <= seen[0].left < 20.0


def test_the_average_of_weights_is_that_of_one_rank(seen):
    mean, in_place = seen[0].averaged
    for name, tensor in average(ALONE)[0].items():
        torch.testing.assert_close(mean[name], tensor, atol=2e-6, rtol=1e-4)
        assert torch.equal(in_place[name], mean[name])
