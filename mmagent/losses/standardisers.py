"""Standardised teacher features: what makes losses of teachers with different statistics comparable.

Statistics are estimated once, from :class:`Moments`, before training begins; they are buffers, so a checkpoint
carries them and a resumed run sees the same targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.losses.distillation import angle, angular_distance


class Moments:
    """Mean and covariance of a stream of ``(N, C)`` features, in float64 (so that neither batch order nor split matters
    beyond rounding)."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        rows = features.detach().double()
        self.count += rows.shape[0]
        self.total += rows.sum(dim=0)
        self.outer += rows.T @ rows

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What ranks must sum to share one estimate."""
        return self.count, self.total, self.outer

    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self.outer / self.count - torch.outer(mean, mean)


class PhiS(nn.Module):
    """PHI-S (arXiv 2410.01680): centre, rotate so that every channel has the same variance, scale by one number.

    ``x = R (y - mean) / phi`` with ``R = H U^T``: ``U`` the eigenvectors of the covariance, ``H`` an orthogonal matrix
    whose entries all have the same size, and ``phi^2`` the mean eigenvalue. Every channel of ``x`` then has unit
    variance, relative lengths and angles around the mean are kept, and the map is inverted exactly by
    :meth:`invert`. Widths without a known Hadamard matrix use a chain of plane rotations with the same effect.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.full((width,), math.nan))
        self.register_buffer("rotation", torch.full((width, width), math.nan))
        self.register_buffer("phi", torch.tensor(math.nan))

    @torch.no_grad()
    def fit(self, moments: Moments) -> None:
        """Set the statistics. Raises ``ValueError`` where the features do not vary at all."""
        mean, covariance = moments.mean().cpu(), moments.covariance().cpu()
        variance = covariance.diagonal().mean()
        if not float(variance) > 0.0:
            raise ValueError(f"features of width {mean.shape[0]} do not vary over {int(moments.count)} rows")
        values, vectors = torch.linalg.eigh(covariance)
        self.mean.copy_(mean)
        self.rotation.copy_(equalising_rotation(values) @ vectors.T)
        self.phi.copy_(variance.sqrt())

    def forward(self, features: Tensor) -> Tensor:
        """``(N, C)`` teacher features to ``(N, C)`` float32 targets."""
        return (features.float() - self.mean) @ (self.rotation.T / self.phi)

    def invert(self, targets: Tensor) -> Tensor:
        """Targets (or a student's prediction of them) back to the teacher's own space."""
        return targets.float() @ (self.rotation * self.phi) + self.mean


class Whitening(nn.Module):
    """Principal directions of the centred features, each divided by its deviation: what varies little weighs as much as
    what varies much. ``x = (values + shrinkage * mean value)^(-1/2) U^T (y - mean)`` with eigenvalues and -vectors of
    the covariance; ``shrinkage`` keeps directions that hardly vary from becoming noise.
    """

    def __init__(self, width: int, shrinkage: float = 0.01):
        super().__init__()
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.full((width,), math.nan))
        self.register_buffer("matrix", torch.full((width, width), math.nan))

    @torch.no_grad()
    def fit(self, moments: Moments) -> None:
        """Set the statistics. Raises ``ValueError`` where the features do not vary at all."""
        covariance = moments.covariance().cpu()
        variance = covariance.diagonal().mean()
        if not float(variance) > 0.0:
            raise ValueError(f"features of width {covariance.shape[0]} do not vary over {int(moments.count)} rows")
        values, vectors = torch.linalg.eigh(covariance)
        self.mean.copy_(moments.mean().cpu())
        self.matrix.copy_(vectors / (values.clamp_min(0.0) + self.shrinkage * variance).sqrt())

    def forward(self, features: Tensor) -> Tensor:
        """``(N, C)`` teacher features to ``(N, C)`` float32 targets."""
        return (features.float() - self.mean) @ self.matrix


class LayerStandardiser(nn.Module):
    """Each row to zero mean and unit variance over its channels, like a LayerNorm without weights. No statistics."""

    def fit(self, moments: Moments) -> None:
        """Nothing to estimate."""

    def forward(self, features: Tensor) -> Tensor:
        return F.layer_norm(features.float(), features.shape[-1:])


class NoStandardiser(nn.Module):
    """The teacher's features as they are, in float32."""

    def fit(self, moments: Moments) -> None:
        """Nothing to estimate."""

    def forward(self, features: Tensor) -> Tensor:
        return features.float()


