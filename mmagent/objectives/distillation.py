"""Stage 1: a student that sees part of an image reconstructs what several frozen teachers see in all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent import dist
from mmagent.dist import stable_seed
from mmagent.losses.distillation import feature_distance
from mmagent.losses.standardisers import Cone, LayerStandardiser, Moments, NoStandardiser, PhiS, Whitening
from mmagent.models.flops import EncoderCost, head_flops
from mmagent.models.layers import Linear, collect_roles, encoder_roles, trainable_blocks
from mmagent.models.teachers import Teacher, TeacherFeatures
from mmagent.protocols import VisionEncoder
from mmagent.types import MaskedVision, PackedVision, ParamRole, Ratio, StepOutput, VisionFeatures

STANDARDISERS = {
    "phi-s": PhiS,
    "whiten": Whitening,
    "layer": lambda width: LayerStandardiser(),
    "none": lambda width: NoStandardiser(),
}
BLINDFOLDS = ("token", "zero")
_DIGEST = 32  # bytes of a sha256


@dataclass
class DistillationConfig:
    """``standardise``: how teachers are made comparable: phi-s (arXiv 2410.01680), whiten, layer or none. ``blind``: a
    hidden patch becomes the student's mask ``token``, or ``zero`` pixels for an encoder of the protocol that has none.
    ``visible_weight`` adds the same loss on the patches that the student does see. ``mlp`` gives every head a hidden
    layer. ``cosine`` and ``smooth_l1`` weigh the two parts of the loss of a patch, ``summary_weight`` that of an image.

    ``drop`` is the chance that a teacher sits out an image; the one with the largest loss never does (teacher dropping
    of UNIC, arXiv 2408.05088). A dropped image counts as zero in the losses that are trained on and logged; the metrics
    ``TEACHER/patches``, ``/visible`` and ``/summary`` are the means before dropping, ``TEACHER/kept`` the share of
    images that stayed."""

    standardise: str = "phi-s"
    blind: str = "token"
    mlp: bool = False
    cosine: float = 0.9
    smooth_l1: float = 0.1
    summary_weight: float = 1.0
    visible_weight: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.standardise not in STANDARDISERS:
            raise ValueError(f"standardise {self.standardise!r} is none of {', '.join(STANDARDISERS)}")
        if self.blind not in BLINDFOLDS:
            raise ValueError(f"blind {self.blind!r} is none of {', '.join(BLINDFOLDS)}")
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"drop {self.drop} must lie in [0, 1)")
        for name in ("cosine", "smooth_l1", "summary_weight", "visible_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be finite and not negative")
        if not (self.cosine or self.smooth_l1 or self.summary_weight):
            raise ValueError("cosine, smooth_l1 and summary_weight are all 0: nothing would be learned")


class TeacherHead(nn.Module):
    """What the student answers one teacher with, and that teacher's statistics."""

    def __init__(self, width: int, teacher: Teacher, config: DistillationConfig):
        super().__init__()
        self.patches = _head(width, teacher.width, config.mlp)
        self.standardiser = STANDARDISERS[config.standardise](teacher.width)
        self.summary = _head(width, teacher.summary_width, config.mlp) if teacher.summary else None
        self.cone = Cone(teacher.summary_width) if teacher.summary else None
        # of weights, settings and library versions; zeros where nothing is known
        self.register_buffer("origin", torch.zeros(3, _DIGEST, dtype=torch.uint8))
        self._checked: tuple[int, int] | None = None

    @torch.no_grad()
    def mark(self, teacher: Teacher) -> None:
        """Note that the statistics are those of ``teacher``."""
        self.origin.copy_(_origin(teacher))

    def require(self, teacher: Teacher) -> None:
        """Raise ``ValueError`` where the statistics, wherever they were loaded from, are those of another teacher: of
        other weights, or of other settings as far as the same libraries read them. Cheap once they were compared."""
        if self._checked == (state := (id(self.origin), self.origin._version)):
            return
        known = self.origin.cpu()
        if known.any() and (own := _origin(teacher)).any():
            weights, settings, versions = (torch.equal(one, other) for one, other in zip(known, own, strict=True))
            if not weights or (versions and not settings):
                raise ValueError(
                    f"teacher {teacher.name}: the statistics in this checkpoint are those of another one, with other "
                    f"{'settings' if weights else 'weights, precision or preprocessing'}: go on with the teacher that "
                    f"the run began with, or begin a new run from the student's encoder"
                )
        self._checked = state


def _origin(teacher: Teacher) -> Tensor:
    """``(3, 32)`` bytes: the teacher's fingerprint; zeros for one whose call has no name."""
    if not teacher.named:
        return torch.zeros(3, _DIGEST, dtype=torch.uint8)
    return torch.tensor([list(bytes.fromhex(digest)) for digest in teacher.fingerprint], dtype=torch.uint8)


