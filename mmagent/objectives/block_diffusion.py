"""Discrete diffusion over the same decoder and the same packs: responses are noised, prompts and pictures never.

First masks alone, then masks and edits (Seed Diffusion, arXiv 2508.02193). By blocks every copy of a response is learnt
in one pass behind its clean past (BD3-LM, arXiv 2503.09573); with ``noise.block=0`` whole documents are denoised at
once (LLaDA, arXiv 2502.09992). A place is asked for its own token: nothing is shifted. The model may be one that learnt
the next token: by blocks it reads prompts as it did. Its MTP head does not take part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmagent.losses.diffusion import DiffusionLoss, diffusion_loss
from mmagent.losses.language import by_source
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.noise import Copy, Draws, NoiseConfig, NoiseIds, Response, edited, generator, masked, revealed
from mmagent.objectives.noised import Noised, noised, responses
from mmagent.objectives.routed import RoutedObjective
from mmagent.trajectories import UnmaskingBatch
from mmagent.types import IGNORE, PackedBatch, Ratio, StepOutput

Batch = PackedBatch | UnmaskingBatch


@dataclass
class BlockDiffusionConfig:
    """``copies`` of every response are masked, each with noise of its own, in one forward. From step ``edits_after`` on
    an edited copy joins them, with ``edit_weight``; negative: never. ``balance_weight`` and ``bias_rate`` as in
    :class:`~mmagent.objectives.language_modeling.LanguageModelingConfig`; ``chunk``: rows whose logits exist at one
    time, 0 chooses."""

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    copies: int = 1
    edits_after: int = -1
    edit_weight: float = 1.0
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"diffusion: {self.copies} copies of a response leave nothing to learn")


class BlockDiffusion(RoutedObjective):
    """Implements :class:`mmagent.protocols.Objective` over :class:`~mmagent.types.PackedBatch`, and over
    :class:`~mmagent.trajectories.UnmaskingBatch`: then the states are those of known ways to the responses.

    ``draws`` counts steps, and is a part of a run's state: with it a run that goes on draws the same noise. In
    evaluation mode noise is the same at every call, so that losses on held-out data can be compared."""

    def __init__(self, model: AgentModel, config: BlockDiffusionConfig, ids: NoiseIds):
        super().__init__(model, config.bias_rate)
        self.config, self.ids, self.draws = config, ids, Draws()

    @property
    def terms(self) -> tuple[str, ...]:
        return ("mask",) if self.config.edits_after < 0 else ("mask", "edit")

    @property
    def weights(self) -> Mapping[str, float]:
        own = {"mask": 1.0, "edit": self.config.edit_weight}
        return {term: own[term] for term in self.terms} | {"balance": self.config.balance_weight}

    @property
    def edits(self) -> bool:
        """Whether edited copies take part now."""
        return 0 <= self.config.edits_after <= self.draws.step

    def prepare(self, micro_batches: Sequence[Batch], forward: Callable[[Batch], StepOutput]) -> None:
        """Let the model's ranks agree who encodes which images, where they trade them."""
        self.model.prepare([_stream(batch) for batch in micro_batches])

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Places of responses, masked or not: what noise does to them changes no count."""
        stream = _stream(batch)
        places = sum(len(response.ids) for response in self._said(stream))
        documents = len(stream.keys) * (1 if self.config.noise.block else self.config.copies + self.edits)
        counts = {"mask": places * self.config.copies, "edit": places * self.edits, "balance": documents}
        return {name: torch.tensor(counts[name], device=stream.labels.device) for name in self.weights}

    def forward(self, batch: Batch) -> StepOutput:
        stream = _stream(batch)
        said = self._said(stream)
        noisy = noised(stream, said, self._corrupt(batch), self.terms, self.config.noise.block)
        output = self.model(noisy.stream, mtp=False, attend=noisy.attend)
        targets, weight = noisy.stream.labels, self.model.head_weight
        loss = diffusion_loss(output.hidden, weight, targets, noisy.weights, self.ids.barred, self.config.chunk)
        self.gather_load(output.router_load)
        with torch.no_grad():
            metrics = self._metrics(noisy, said, stream.sources, loss)
        return StepOutput({**loss.sums, "balance": output.balance}, metrics)

    def after_step(self) -> dict[str, float]:
        """The routers' step, and other noise from now on."""
        self.draws.step += 1
        return super().after_step()

    def _said(self, stream: PackedBatch) -> list[Response]:
        noise = self.config.noise
        return responses(stream, noise.block, noise.fill, self.ids.fill, noise.span, self.ids.ends)

    def _corrupt(self, batch: Batch) -> Callable[[Response], list[Copy]]:
        noise, draw = self.config.noise, self.draws.step if self.training else -1
        order = batch.order.cpu().numpy() if isinstance(batch, UnmaskingBatch) else None

        def mask(response: Response, rng: np.random.Generator) -> Copy:
            if order is None:
                return masked(response, self.ids, noise.least, rng)
            return revealed(response, self.ids, order[response.at], rng)

        def corrupt(response: Response) -> list[Copy]:
            key = response.key
            copies = [mask(response, generator(noise.seed, key, f"mask {n}", draw)) for n in range(self.config.copies)]
            if self.edits:
                copies.append(edited(response, self.ids, noise.edits, generator(noise.seed, key, "edit", draw)))
            return copies

        return corrupt

    def _metrics(
        self, noisy: Noised, said: Sequence[Response], sources: Sequence[str], loss: DiffusionLoss
    ) -> dict[str, Ratio]:
        """The bound by source, in nats a place, and over masked places alone how far off a guess is."""
        stream, weights = noisy.stream, noisy.weights["mask"]
        hidden = (weights != 0) & (stream.labels != IGNORE)
        places = dict.fromkeys(sources, 0)
        for response, source in zip(said, sources, strict=True):
            places[source] += len(response.ids) * self.config.copies
        one = torch.ones((), device=weights.device)
        metrics = {
            "masked_share": Ratio(hidden.sum().float(), one * sum(places.values())),
            "masked_nll": Ratio((loss.nll * hidden).sum(), hidden.sum().float()),
            "masked_entropy": Ratio((loss.entropy * hidden).sum(), hidden.sum().float()),
        }
        bounds = by_source(loss.nll * weights, hidden, stream.segments, stream.sources)
        for source, pair in bounds.items():
            metrics[f"loss_by_source/{source}"] = Ratio(pair[0], one * places[source])
        if self.model.images is not None:
            metrics |= self.model.images.metrics
        return metrics


def _stream(batch: Batch) -> PackedBatch:
    return batch.stream if isinstance(batch, UnmaskingBatch) else batch
