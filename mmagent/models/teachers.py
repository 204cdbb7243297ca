"""Frozen teachers: any backbone (:mod:`mmagent.models.backbones`) that follows a student's patch grid and answers in
the student's order; what it saw can be cached on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmagent.models.backbone import Backbone, equal_planes, resample, resize_pixels, stream_order
from mmagent.models.backbones import load_backbone
from mmagent.models.feature_cache import CachedFeatures, FeatureCache, content_key
from mmagent.models.fingerprint import Fingerprint, fingerprint, has_name

LARGE = 50_000_000
"""Parameters from which on a loaded teacher runs in bfloat16, if nothing else is said."""


@dataclass
class TeacherConfig:
    """``source`` as in :func:`mmagent.models.backbones.load_backbone`; empty leaves the teacher out. ``resolution`` 0
    matches the teacher's grid to the student's; other values show it squares of that many pixels. ``summary`` false:
    nothing has trained its summary, none is learned. ``patch_limit``: its patches of one forward, at most.

    A cache of what it saw pays for runs over the same stream (the same seed again, resumption, ablations), not for
    random crops that are new every epoch: see :class:`~mmagent.models.feature_cache.FeatureCacheConfig`."""

    source: str = ""
    resolution: int = 0
    summary: bool = True
    patch_limit: int = 65536


class TeacherFeatures(NamedTuple):
    """``tokens (P, W)`` float32, one row a patch of the student's stream and in its order; ``summary (I, S)``."""

    tokens: Tensor
    summary: Tensor


