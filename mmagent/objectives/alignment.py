"""Stage 2: images and captions in one space, by the sigmoid loss over the pairs of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.losses.contrastive import sigmoid_loss, word_loss
from mmagent.models.layers import Linear, collect_roles, encoder_roles, trainable_blocks
from mmagent.models.text_tower import TextTower
from mmagent.protocols import VisionEncoder
from mmagent.types import PackedVision, PairedBatch, ParamRole, Ratio, Segments, StepOutput


@dataclass
class AlignmentConfig:
    """``width`` of the common space. ``scale`` and ``bias`` are where the learned temperature and bias start (SigLIP,
    arXiv 2303.15343: 10 and -10); the scale never exceeds ``max_scale``. ``words_weight`` adds a classifier of the
    caption's words over the image's summary (SuperClass, arXiv 2411.03313): it needs no large batch to learn from.

    Two more, over patches, tie words to places, as the grounding that SigLIP2 (arXiv 2502.14786) adds to the sigmoid's
    loss does. ``classes`` adds a classifier of what each patch shows, of that many classes; ``places`` one of where the
    middle of that thing lies, in so many steps across and down the image. Both count where the batch knows."""

    width: int = 768
    scale: float = 10.0
    bias: float = -10.0
    max_scale: float = 100.0
    words_weight: float = 0.0
    classes: int = 0
    classes_weight: float = 1.0
    places: int = 0
    places_weight: float = 1.0


class Alignment(nn.Module):
    """Implements :class:`mmagent.protocols.Objective` over :class:`~mmagent.types.PairedBatch`.

    The loss is summed over pairs and divided by the number of images, as SigLIP does. Negatives are all other texts of
    the micro-batch on all ranks: every rank must bring the same number of micro-batches.
    """

    def __init__(self, encoder: nn.Module, text_tower: TextTower, config: AlignmentConfig):
        super().__init__()
        assert isinstance(encoder, VisionEncoder)
        self.encoder, self.text_tower, self.config = encoder, text_tower, config
        self.image_head = Linear(encoder.width, config.width)
        self.text_head = Linear(text_tower.width, config.width)
        outputs = {
            "words": text_tower.config.vocab_size if config.words_weight else 0,
            "classes": config.classes,
            "places": 2 * config.places,
        }
        heads = {name: Linear(encoder.width, values, bias=True) for name, values in outputs.items() if values}
        self.heads = nn.ModuleDict(heads)
        # of shape (1,), for sharded engines have no place for scalars
        self.log_scale = nn.Parameter(torch.tensor([math.log(config.scale)]))
        self.bias = nn.Parameter(torch.tensor([config.bias]))

    @property
    def weights(self) -> Mapping[str, float]:
        config = self.config
        known = {"words": config.words_weight, "classes": config.classes_weight, "places": config.places_weight}
        return {"contrastive": 1.0, **{name: known[name] for name in self.heads}}

    def counts(self, batch: PairedBatch) -> dict[str, Tensor]:
        device = batch.text_ids.device
        counts = {"contrastive": torch.tensor(len(batch.keys), device=device)}
        counts["words"] = torch.tensor(sum(n > 1 for n in batch.segments.lengths), device=device)
        counts["classes"] = (self._classes(batch) >= 0).sum()
        counts["places"] = (self._places(batch) >= 0).sum()
        return {name: counts[name] for name in self.weights}

    def _classes(self, batch: PairedBatch) -> Tensor:
        unknown = torch.full((batch.vision.patches.shape[0],), -1, device=batch.text_ids.device)
        return unknown if batch.classes is None else batch.classes

    def _places(self, batch: PairedBatch) -> Tensor:
        """``(P, 2)``: which of ``config.places`` steps, -1 for nowhere."""
        if batch.places is None:
            return torch.full((batch.vision.patches.shape[0], 2), -1, device=batch.text_ids.device)
        steps = (batch.places * self.config.places).nan_to_num(-1.0).floor().long()
        return steps.clamp(-1, self.config.places - 1)

    def embed_images(self, vision: PackedVision) -> Tensor:
        """``(I, width)`` float32 of unit length."""
        return self._project(self.encoder(vision).pooled)

    def _project(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.image_head(pooled).float(), dim=-1)

    def embed_texts(self, text_ids: Tensor, segments: Segments) -> Tensor:
        """``(N, width)`` float32 of unit length."""
        return F.normalize(self.text_head(self.text_tower(text_ids, segments)).float(), dim=-1)

    def forward(self, batch: PairedBatch) -> StepOutput:
        seen = self.encoder(batch.vision)
        pooled = seen.pooled
        images, texts = self._project(pooled), self.embed_texts(batch.text_ids, batch.segments)
        with torch.autocast(images.device.type, enabled=False):
            sums = {"contrastive": sigmoid_loss(images, texts, self.log_scale, self.bias)}
        with torch.no_grad():
            metrics = self._metrics(images, texts)
        for name, head in self.heads.items():
            if name == "words":
                sums[name] = word_loss(head(pooled), batch.text_ids, batch.segments)
                continue
            known = self._classes(batch) if name == "classes" else self._places(batch).flatten()
            logits = head(seen.tokens).float()
            logits = logits if name == "classes" else logits.view(-1, self.config.places)
            sums[name] = F.cross_entropy(logits, known, ignore_index=-1, reduction="sum")
            metrics[name] = Ratio((logits.argmax(dim=1) == known).sum(), (known >= 0).sum())
        return StepOutput(sums, metrics)

    def _metrics(self, images: Tensor, texts: Tensor) -> dict[str, Ratio]:
        """How often an image's own caption is the nearest of its micro-batch on this rank, and the temperature."""
        one = torch.ones((), device=images.device)
        right = (images @ texts.T).argmax(dim=1) == torch.arange(len(images), device=images.device)
        return {
            "top1": Ratio(right.sum(), one * len(images)),
            "scale": Ratio(self.log_scale.detach().exp().squeeze(), one),
            "bias": Ratio(self.bias.detach().squeeze().clone(), one),  # no view: sharded engines free gathered weights
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperature in bounds."""
        self.log_scale.clamp_(max=math.log(self.config.max_scale))

    def roles(self) -> Mapping[str, ParamRole]:
        """Roles "encoder", "text" and "projection"; temperature and bias go with the last."""
        roles = encoder_roles(self.encoder, "encoder.")
        roles |= {f"text_tower.{name}": role for name, role in self.text_tower.roles().items()}
        roles |= collect_roles(self.image_head, "projection", "image_head.")
        roles |= collect_roles(self.text_head, "projection", "text_head.")
        roles |= collect_roles(self.heads, "projection", "heads.")
        return roles | {name: ParamRole("projection", matrix=False, decay=False) for name in ("log_scale", "bias")}

    def blocks(self) -> Iterable[nn.Module]:
        return (*trainable_blocks(self.encoder), *self.text_tower.blocks())

    def leaves(self) -> Iterable[nn.Module]:
        return ()
