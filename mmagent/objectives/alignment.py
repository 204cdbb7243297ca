"""Stage 2: images and captions in one space, by the sigmoid loss over the pairs of all ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.losses.contrastive import prescribed, sigmoid_gradients, sigmoid_loss
from mmagent.losses.words import Rarity, word_loss
from mmagent.models.flops import EncoderCost, head_flops, text_flops
from mmagent.models.layers import Linear, collect_roles, encoder_roles, trainable_blocks
from mmagent.models.temperature import Temperature
from mmagent.models.text_tower import TextTower
from mmagent.protocols import VisionEncoder
from mmagent.types import PackedVision, PairedBatch, ParamRole, Ratio, Segments, StepOutput


@dataclass
class AlignmentConfig:
    """``width`` of the common space. ``scale`` and ``bias`` are where the learned temperature and bias start (SigLIP,
    arXiv 2303.15343: 10 and -10); the scale never exceeds ``max_scale``.

    ``negatives`` of an image are all other texts of the ``step``, or those of its ``microbatch`` on all ranks. The
    first is what a large batch is for: it costs a second forward of the towers wherever a step has several
    micro-batches, and the memory of one of them (gradient caching, arXiv 2101.06983).

    ``words_weight`` adds a classifier of the caption's words over the image's summary (SuperClass, arXiv 2411.03313):
    it needs no large batch to learn from. With ``words_rarity`` rare words weigh more in it. ``contrastive_weight`` 0
    leaves it alone with the encoder: no text tower, no common space.

    Two more, over patches, tie words to places, as the grounding that SigLIP2 (arXiv 2502.14786) adds to the sigmoid's
    loss does. ``classes`` adds a classifier of what each patch shows, of that many classes; ``places`` one of where the
    middle of that thing lies, in so many steps across and down the image. Both count where the batch knows."""

    width: int = 768
    scale: float = 10.0
    bias: float = -10.0
    max_scale: float = 100.0
    negatives: str = "step"
    contrastive_weight: float = 1.0
    words_weight: float = 0.0
    words_rarity: bool = False
    classes: int = 0
    classes_weight: float = 1.0
    places: int = 0
    places_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.negatives not in ("step", "microbatch"):
            raise ValueError(f"negatives {self.negatives!r} is neither step nor microbatch")
        if self.words_rarity and not self.words_weight:
            raise ValueError("words_rarity weighs the words of a classifier that words_weight 0 leaves out")
        if not (self.contrastive_weight or self.words_weight or self.classes or self.places):
            raise ValueError("contrastive_weight 0 and no words_weight, classes or places: nothing would be learned")


class _Seen(NamedTuple):
    """What the first pass keeps of one micro-batch: embeddings ``(I, E)``, temperature and bias as the forward sees
    them, which under FSDP2 nothing else does."""

    keys: tuple[str, ...]
    images: Tensor
    texts: Tensor
    log_scale: Tensor
    bias: Tensor


class _Share(NamedTuple):
    """One micro-batch's part of the loss of a whole step: its value, which images found their text, and the gradients
    by the four tensors that it comes from."""

    keys: tuple[str, ...]
    loss: Tensor
    found: Tensor
    gradients: tuple[Tensor, ...]


class Alignment(nn.Module):
    """Implements :class:`mmagent.protocols.Objective` and :class:`mmagent.protocols.Prepared` over
    :class:`~mmagent.types.PairedBatch`.

    The contrastive loss is summed over pairs and divided by the number of images, as SigLIP does. Every rank must bring
    the same number of micro-batches, of as many images as it likes, even none. Where the weight of that loss is 0, only
    the vocabulary of ``text_tower`` counts: the tower is left out.
    """

    def __init__(self, encoder: nn.Module, text_tower: TextTower, config: AlignmentConfig):
        super().__init__()
        assert isinstance(encoder, VisionEncoder)
        self.encoder, self.config = encoder, config
        if config.contrastive_weight:
            self.text_tower = text_tower
            self.image_head = Linear(encoder.width, config.width)
            self.text_head = Linear(text_tower.width, config.width)
            self.temperature = Temperature(config.scale, config.bias)
        outputs = {
            "words": text_tower.config.vocab_size if config.words_weight else 0,
            "classes": config.classes,
            "places": 2 * config.places,
        }
        heads = {name: Linear(encoder.width, values, bias=True) for name, values in outputs.items() if values}
        self.heads = nn.ModuleDict(heads)
        self.rarity = Rarity(outputs["words"]) if config.words_rarity else None
        self._first_pass: list[_Seen] | None = None
        self._shares: deque[_Share] = deque()

    @property
    def weights(self) -> Mapping[str, float]:
        config = self.config
        heads = {"words": config.words_weight, "classes": config.classes_weight, "places": config.places_weight}
        contrastive = {"contrastive": config.contrastive_weight} if config.contrastive_weight else {}
        return {**contrastive, **{name: heads[name] for name in self.heads}}

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

    def prepare(self, micro_batches: Sequence[PairedBatch], forward: Callable[[Any], StepOutput]) -> None:
        """The first of two passes, where the loss spans several micro-batches: embed them all without a graph, and
        find the gradient of the loss of the whole step by every embedding. The second pass, a plain forward of every
        micro-batch in the same order, then hands each its own. Random numbers that torch draws are the same in both.
        """
        self._shares.clear()
        if len(micro_batches) == 1 or self.config.negatives != "step" or not self.config.contrastive_weight:
            return
        device = next(self.parameters()).device
        self._first_pass = seen = []
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                for batch in micro_batches:
                    forward(batch)
        finally:
            self._first_pass = None
        images, texts = torch.cat([s.images for s in seen]), torch.cat([s.texts for s in seen])
        whole = sigmoid_gradients(images, texts, seen[0].log_scale, seen[0].bias)
        sizes = [len(s.images) for s in seen]
        rows = zip(*(x.split(sizes) for x in (whole.losses, whole.found, whole.images, whole.texts)), strict=True)
        equal = (whole.log_scale / len(seen), whole.bias / len(seen))  # every pass must reach every parameter
        for part, (losses, found, by_images, by_texts) in zip(seen, rows, strict=True):
            self._shares.append(_Share(part.keys, losses.sum(), found, (by_images, by_texts, *equal)))

    def flops(self, batch: PairedBatch) -> float:
        """Useful operations of a step over ``batch``, the comparison of all pairs apart; see
        :mod:`mmagent.models.flops`."""
        images = len(batch.keys)
        total = EncoderCost.of(self.encoder).training(batch.vision.segments.lengths)
        if self.config.contrastive_weight:
            total += text_flops(self.text_tower.config, batch.segments.lengths)
            total += head_flops(self.image_head, images) + head_flops(self.text_head, images)
        for name, head in self.heads.items():
            total += head_flops(head, images if name == "words" else batch.num_patches)
        return total

    def forward(self, batch: PairedBatch) -> StepOutput:
        shown, count = batch if batch.keys else _null_pair(self.encoder, batch), len(batch.keys)
        seen = self.encoder(shown.vision)
        pooled, tokens = seen.pooled[:count], seen.tokens[: batch.num_patches]
        sums: dict[str, Tensor] = {}
        metrics: dict[str, Ratio] = {}
        if self.config.contrastive_weight:
            images, texts = self._project(pooled), self.embed_texts(shown.text_ids, shown.segments)[:count]
            log_scale, bias = self.temperature()
            if self._first_pass is not None:
                self._first_pass.append(_Seen(batch.keys, images, texts, log_scale, bias))
                return StepOutput({})
            sums["contrastive"], metrics = self._contrast(batch, (images, texts, log_scale, bias))
        for name, head in self.heads.items():
            if name == "words":
                sums[name] = self._words(head(pooled), batch)
                continue
            known = self._classes(batch) if name == "classes" else self._places(batch).flatten()
            logits = head(tokens).float()
            logits = logits if name == "classes" else logits.view(-1, self.config.places)
            sums[name] = F.cross_entropy(logits, known, ignore_index=-1, reduction="sum")
            metrics[name] = Ratio((logits.argmax(dim=1) == known).sum(), (known >= 0).sum())
        if pooled.requires_grad and not {"contrastive", "words"} & set(sums):
            sums[next(iter(sums))] += 0.0 * pooled.sum()  # a pooling head must not be left without gradient
        return StepOutput(sums, metrics)

    def _contrast(self, batch: PairedBatch, tensors: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Ratio]]:
        """From images, texts, log scale and bias: the loss; how often an image's own caption is the nearest of all that
        its loss compares it with, equal ones counting as its own; and the temperature."""
        _, _, log_scale, bias = tensors
        if self._shares and torch.is_grad_enabled():
            share = self._shares.popleft()
            if share.keys != batch.keys:
                raise ValueError(f"a forward of {batch.keys[:4]} where prepare saw {share.keys[:4]}: the order changed")
            loss, found = prescribed(share.loss, tensors, share.gradients), share.found
        else:
            loss, _, found = sigmoid_loss(*tensors)
        one = torch.ones((), device=bias.device)
        return loss, {
            "top1": Ratio(found.sum(), one * len(found)),
            "scale": Ratio(log_scale.detach().exp().squeeze(), one),
            "bias": Ratio(bias.detach().squeeze(), one),
        }

    def _words(self, logits: Tensor, batch: PairedBatch) -> Tensor:
        if self.rarity is None:
            return word_loss(logits, batch.text_ids, batch.segments)
        if self.training and torch.is_grad_enabled():
            self.rarity.count(batch.text_ids, batch.segments)
        return word_loss(logits, batch.text_ids, batch.segments, self.rarity())

    def forget(self) -> None:
        """Drop the words of a step that is not taken."""
        self._shares.clear()
        if self.rarity is not None:
            self.rarity.forget()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperature in bounds, and count the step's words."""
        if self.config.contrastive_weight:
            self.temperature.log_scale.clamp_(max=math.log(self.config.max_scale))
        if self.rarity is not None:
            self.rarity.end_step()

    def roles(self) -> Mapping[str, ParamRole]:
        """Roles "encoder", "text" and "projection"; temperature and bias go with the last."""
        roles = encoder_roles(self.encoder, "encoder.") | collect_roles(self.heads, "projection", "heads.")
        if not self.config.contrastive_weight:
            return roles
        roles |= {f"text_tower.{name}": role for name, role in self.text_tower.roles().items()}
        roles |= collect_roles(self.image_head, "projection", "image_head.")
        roles |= collect_roles(self.text_head, "projection", "text_head.")
        alone = ParamRole("projection", matrix=False, decay=False)
        return roles | {f"temperature.{name}": alone for name in ("log_scale", "bias")}

    def blocks(self) -> Iterable[nn.Module]:
        own = (*self.text_tower.blocks(), self.temperature) if self.config.contrastive_weight else ()
        return (*trainable_blocks(self.encoder), *own)

    def leaves(self) -> Iterable[nn.Module]:
        return ()


def _null_pair(encoder: VisionEncoder, empty: PairedBatch) -> PairedBatch:
    """What the towers see instead of nothing, so that every rank calls them and every parameter gets a gradient: one
    token of black, and a caption that is its end alone."""
    side, device = encoder.merge_size, empty.text_ids.device
    patches = empty.vision.patches.new_zeros(side * side, empty.vision.patches.shape[1])
    vision = PackedVision(patches, torch.tensor([[1, side, side]]))
    return PairedBatch(vision, empty.text_ids.new_zeros(1), Segments([1], device), ("null",))
