"""Blocks said at once against token by token, with and without multi-token prediction, at the quality that each has.

Two agents that went on from one with as many tokens through the decoder, on small pages and functions with one right
answer each (`recipes.diffusion_tasks`). ``--agent FOLDER`` is what `python -m recipes.ablate_diffusion --output FOLDER`
leaves (its seed 0); without it both are trained here, for minutes, and are worse. Prompts are held out, answers greedy.

- `N requests, THRESHOLD`: tokens of right answers a second, whatever is answered, so both sides have the same work. The
  peer is the generator without drafts (`one by one`), and with one draft of the MTP head (`drafts`).
- `tokens a forward`: what a sequence says with each forward of the decoder; what it said behind the end of its answer
  counts for nothing.
- `exact`: the share of answers that are right, in percent; a ratio of 1 is what equal quality means.

Our caches are emptied before each turn.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from mmagent.generation.block_decoding import BlockConfig, make_generator
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.models.agent_model import AgentModel
from mmagent.trajectories import Completion
from recipes.ablate_diffusion import Ablation
from recipes.diffusion_arms import Bench
from recipes.diffusion_tasks import Asked, exact, questions, told
from tools.benchmarks.row import Row, Settings, throughputs

TAKES_AGENT = True
THRESHOLDS = (0.9, 0.7)
BATCHES = (1, 8, 32)
TRAINED = 300_000
"""Tokens of each training where there is no agent."""


def rows(settings: Settings) -> Iterator[Row]:
    if settings.agent is not None:
        yield from _rows(settings, Ablation(settings.agent, 0, TRAINED, 0, 0))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield from _rows(settings, Ablation(Path(folder), 0, 3000 if settings.quick else TRAINED, 0, 0))


@dataclass
class Side:
    """One generator, asked the same again and again."""

    name: str
    generator: Generator
    bench: Bench

    def answers(self, asked: list[Asked]) -> list[Completion]:
        self.generator.forget()
        prompts, limits = self.bench.asking(asked, 0.0)
        return self.generator.generate([(each, limits) for each in prompts])

    def exact(self, asked: list[Asked]) -> float:
        done = self.answers(asked)
        return sum(exact(a, c, self.bench.vocab) for a, c in zip(asked, done, strict=True)) / len(asked)

    def tokens_a_forward(self, asked: list[Asked]) -> float:
        """Of the decoder. The first token of a side that says one by one comes of its prompt's forward."""
        looks, accepted = self.generator.counts["looks"], self._accepted()
        tokens = sum(len(c.ids) for c in self.answers(asked))
        looks = self.generator.counts["looks"] - looks
        return tokens / (looks or tokens - (self._accepted() - accepted))

    def _accepted(self) -> int:
        drafter = self.generator.drafter
        return 0 if drafter is None else sum(n for key, n in drafter.stats.items() if key[-1] == "accepted")


def _rows(settings: Settings, ablation: Ablation) -> Iterator[Row]:
    plain, blocks = ablation.agent("next token"), ablation.agent("edits")
    peers = [_side(ablation, "one by one", plain, GeneratorConfig())]
    peers.append(_side(ablation, "drafts", plain, GeneratorConfig(speculate=1)))
    counts = (4,) if settings.quick else BATCHES
    asked = list(islice(questions("test", 0), max(counts)))
    for threshold in THRESHOLDS[:1] if settings.quick else THRESHOLDS:
        ours = _side(ablation, "blocks", blocks, BlockConfig(threshold=threshold))
        for count in counts:
            some = asked[:count]
            work = sum(len(told(each, ablation.bench.vocab)) for each in some)
            sides = {peer.name: partial(peer.answers, some) for peer in peers}
            name = f"{count} requests, {threshold}"
            yield from throughputs(name, partial(ours.answers, some), sides, work, "tokens/s", settings)
        own, right = ours.tokens_a_forward(asked), ours.exact(asked)
        for peer in peers:
            theirs, other = peer.tokens_a_forward(asked), peer.exact(asked)
            yield Row(f"tokens a forward, {threshold}", own, theirs, peer.name, own / theirs, "tokens", 0.0)
            ratio = right / other if other else 1.0 if not right else float("inf")
            yield Row(f"exact, {threshold}", 100 * right, 100 * other, peer.name, ratio, "%", 0.0)


def _side(ablation: Ablation, name: str, model: AgentModel, config: GeneratorConfig) -> Side:
    return Side(name, make_generator(model, ablation.bench.vocab, config), ablation.bench)