def _head(width: int, outputs: int, mlp: bool) -> nn.Module:
    if not mlp:
        return Linear(width, outputs, bias=True)
    return nn.Sequential(Linear(width, 2 * width, bias=True), nn.GELU(), Linear(2 * width, outputs, bias=True))


class Distillation(nn.Module):
    """Implements :class:`mmagent.protocols.Objective` over :class:`~mmagent.types.MaskedVision`.

    Teachers are no submodules: they are neither trained, nor sharded, nor stored with the student. Their statistics
    are: call :meth:`calibrate` once before training; a resumed run finds them in the checkpoint, and its first forward
    raises ``ValueError`` where they are those of another teacher.
    """

    def __init__(self, student: nn.Module, teachers: Sequence[Teacher], config: DistillationConfig):
        super().__init__()
        assert isinstance(student, VisionEncoder)
        names = [teacher.name for teacher in teachers]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"teachers must be one or more with names of their own, got {names}")
        if not (config.cosine or config.smooth_l1 or any(teacher.summary for teacher in teachers)):
            raise ValueError("cosine and smooth_l1 are 0 and no teacher has a summary: nothing would be learned")
        self.student, self.config = student, config
        self.teachers = tuple(teachers)
        self.heads = nn.ModuleDict({t.name: TeacherHead(student.width, t, config) for t in teachers})

    @property
    def weights(self) -> Mapping[str, float]:
        weights: dict[str, float] = {}
        for name, head in self.heads.items():
            weights[f"{name}_patches"] = 1.0
            if head.summary is not None:
                weights[f"{name}_summary"] = self.config.summary_weight
            if self.config.visible_weight:
                weights[f"{name}_visible"] = self.config.visible_weight
        return weights

    def counts(self, batch: MaskedVision) -> dict[str, Tensor]:
        hidden = batch.masked.sum()
        counts: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            counts[f"{name}_patches"] = hidden
            if head.summary is not None:
                counts[f"{name}_summary"] = torch.full_like(hidden, len(batch.keys))
            if self.config.visible_weight:
                counts[f"{name}_visible"] = batch.masked.shape[0] - hidden
        return counts

    def flops(self, batch: MaskedVision) -> float:
        """Useful operations of a step over ``batch``, the teachers' apart; see :mod:`mmagent.models.flops`."""
        rows = batch.num_patches if self.config.visible_weight else int(batch.masked.sum())
        total = EncoderCost.of(self.student).training(batch.vision.segments.lengths)
        for head in self.heads.values():
            total += head_flops(head.patches, rows)
            total += head_flops(head.summary, len(batch.keys)) if head.summary is not None else 0.0
        return total

    def forward(self, batch: MaskedVision) -> StepOutput:
        seen = self._look(batch)
        rows: dict[str, Tensor] = {}
        metrics: dict[str, Ratio] = {}
        for teacher in self.teachers:
            self.heads[teacher.name].require(teacher)
            before = (teacher.hits, teacher.seen)
            features = self._teach(teacher, batch)
            losses, cosine = self._losses(teacher.name, seen, features, batch.masked)
            rows |= losses
            metrics[f"{teacher.name}/cosine"] = Ratio(cosine.sum(), torch.ones_like(cosine).sum())
            if teacher.cache is not None:
                new = (float(now - then) for now, then in zip((teacher.hits, teacher.seen), before, strict=True))
                metrics[f"time/{teacher.name}_cached"] = Ratio(*(torch.tensor(n, device=cosine.device) for n in new))
        if self.config.drop:
            for term, values in rows.items():
                metrics["/".join(term.rsplit("_", 1))] = Ratio(values.detach().sum(), torch.ones_like(values).sum())
            whole = torch.ones(len(self.teachers), len(batch.keys), device=batch.masked.device)
            rows, kept = self._drop(rows, batch) if self.training else (rows, whole)
            for teacher, stays in zip(self.teachers, kept, strict=True):
                metrics[f"{teacher.name}/kept"] = Ratio(stays.sum(), torch.ones_like(stays).sum())
        sums = {term: values.sum() for term, values in rows.items()}
        if all(head.summary is None for head in self.heads.values()) and seen.pooled.requires_grad:
            sums[next(iter(sums))] += 0.0 * seen.pooled.sum()  # a pooling head must not be left without gradient
        return StepOutput(sums, metrics)

    def _teach(self, teacher: Teacher, batch: MaskedVision) -> TeacherFeatures:
        temporal = batch.vision.patches.shape[1] // (3 * self.student.patch_size**2)
        return teacher(batch.pixels, batch.vision.grids, self.student.merge_size, temporal)

    def _look(self, batch: MaskedVision) -> VisionFeatures:
        if self.config.blind == "token":
            return self.student(batch.vision, masked=batch.masked)
        patches = batch.vision.patches.masked_fill(batch.masked.unsqueeze(1), 0.0)
        return self.student(PackedVision(patches, batch.vision.grids))

    def _losses(
        self, name: str, seen: VisionFeatures, features: TeacherFeatures, masked: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of one teacher, a value a row, and the cosine on hidden patches."""
        head = self.heads[name]
        with torch.autocast(seen.tokens.device.type, enabled=False):
            targets = head.standardiser(features.tokens)
        places = {"patches": masked, "visible": ~masked} if self.config.visible_weight else {"patches": masked}
        losses = {}
        for place, rows in places.items():
            answer = head.patches(seen.tokens[rows])
            losses[f"{name}_{place}"] = feature_distance(
                answer, targets[rows], self.config.cosine, self.config.smooth_l1
            )
            if place == "patches":
                cosine = F.cosine_similarity(answer.detach().float(), targets[rows], dim=-1)
        if head.summary is not None:
            losses[f"{name}_summary"] = head.cone(head.summary(seen.pooled), features.summary)
        return losses, cosine

    def _drop(self, rows: Mapping[str, Tensor], batch: MaskedVision) -> tuple[dict[str, Tensor], Tensor]:
        """Per image keep the teacher with the largest loss, and each other one with chance 1 - drop. Also returns which
        stay, ``(teachers, I)``, 1 or 0.

        Draws are a function of an image's key and mask, so they depend on no rank, no micro-batch and no resumption;
        seen again with another mask, an image draws anew.
        """
        images, device = len(batch.keys), batch.masked.device
        owners = torch.repeat_interleave(batch.vision.grids.prod(dim=1)).to(device)
        hidden, visible = owners[batch.masked], owners[~batch.masked]
        losses = rows[f"{self.teachers[0].name}_patches"].new_zeros(len(self.teachers), images)
        for n, teacher in enumerate(self.teachers):
            losses[n].index_add_(0, hidden, rows[f"{teacher.name}_patches"].detach())
        masks = batch.masked.cpu().split(batch.vision.grids.prod(dim=1).tolist())
        seeds = [stable_seed(key, mask.numpy().tobytes()) for key, mask in zip(batch.keys, masks, strict=True)]
        draws = np.stack([np.random.default_rng(seed).random(len(self.teachers)) for seed in seeds], axis=1)
        stays = torch.from_numpy(draws >= self.config.drop).to(device)
        stays = stays.scatter(0, losses.argmax(dim=0, keepdim=True), True).float()
        left: dict[str, Tensor] = {}
        for n, teacher in enumerate(self.teachers):
            for place, image in {"patches": hidden, "visible": visible, "summary": slice(None)}.items():
                if (term := f"{teacher.name}_{place}") in rows:
                    left[term] = rows[term] * stays[n][image]
        return left, stays

    @torch.no_grad()
    def calibrate(self, batches: Iterable[MaskedVision]) -> None:
        """Estimate every teacher's statistics from ``batches``, over all ranks together. Of what was seen, only moments
        and a summary an image are kept: the tokens of a whole calibration would be tens of gigabytes.

        Raises ``ValueError`` for no batch, or a teacher whose features never vary.
        """
        for teacher in self.teachers:  # before any of them has run: some models note what they last saw
            self.heads[teacher.name].mark(teacher)
        moments: dict[str, Moments] = {}
        summaries: dict[str, list[Tensor]] = {name: [] for name, head in self.heads.items() if head.cone is not None}
        for batch in batches:
            for teacher in self.teachers:
                tokens, summary = self._teach(teacher, batch)
                if teacher.name not in moments:
                    moments[teacher.name] = Moments(tokens.shape[1], tokens.device)
                moments[teacher.name].add(tokens)
                if teacher.name in summaries:
                    summaries[teacher.name].append(summary.clone())  # a view would keep all tokens alive
        if not moments:
            raise ValueError("calibration needs at least one batch")
        for name, head in self.heads.items():
            for tensor in moments[name].tensors():
                dist.all_reduce(tensor)
            head.standardiser.fit(moments[name])
            if head.cone is not None:
                head.cone.fit(torch.cat(summaries[name]), dist.all_reduce)
            # eigenvectors have a sign that unlike hosts may choose differently: all must aim at the same targets
            for buffer in head.buffers():
                dist.broadcast(buffer)

    def after_step(self) -> None:
        """Nothing moves outside the gradient."""

    def roles(self) -> Mapping[str, ParamRole]:
        return {**encoder_roles(self.student, "student."), **collect_roles(self.heads, "head", "heads.")}

    def blocks(self) -> Iterable[nn.Module]:
        return trainable_blocks(self.student)

    def leaves(self) -> Iterable[nn.Module]:
        return ()
