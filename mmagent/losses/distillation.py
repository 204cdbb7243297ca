"""Distances between a student's predictions and a teacher's features, one value a row.

Rows, not sums, so that an objective can weight images (teacher dropping) before it sums; both are computed in
float32 whatever autocast says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_distance(student: Tensor, target: Tensor, cosine: float = 0.9, smooth_l1: float = 0.1) -> Tensor:
    """``cosine * (1 - cos) + smooth_l1 * mean_channel(smooth L1)`` of every row: ``(P, C), (P, C) -> (P,)``.

    The mix and its weights are AM-RADIO's spatial loss (arXiv 2312.06709, section 3.3).
    """
    if student.shape != target.shape:
        raise ValueError(f"student {tuple(student.shape)} and target {tuple(target.shape)} differ in shape")
    student, target = student.float(), target.float()
    angle = 1.0 - F.cosine_similarity(student, target, dim=-1)
    return cosine * angle + smooth_l1 * F.smooth_l1_loss(student, target, reduction="none").mean(dim=-1)


def angle(student: Tensor, target: Tensor) -> Tensor:
    """Angle in radians between the rows of two ``(I, C)`` tensors: ``(I,)``.

    ``2 atan2(|u - v|, |u + v|)`` of the unit vectors: exact near 0 and pi, where arccos loses all digits and its
    gradient is infinite.
    """
    u, v = F.normalize(student.float(), dim=-1), F.normalize(target.float(), dim=-1)
    return 2.0 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))


def angular_distance(student: Tensor, target: Tensor, dispersion: Tensor) -> Tensor:
    """Squared angle of every row over the teacher's own dispersion: ``(I, C), (I, C), () -> (I,)``.

    ``dispersion`` is the mean squared angle between the teacher's summaries and their mean direction, so a student
    that always answers that direction loses 1, whichever the teacher: none dominates because its cone is wide
    (C-RADIOv4, arXiv 2601.17237).
    """
    return angle(student, target).square() / dispersion
