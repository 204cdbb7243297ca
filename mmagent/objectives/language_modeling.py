"""Pretraining and supervised fine-tuning: next token, multi-token prediction, router balance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmagent.losses.language import LanguageLoss, by_source, draft_metrics, language_counts, language_loss
from mmagent.models.agent_model import AgentModel
from mmagent.models.flops import model_flops
from mmagent.objectives.routed import RoutedObjective
from mmagent.types import IGNORE, PackedBatch, Ratio, StepOutput


@dataclass
class LanguageModelingConfig:
    """Weights of the terms beside next-token loss, and how the router is kept in balance."""

    mtp_weight: float = 0.3  # divided by the number of depths; GLM-4.5 lowers it to 0.1 late in pretraining
    detach_mtp: bool = False  # the MTP loss then reaches MTP parameters alone
    balance_weight: float = 1e-4  # of the sequence-wise auxiliary loss
    bias_rate: float = 1e-3  # step of the loss-free router bias; 0 leaves it alone
    chunk: int = 0  # rows whose logits exist at one time; 0 chooses by the vocabulary


class LanguageModeling(RoutedObjective):
    """Implements :class:`mmagent.protocols.Objective` over :class:`~mmagent.types.PackedBatch`."""

    def __init__(self, model: AgentModel, config: LanguageModelingConfig):
        super().__init__(model, config.bias_rate)
        self.config = config
        self.depths = model.config.mtp.depths

    @property
    def weights(self) -> Mapping[str, float]:
        weights = {"lm": 1.0, "balance": self.config.balance_weight}
        return weights | {f"mtp_{k}": self.config.mtp_weight / self.depths for k in range(1, self.depths + 1)}

    def share_packs(self, group: ProcessGroup) -> None:
        """All ranks of ``group`` are given the same packs, and each computes and counts its slice of them."""
        self.model.share_packs(group)

    def prepare(self, micro_batches: Sequence[PackedBatch], forward: Callable[[PackedBatch], StepOutput]) -> None:
        """Let the model's ranks agree who encodes which images, where they trade them."""
        self.model.prepare(micro_batches)

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        self.model.context.require_same(batch)
        rows = self.model.context.rows(batch.segments.total)
        next_token, *mtp = language_counts(batch.labels, batch.segments, self.depths, rows)
        begun = sum(rows.start <= at < rows.stop for at in batch.segments.offsets()[: len(batch.keys)])
        counts = {"lm": next_token, "balance": torch.tensor(begun, device=batch.labels.device)}
        return counts | {f"mtp_{k}": count for k, count in enumerate(mtp, start=1)}

    def flops(self, batch: PackedBatch) -> float:
        """Useful operations of a step over ``batch``; see :mod:`mmagent.models.flops`."""
        return model_flops(self.model, batch)

    def forward(self, batch: PackedBatch) -> StepOutput:
        output = self.model(batch, detach_mtp=self.config.detach_mtp)
        loss = language_loss(
            output,
            batch.labels,
            batch.segments,
            self.model.head_weight,
            detach_mtp=self.config.detach_mtp,
            chunk=self.config.chunk,
            rows=self.model.context.rows(batch.segments.total),
        )
        self.gather_load(output.router_load)
        sums = {"lm": loss.next_token.total, "balance": output.balance}
        sums |= {f"mtp_{k}": depth.total for k, depth in enumerate(loss.mtp, start=1)}
        with torch.no_grad():
            return StepOutput(sums, self._metrics(batch, loss))

    def _metrics(self, batch: PackedBatch, loss: LanguageLoss) -> dict[str, Ratio]:
        segments, shared = batch.segments, self.model.context
        rows = shared.rows(segments.total)
        one = torch.ones((), device=batch.labels.device)
        tokens = min(rows.stop, batch.num_tokens) - min(rows.start, batch.num_tokens)
        visual = shared.within(batch.visual_slots, rows).shape[0]
        metrics = {"visual_share": Ratio(one * visual, one * tokens)}
        if self.model.images is not None:
            metrics |= self.model.images.metrics
        own = shared.whole(loss.next_token.predictions, segments.total)
        metrics |= draft_metrics(own, loss.mtp, batch.visual_slots, segments, rows)
        counted = loss.next_token.predictions != IGNORE
        for source, pair in by_source(loss.next_token.losses, counted, segments, batch.sources, rows).items():
            metrics[f"loss_by_source/{source}"] = Ratio(*pair.unbind())
        return metrics
