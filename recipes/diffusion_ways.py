"""Learning from a model's own ways, on the small texts of :mod:`recipes.diffusion_tasks`: which order, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from mmagent import dist
from mmagent.agent.unmasking import Way, best, explore, speed_advantages, unmasking_batches
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.generation.block_decoding import BlockConfig, BlockGenerator
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.block_policy import BlockPolicyConfig, BlockPolicyGradient
from mmagent.objectives.noise import NoiseConfig
from mmagent.packing import Size
from mmagent.train.step import train_step
from mmagent.trajectories import Completion, Trajectory, UnmaskingBatch
from recipes.diffusion_arms import BLOCK, PACK, Bench, fit
from recipes.diffusion_tasks import Asked, exact, questions

WAYS, ROUND, OFTEN = 8, 16, 4
"""Ways that are tried for each question; questions of a round of reinforcement; how often a way is seen at most."""


def tried(bench: Bench, model: AgentModel, budget: int) -> list[list[Way]]:
    """Of as many questions as ``budget`` tokens are worth, :data:`WAYS` random orders of each, those that came to the
    right answer; questions without one are left out."""
    generator = BlockGenerator(model.eval(), bench.vocab, BlockConfig(order="random"))
    asked = list(islice(questions("train", bench.seed + 1), max(budget // 800, 4)))
    groups = explore(generator, *bench.asking(asked), WAYS, judge(bench, asked))
    right = ([way for way in group if way.score > 0] for group in groups)
    return [group for group in right if group]


def follow(bench: Bench, model: AgentModel, groups: Sequence[Sequence[Way]], budget: int, lr: float, keep: str) -> None:
    """Learn from the model's own right answers: of the orders of each question in ``groups`` the "best", or "any" one.
    They are seen as often as ``budget`` tokens allow, :data:`OFTEN` at most; without any, nothing is learnt."""
    if not groups:
        return
    ways = best(groups, 1) if keep == "best" else [group[0] for group in groups]
    objective = BlockDiffusion(model, BlockDiffusionConfig(NoiseConfig(BLOCK)), bench.ids(model))
    made, batches, spent = _packs(bench, ways), [], 0.0
    while spent < budget and len(batches) < OFTEN * len(made):
        batches.append(made[len(batches) % len(made)])
        spent += batches[-1].num_tokens + float(objective.counts(batches[-1])["mask"])
    fit(objective, model, batches, lr)


def quicken(bench: Bench, model: AgentModel, rounds: int, lr: float, weight: float = 0.5) -> None:
    """On policy: answer, verify, and take the ways of right answers whose states lie far apart more often."""
    objective = BlockPolicyGradient(model, BlockPolicyConfig(NoiseConfig(BLOCK)), bench.ids(model))
    world = dist.init()
    model.train().freeze(["encoder", "projector", "mtp"])
    optimizer = build_optimizer(model, OptimConfig(lr=lr))
    engine, source = build_engine(objective, optimizer, EngineConfig(), world), questions("train", bench.seed + 2)
    for number in range(rounds):
        asked = list(islice(source, ROUND))
        prompts, limits = bench.asking(asked)
        limits = replace(limits, seed=bench.seed + number * ROUND * WAYS)
        groups = explore(BlockGenerator(model, bench.vocab), prompts, limits, WAYS, judge(bench, asked))
        if told := speed_advantages(groups, BLOCK, weight):
            ways, worth = zip(*told, strict=True)
            train_step(objective, engine, _packs(bench, ways, worth), world)
    model.eval()


def judge(bench: Bench, asked: Sequence[Asked]) -> Callable[[Trajectory, Completion], float]:
    """The verifier of these questions."""
    known = {each.key: each for each in asked}
    return lambda prompt, completion: exact(known[prompt.key], completion, bench.vocab)


def _packs(bench: Bench, ways: Sequence[Way], worth: Sequence[float] | None = None) -> list[UnmaskingBatch]:
    return unmasking_batches(ways, Size(PACK, 1), image_id=bench.vocab.image_id, merge_size=2, advantages=worth)