class Cone(nn.Module):
    """How wide a teacher's summaries spread round their mean ``direction``; the summary loss is measured in it.

    ``dispersion`` is the mean squared angle in radians between a summary and the mean direction.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("direction", torch.full((width,), math.nan))
        self.register_buffer("dispersion", torch.tensor(math.nan))

    @torch.no_grad()
    def fit(self, summaries: Tensor, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """From ``(I, C)`` summaries; ``total`` sums a tensor over ranks, each of which brings its own.

        Raises ``ValueError`` where all summaries point the same way.
        """
        direction = total(F.normalize(summaries.double(), dim=-1).sum(dim=0))
        spread = angle(summaries, direction.expand_as(summaries)).double().square()
        count = total(torch.tensor(float(len(summaries)), dtype=torch.float64, device=summaries.device))
        dispersion = total(spread.sum()) / count
        if not float(dispersion) > 0.0:
            raise ValueError(f"summaries of width {summaries.shape[1]} all point the same way")
        self.direction.copy_(F.normalize(direction, dim=0))
        self.dispersion.copy_(dispersion)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """``(I, C), (I, C) -> (I,)``: :func:`~mmagent.losses.distillation.angular_distance` in this cone's unit."""
        return angular_distance(student, target, self.dispersion)


def equalising_rotation(eigenvalues: Tensor) -> Tensor:
    """An orthogonal ``(C, C)`` float64 matrix ``R`` for which ``R diag(eigenvalues) R^T`` has a constant diagonal."""
    matrix = hadamard(eigenvalues.shape[0])
    return _plane_rotations(eigenvalues) if matrix is None else matrix


def hadamard(n: int) -> Tensor | None:
    """An orthogonal ``(n, n)`` float64 matrix with entries ``+-1/sqrt(n)``, or None where nothing here constructs one.

    Paley's two constructions for primes, and Kronecker products of what is known: all powers of two and nearly every
    width that vision transformers have (192, 384, 768, 1024, 1152, 1280, 1536, 4096, ...).
    """
    signs = _hadamard_signs(n)
    return None if signs is None else signs / math.sqrt(n)


def _hadamard_signs(n: int) -> Tensor | None:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n == 2:
        return pair
    if n % 4:
        return None
    if n & (n - 1) and _is_prime(n - 1):  # n - 1 = 3 mod 4: Paley I
        core = torch.zeros(n, n, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, -1.0, _residues(n - 1)
        return core + torch.eye(n, dtype=torch.float64)
    half = n // 2
    if half % 4 == 2 and _is_prime(half - 1):  # half - 1 = 1 mod 4: Paley II
        core = torch.zeros(half, half, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, 1.0, _residues(half - 1)
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, pair) + torch.kron(torch.eye(half, dtype=torch.float64), corner)
    for factor in [2, *range(4, half, 4)]:
        if n % factor == 0 and (rest := _hadamard_signs(n // factor)) is not None:
            first = _hadamard_signs(factor)
            if first is not None:
                return torch.kron(first, rest)
    return None


def _residues(q: int) -> Tensor:
    """The ``(q, q)`` matrix of quadratic characters of ``row - column`` modulo the prime ``q``."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _plane_rotations(eigenvalues: Tensor) -> Tensor:
    """At most ``C - 1`` plane rotations, each of which makes one diagonal entry the mean (Bendel and Mickey, 1978)."""
    width = eigenvalues.shape[0]
    mean = float(eigenvalues.double().mean())
    matrix, rotation = torch.diag(eigenvalues.double()), torch.eye(width, dtype=torch.float64)
    open_rows = list(range(width))
    while len(open_rows) > 1:
        diagonal = matrix.diagonal()[open_rows] - mean
        low, high = open_rows[int(diagonal.argmin())], open_rows[int(diagonal.argmax())]
        a, b, c = float(matrix[low, low]) - mean, float(matrix[low, high]), float(matrix[high, high]) - mean
        if c - a <= 1e-15 * max(abs(mean), 1e-300):
            break
        # t solves a + 2 b t + c t^2 = 0: the low row, turned towards the high one, then has the mean variance
        t = (-b - math.copysign(math.sqrt(max(b * b - a * c, 0.0)), b)) / c
        cos = 1.0 / math.sqrt(1.0 + t * t)
        turn = torch.tensor([[cos, cos * t], [-cos * t, cos]], dtype=torch.float64)
        pair = [low, high]
        matrix[pair] = turn @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
        open_rows.remove(low)
    return rotation