class Teacher:
    """A frozen backbone that looks at images on a student's patch grid.

    Deliberately no ``nn.Module``: an objective that holds one neither trains, shards nor checkpoints it.

    ``resolution`` 0 resizes each image so that the teacher's grid *is* the student's (256 pixels at patch 16 where the
    student sees 224 at patch 14); a positive one shows the teacher squares of that many pixels, its training size, and
    resamples its features to the student's grid. A backbone that accepts one grid only always does the latter.
    ``summary`` is false for a backbone whose summary nothing has trained: only its patches teach then. Images of equal
    grids run together, at most ``patch_limit`` patches at once; with a ``cache``, only what it lacks, in batches of the
    size that it says. ``hits`` counts images (frames of clips) that it had, of ``seen``.
    """

    def __init__(
        self,
        backbone: Backbone,
        name: str,
        *,
        resolution: int = 0,
        dtype: torch.dtype | None = None,
        summary: bool = True,
        patch_limit: int = TeacherConfig.patch_limit,
        cache: FeatureCache | None = None,
    ):
        self.name = name.replace(".", "_")  # names of heads and metrics, where a dot would be a path
        self.summary = summary
        self.width, self.summary_width = backbone.width, backbone.summary_width
        self.backbone = backbone
        backbone.module.requires_grad_(False).eval()
        if dtype is not None:
            backbone.module.to(dtype)
        patch = backbone.patch_size
        if resolution % patch:
            raise ValueError(f"teacher {name}: resolution {resolution} is no multiple of its patch size {patch}")
        if patch_limit < 1:
            raise ValueError(f"teacher {name}: patch_limit {patch_limit} must be positive")
        self.grid = backbone.fixed or ((resolution // patch,) * 2 if resolution else None)
        self.patch_limit, self.cache = patch_limit, cache
        self.seen = self.hits = 0

    @classmethod
    def load(
        cls,
        source: str | Path,
        name: str = "",
        *,
        resolution: int = 0,
        dtype: torch.dtype | None = None,
        summary: bool = True,
        patch_limit: int = TeacherConfig.patch_limit,
        cache: FeatureCache | None = None,
    ) -> Teacher:
        """From a local folder, a hub id, or ``timm:`` and a model name: see :func:`load_backbone`. ``dtype`` None is
        bfloat16 for a teacher of :data:`LARGE` or more parameters, else float32."""
        name = name or Path(str(source)).name
        backbone = load_backbone(source, dtype or torch.float32)
        if dtype is None and sum(p.numel() for p in backbone.module.parameters()) >= LARGE:
            dtype = torch.bfloat16
        return cls(
            backbone,
            name,
            resolution=resolution,
            dtype=dtype,
            summary=summary,
            patch_limit=patch_limit,
            cache=cache,
        )

    def to(self, device: torch.device | str) -> Teacher:
        self.backbone.module.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, pixels: Sequence[Tensor], grids: Tensor, merge_size: int, temporal_patch: int = 2
    ) -> TeacherFeatures:
        """Features on the student's ``grids (I, 3)``: of I images ``(3, h, w)`` in [0, 1], of any size, or clips
        ``(frames, 3, h, w)``.

        A frame group of a clip is seen as the mean of what its ``temporal_patch`` frames show, the last one repeated to
        fill it, as in :func:`mmagent.geometry.patchify`; a clip's summary is the mean over its frames. Raises
        ``ValueError`` where frames and grids disagree.
        """
        if len(pixels) != grids.shape[0]:
            raise ValueError(f"teacher {self.name}: {len(pixels)} images for {grids.shape[0]} grids")
        clips = [p if p.ndim == 4 else p.unsqueeze(0) for p in pixels]
        for i, (clip, groups) in enumerate(zip(clips, grids[:, 0].tolist(), strict=True)):
            if not len(clip) or -(-len(clip) // temporal_patch) != groups:
                raise ValueError(
                    f"teacher {self.name}: image {i} has {len(clip)} frames, its grid {groups} groups of up to "
                    f"{temporal_patch}; a clip is (frames, 3, height, width)"
                )
        kind = pixels[0].device.type if pixels else "cpu"
        with torch.autocast(kind, enabled=False):  # its precision is its own, not the student's
            return self._follow(clips, grids, merge_size, temporal_patch)

    def _follow(self, clips: Sequence[Tensor], grids: Tensor, merge_size: int, temporal_patch: int) -> TeacherFeatures:
        """Of I clips ``(frames, 3, h, w)``, in the student's order."""
        borders = list(pairwise(accumulate((len(clip) for clip in clips), initial=0)))
        planes = [self.grid or (rows, cols) for _, rows, cols in grids.tolist()]
        frames = [frame for clip in clips for frame in clip]
        sizes = [plane for clip, plane in zip(clips, planes, strict=True) for _ in clip]
        found = self._cached(frames, sizes) if self.cache else self._fresh(frames, sizes)
        tokens: list[Tensor] = [torch.empty(0)] * len(clips)
        summaries: list[Tensor] = [torch.empty(0)] * len(clips)
        for (rows, cols), members in equal_planes(grids).items():
            groups = [_groups([found[n].tokens for n in range(*borders[i])], temporal_patch) for i in members]
            plane = torch.cat(groups).unflatten(1, self.grid or (rows, cols))
            order = stream_order(rows, cols, merge_size, plane.device)
            ordered = resample(plane, (rows, cols)).flatten(1, 2)[:, order]
            for i, own in zip(members, ordered.split([len(g) for g in groups]), strict=True):
                tokens[i] = own.flatten(0, 1)
                summaries[i] = torch.stack([found[n].summary.float() for n in range(*borders[i])]).mean(dim=0)
        return TeacherFeatures(torch.cat(tokens), torch.stack(summaries))

    def _fresh(self, frames: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[CachedFeatures]:
        """What the backbone sees in every frame, frames of equal size together."""
        out: list[CachedFeatures | None] = [None] * len(frames)
        for size, members in _alike(sizes).items():
            limit = max(self.patch_limit // (size[0] * size[1]), 1)
            for start in range(0, len(members), limit):
                some = members[start : start + limit]
                for i, features in zip(some, self._look([frames[i] for i in some], size), strict=True):
                    out[i] = features
        return [features for features in out if features is not None]

    def _look(self, frames: Sequence[Tensor], size: tuple[int, int]) -> list[CachedFeatures]:
        patch = self.backbone.patch_size
        seen = torch.stack([resize_pixels(frame, size[0] * patch, size[1] * patch) for frame in frames])
        features = self.backbone(seen)
        return [CachedFeatures(t, s) for t, s in zip(features.tokens, features.summary, strict=True)]

    def _cached(self, frames: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[CachedFeatures]:
        """As :meth:`_fresh` in the storage's precision; computes only what the cache has not, and equal frames once."""
        assert self.cache is not None
        known: dict[str, CachedFeatures] = {}
        missing: dict[str, int] = {}
        keys = [self._key(frame, size) for frame, size in zip(frames, sizes, strict=True)]
        for i, key in enumerate(keys):
            if key in known or key in missing:
                continue
            found = self.cache.get(key, sizes[i][0] * sizes[i][1], self.width, self.summary_width)
            if found is None:
                missing[key] = i
            else:
                known[key] = found
        self.seen += len(keys)
        self.hits += sum(key not in missing for key in keys)
        by_size = _alike([sizes[i] for i in missing.values()])
        names = list(missing)
        batch = self.cache.batch
        for size, members in by_size.items():
            for start in range(0, len(members), batch):
                some = [names[n] for n in members[start : start + batch]]
                shown = [frames[missing[key]] for key in some]
                shown += shown[-1:] * (batch - len(shown))  # a batch of another size may round otherwise
                for key, features in zip(some, self._look(shown, size)[: len(some)], strict=True):
                    known[key] = self.cache.stored(*features)
                    self.cache.put(key, known[key])
        device = frames[0].device if frames else "cpu"
        moved = {key: CachedFeatures(*(t.to(device) for t in value)) for key, value in known.items()}
        return [moved[key] for key in keys]

    def _key(self, frame: Tensor, size: tuple[int, int]) -> str:
        """Of what decides a feature's bits: the pixels as they came with the size they are resized to, teacher,
        precision, kind of device and size of batch, and how it is stored."""
        assert self.cache is not None
        dtype, tf32 = next(self.backbone.module.parameters()).dtype, torch.backends.cudnn.allow_tf32
        precision = f"{dtype} {torch.get_float32_matmul_precision()} {tf32}"
        how = f"{self.cache.dtype} {self.cache.batch} {frame.device.type}"
        return content_key(self.identity, f"{size}", precision, how, frame)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the backbone; reads all weights, once. Raises ``ValueError`` for a call that has no name."""
        try:
            return fingerprint(self.backbone)
        except ValueError as error:
            raise ValueError(f"teacher {self.name}: {error}") from error

    @property
    def named(self) -> bool:
        """Whether it has a fingerprint: what calls its module is a function or a dataclass."""
        return has_name(self.backbone.call)

    @property
    def identity(self) -> str:
        """All of the :attr:`fingerprint`: weights, settings and the versions of the libraries."""
        return content_key(*self.fingerprint)


def _groups(frames: Sequence[Tensor], temporal_patch: int) -> Tensor:
    """``(groups, cells, W)`` float32: the mean over every ``temporal_patch`` frames of ``(cells, W)``."""
    stacked = torch.stack([frame.float() for frame in frames])  # autocast cannot stack float16 on a CPU
    if len(frames) == 1:
        return stacked
    groups = -(-len(frames) // temporal_patch)
    index = torch.arange(groups * temporal_patch).clamp(max=len(frames) - 1).to(stacked.device)
    return stacked[index].unflatten(0, (groups, temporal_patch)).mean(dim=1)


def _alike(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    return groups


def load_teachers(
    configs: Mapping[str, TeacherConfig],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    cache: FeatureCache | None = None,
) -> list[Teacher]:
    """The teachers of a config, by name, in its order, without those that have no source. ``dtype`` as in
    :meth:`Teacher.load`."""
    return [
        Teacher.load(
            config.source,
            name,
            resolution=config.resolution,
            dtype=dtype,
            summary=config.summary,
            patch_limit=config.patch_limit,
            cache=cache,
        ).to(device)
        for name, config in configs.items()
        if config.source
    ]
