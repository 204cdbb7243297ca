"""The few constants of :class:`~tools.planner.steptime.Efficiency`, fitted to published rows and held against others.

One set of constants serves every system; none belongs to a row. What counts is the error on systems that constants were
not fitted to (:data:`LEFT_OUT`): that is what a plan for another cluster has to expect.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

from tools.planner.published import Row
from tools.planner.steptime import Efficiency, step_time

CALIBRATED = Efficiency(
    ampere=0.759, hopper=0.652, attention=0.589, grouped=0.796, traffic=1.599, eager=1.742, network=0.754,
    overlap=0.652, waiting=0.005,
)  # fmt: skip
"""Fitted to all rows of :mod:`tools.planner.published` that say ``fit``; :func:`fit` gives them again."""

_MEGASCALE = Efficiency(0.768, 0.651, 0.587, 0.788, 1.597, 1.74, 0.794, 0.593, 0.005)
LEFT_OUT = {
    "Megatron-LM": _MEGASCALE,
    "MegaScale": _MEGASCALE,
    "torchtitan": Efficiency(0.762, 0.679, 0.606, 0.766, 1.531, 1.689, 0.719, 0.659, 0.005),
    "llm-foundry": Efficiency(0.753, 0.664, 0.669, 0.775, 1.646, 1.75, 0.741, 0.639, 0.005),
    "KempnerForge": Efficiency(0.736, 0.629, 0.597, 0.793, 1.599, 1.736, 0.85, 0.855, 0.005),
    "AutoModel": Efficiency(0.761, 0.642, 0.573, 0.7, 1.64, 1.715, 0.73, 0.681, 0.005),
    "Llama 3": Efficiency(0.771, 0.629, 0.509, 0.861, 1.488, 1.697, 0.659, 0.721, 0.005),
}
"""For each system, what is fitted without it (and without others of its source): ``tools/plan.py --published --refit``
gives them again."""

BOUNDS = {
    "ampere": (0.5, 0.95),
    "hopper": (0.4, 0.95),
    "attention": (0.2, 1.0),
    "grouped": (0.2, 1.0),
    "traffic": (1.0, 4.0),
    "eager": (1.0, 4.0),
    "network": (0.3, 1.0),
    "overlap": (0.3, 1.0),
    "waiting": (0.0, 0.03),
}
"""What is believable; a constant at its bound would say that the model lacks something."""

PRIOR = 0.3
"""How firmly constants are held to what was believed before any fit (the defaults of ``Efficiency``): to be off by all
of its size costs a constant what a whole system's error by this factor does. A system that is left out may have been
the only one to say something about a constant."""


@dataclass(frozen=True)
class Compared:
    """A row, what is predicted for it, and whether its system had a part in the constants."""

    row: Row
    tokens: float
    mfu: float
    limit: str

    @property
    def error(self) -> float:
        """Relative; positive where the prediction is too fast."""
        return self.tokens / self.row.tokens - 1


def compare(rows: Iterable[Row], efficiency: Efficiency) -> list[Compared]:
    """Predictions for ``rows``."""
    found = []
    for row in rows:
        step = step_time(row.model, row.run, efficiency)
        found.append(Compared(row, step.tokens_per_gpu, step.mfu, step.limit))
    return found


def mean_error(compared: Sequence[Compared]) -> float:
    """Mean of the absolute relative errors."""
    return statistics.fmean(abs(one.error) for one in compared)


def fit(rows: Sequence[Row]) -> Efficiency:
    """Least squares of the logarithms of throughput, robust to outliers, within :data:`BOUNDS`. Every system weighs the
    same, however many rows it has."""
    import numpy as np
    from scipy.optimize import least_squares

    used = [row for row in rows if row.fit]
    counts = {row.system: sum(other.system == row.system for other in used) for row in used}
    weights = np.array([counts[row.system] ** -0.5 for row in used])
    low, high = (np.array([BOUNDS[field.name][side] for field in fields(Efficiency)]) for side in (0, 1))

    def residuals(x: np.ndarray) -> np.ndarray:
        tokens = [one.tokens for one in compare(used, Efficiency(*(low + x * (high - low))))]
        errors = np.log(tokens / np.array([row.tokens for row in used])) * weights
        return np.concatenate([errors, (x - start) * (high - low) / believed * PRIOR])

    believed = np.array(astuple(Efficiency()))
    start = (believed - low) / (high - low)
    found = least_squares(
        residuals, start, bounds=(0.0, 1.0), loss="soft_l1", f_scale=0.1, diff_step=1e-3, xtol=1e-3, ftol=1e-4
    )
    return Efficiency(*(round(float(value), 3) for value in low + found.x * (high - low)))


def groups(rows: Sequence[Row]) -> list[frozenset[str]]:
    """Systems, those of one source together, in order."""
    found: list[frozenset[str]] = []
    for row in rows:
        group = frozenset(other.system for other in rows if other.source == row.source)
        if group not in found:
            found.append(group)
    return [group for group in found if not any(group < other for other in found)]


def spread(compared: Sequence[Compared]) -> float:
    """Standard deviation of the logarithm of predicted over published throughput."""
    return math.sqrt(statistics.fmean(math.log1p(one.error) ** 2 for one in compared))
