"""What the ablation of discrete diffusion trains, and how it judges: on small texts, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn

from mmagent import dist
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.schedule import ScheduleConfig, schedule
from mmagent.generation.block_decoding import make_generator
from mmagent.generation.generator import GeneratorConfig
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.objectives.likelihood import likelihood_bound
from mmagent.objectives.noise import NoiseConfig, NoiseIds
from mmagent.train.step import train_step
from mmagent.trajectories import Limits, Trajectory
from mmagent.types import PackedBatch
from mmagent.vocab import Vocab
from recipes.diffusion_tasks import Asked, alike, exact, packs, prompt

BLOCK, PACK, MOST = 8, 512, 96
"""Tokens that are said together, of a pack, and of an answer."""
RATE = ScheduleConfig("wsd", warmup=10, floor=0.0, decay=0.4)
EDITS = 0.2
"""Of the steps, the last ones, have edits."""
JUDGED = 8
"""Packs of held-out questions that likelihoods are taken of."""


@dataclass
class Bench:
    """What all arms of a seed share."""

    vocab: Vocab
    seed: int

    def packs(self) -> Iterator[PackedBatch]:
        return packs("train", self.seed, self.vocab, PACK)

    def asking(self, asked: Sequence[Asked], temperature: float = 1.0) -> tuple[list[Trajectory], Limits]:
        """What a generator is asked, and how."""
        limits = Limits(MOST, temperature, stop_ids=self.vocab.stop_ids, seed=self.seed)
        return [prompt(each, self.vocab) for each in asked], limits

    def ids(self, model: AgentModel) -> NoiseIds:
        return NoiseIds.of_vocab(self.vocab, model.config.vocab_size)


def fit(objective: nn.Module, model: AgentModel, batches: Sequence, lr: float, rate: ScheduleConfig = RATE) -> None:
    """A step a batch. There are no pictures, and a model that says blocks has no use for its MTP head."""
    world = dist.init()
    model.train().freeze(["encoder", "projector", *(["mtp"] if model.config.denoises else [])])
    engine = build_engine(objective, build_optimizer(model, OptimConfig(lr=lr)), EngineConfig(), world)
    for step, batch in enumerate(batches):
        train_step(objective, engine, [batch], world, schedule(step, len(batches), rate))
    model.eval()


def next_token(bench: Bench, model: AgentModel, budget: int, lr: float) -> None:
    """Of ``budget`` tokens that go through the decoder."""
    fit(
        LanguageModeling(model, LanguageModelingConfig()),
        model,
        _within(bench, budget, lambda batch: batch.num_tokens),
        lr,
    )


def denoise(bench: Bench, model: AgentModel, budget: int, lr: float, edits: float = EDITS) -> None:
    """The same ``budget``, in which copies of answers count as what they are: tokens that go through the decoder."""
    model.config.denoises = BLOCK
    config = BlockDiffusionConfig(NoiseConfig(BLOCK))
    probe = BlockDiffusion(model, config, bench.ids(model))

    def cost(batch: PackedBatch) -> float:
        return batch.num_tokens + (1 + edits) * float(probe.counts(batch)["mask"])

    batches = _within(bench, budget, cost)
    after = round(len(batches) * (1 - edits)) if edits else -1
    fit(BlockDiffusion(model, replace(config, edits_after=after), bench.ids(model)), model, batches, lr)


def _within(bench: Bench, budget: int, cost: Callable[[PackedBatch], float]) -> list[PackedBatch]:
    """Batches that cost ``budget`` together."""
    out, spent = [], 0.0
    for batch in bench.packs():
        spent += cost(batch)
        if out and spent > budget:
            break
        out.append(batch)
    return out


def judged(
    bench: Bench, model: AgentModel, asked: Sequence[Asked], config: GeneratorConfig | None = None
) -> dict[str, float]:
    """Greedy answers: ``exact`` and ``alike`` by kind, tokens a forward and a second, and nats a token of the right
    answer: a bound where the model says blocks."""
    generator = make_generator(model.eval(), bench.vocab, config)
    prompts, limits = bench.asking(asked, 0.0)
    started = time.perf_counter()
    done = generator.generate([(each, limits) for each in prompts])
    seconds, tokens = time.perf_counter() - started, sum(len(c.ids) for c in done)
    found = {"tokens/s": tokens / seconds, "tokens/forward": tokens / max(generator.counts["looks"] or tokens, 1)}
    for name, measure in (("exact", exact), ("alike", alike)):
        values = [measure(a, c, bench.vocab) for a, c in zip(asked, done, strict=True)]
        found[name] = sum(values) / len(values)
        for kind in dict.fromkeys(a.kind for a in asked):
            own = [value for a, value in zip(asked, values, strict=True) if a.kind == kind]
            found[f"{name}, {kind}"] = sum(own) / len(own)
    return found | {"nats/token": nats(bench, model, JUDGED)}


@torch.no_grad()
def nats(bench: Bench, model: AgentModel, batches: int) -> float:
    """Of right answers and their end, on held-out questions."""
    total, tokens = 0.0, 0
    for batch in islice(packs("test", bench.seed, bench.vocab, PACK), batches):
        tokens += int((batch.labels >= 0).sum())
        if model.config.denoises:
            total += float(likelihood_bound(model, batch, bench.ids(model), NoiseConfig(BLOCK))[0].sum())
        else:
            total += float(LanguageModeling(model, LanguageModelingConfig())(batch).sums["lm"])
    return total / tokens
