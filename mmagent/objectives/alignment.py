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
from mmagent.objectives.reconstruction import describe_patches, descriptor_values
from mmagent.protocols import VisionEncoder
from mmagent.types import PackedVision, PairedBatch, ParamRole, Ratio, Segments, StepOutput

_CELLS = 2


@dataclass
class AlignmentConfig:
    """``width`` of the common space. ``scale`` and ``bias`` are where the learned temperature and bias start (SigLIP,
    arXiv 2303.15343: 10 and -10); the scale never exceeds ``max_scale``. ``words_weight`` adds a classifier of the
    caption's words over the image's summary (SuperClass, arXiv 2411.03313): it needs no large batch to learn from.
    ``describe_weight`` adds a regression of every patch's own descriptors
    (:class:`mmagent.objectives.reconstruction.MaskedReconstruction`), which keeps patches local: SigLIP2 (arXiv
    2502.14786) adds dense losses to the sigmoid's for the same reason. ``classes`` adds a classifier of that many
    classes over patches, where the batch says what they are; ``classes_weight`` weighs it: it ties words to places, as
    SigLIP2's captioning of regions does."""

    width: int = 768
    scale: float = 10.0
    bias: float = -10.0
    max_scale: float = 100.0
    words_weight: float = 0.0
    describe_weight: float = 0.0
    classes: int = 0
    classes_weight: float = 1.0


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
        self.word_head = Linear(encoder.width, text_tower.config.vocab_size, bias=True) if config.words_weight else None
        values = descriptor_values(_CELLS)
        self.patch_head = Linear(encoder.width, values, bias=True) if config.describe_weight else None
        self.class_head = Linear(encoder.width, config.classes, bias=True) if config.classes else None
        # of shape (1,), for sharded engines have no place for scalars
        self.log_scale = nn.Parameter(torch.tensor([math.log(config.scale)]))
        self.bias = nn.Parameter(torch.tensor([config.bias]))

    @property
    def weights(self) -> Mapping[str, float]:
        words = {"words": self.config.words_weight} if self.word_head is not None else {}
        patches = {"patches": self.config.describe_weight} if self.patch_head is not None else {}
        classes = {"classes": self.config.classes_weight} if self.class_head is not None else {}
        return {"contrastive": 1.0, **words, **patches, **classes}

    def counts(self, batch: PairedBatch) -> dict[str, Tensor]:
        device = batch.text_ids.device
        counts = {"contrastive": torch.tensor(len(batch.keys), device=device)}
        if self.word_head is not None:
            counts["words"] = torch.tensor(sum(n > 1 for n in batch.segments.lengths), device=device)
        if self.patch_head is not None:
            counts["patches"] = torch.tensor(batch.vision.patches.shape[0], device=device)
        if self.class_head is not None:
            counts["classes"] = (self._classes(batch) >= 0).sum()
        return counts

    def _classes(self, batch: PairedBatch) -> Tensor:
        unknown = torch.full((batch.vision.patches.shape[0],), -1, device=batch.text_ids.device)
        return unknown if batch.classes is None else batch.classes

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
        if self.word_head is not None:
            sums["words"] = word_loss(self.word_head(pooled), batch.text_ids, batch.segments)
        if self.patch_head is not None:
            targets = describe_patches(batch.vision, self.encoder.patch_size, self.encoder.merge_size, _CELLS)
            sums["patches"] = (self.patch_head(seen.tokens).float() - targets).square().mean(dim=1).sum()
        with torch.no_grad():
            metrics = self._metrics(images, texts)
        if self.class_head is not None:
            logits, classes = self.class_head(seen.tokens).float(), self._classes(batch)
            sums["classes"] = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum")
            metrics["classes"] = Ratio((logits.argmax(dim=1) == classes).sum(), (classes >= 0).sum())
        return StepOutput(sums, metrics)

    def _metrics(self, images: Tensor, texts: Tensor) -> dict[str, Ratio]:
        """How often an image's own caption is the nearest of its micro-batch on this rank, and the temperature."""
        one = torch.ones((), device=images.device)
        right = (images @ texts.T).argmax(dim=1) == torch.arange(len(images), device=images.device)
        return {
            "top1": Ratio(right.sum(), one * len(images)),
            "scale": Ratio(self.log_scale.detach().exp().squeeze(), one),
            "bias": Ratio(self.bias.detach().squeeze(), one),
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
        if self.word_head is not None:
            roles |= collect_roles(self.word_head, "projection", "word_head.")
        if self.patch_head is not None:
            roles |= collect_roles(self.patch_head, "projection", "patch_head.")
        if self.class_head is not None:
            roles |= collect_roles(self.class_head, "projection", "class_head.")
        return roles | {name: ParamRole("projection", matrix=False, decay=False) for name in ("log_scale", "bias")}

    def blocks(self) -> Iterable[nn.Module]:
        return (*trainable_blocks(self.encoder), *self.text_tower.blocks())

    def leaves(self) -> Iterable[nn.Module]:
        return ()
