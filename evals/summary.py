"""Rows to figures: score with interval, by task, pass@k, cost; and one run against another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.statistics import Comparison, Estimate, compare_paired, mean_interval, pass_at_k, slices
from evals.store import Row, Run, check_comparable

RIGHT = 1.0 - 1e-9


@dataclass(frozen=True)
class Summary:
    """``score`` is the mean over tasks of their means; ``errors`` items are in no mean; ``pass_at``: k to pass@k.

    ``parts``: means of the scores' named parts; a part that an item lacks (nothing was rendered, the answer was not
    malformed) counts 0 there.
    """

    score: Estimate
    by_task: Mapping[str, Estimate]
    judged: int
    errors: int
    truncated: int
    pass_at: Mapping[int, float]
    parts: Mapping[str, float]
    tokens_per_item: float
    seconds_per_item: float


def item_values(rows: Iterable[Row]) -> dict[tuple[str, str], list[float]]:
    """``{(task, item): values of its samples}`` of everything that could be judged."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.value is not None:
            values.setdefault((row.task, row.item), []).append(row.value)
    return values


def summarise(rows: Sequence[Row], *, seed: int = 0) -> Summary:
    """Scores with bootstrap intervals over tasks, by task and by part; items that failed are counted, not averaged."""
    values = item_values(rows)
    tasks = [task for task, _ in values]
    means = [float(np.mean(v)) for v in values.values()]
    judged = [row for row in rows if row.value is not None]
    names = dict.fromkeys(name for row in judged for name in row.parts)
    return Summary(
        score=mean_interval(means, tasks, seed=seed),
        by_task={
            str(task): e for task, e in sorted(slices(tasks, means, seed=seed).items(), key=lambda kv: str(kv[0]))
        },
        judged=len(judged),
        errors=len(rows) - len(judged),
        truncated=sum(row.status == "truncated" for row in judged),
        pass_at=_pass_at(values),
        parts={n: float(np.mean([row.parts.get(n, 0.0) for row in judged])) for n in names},
        tokens_per_item=float(np.mean([row.completion_tokens for row in judged])) if judged else 0.0,
        seconds_per_item=float(np.mean([row.seconds for row in judged])) if judged else 0.0,
    )


def _pass_at(values: Mapping[tuple[str, str], list[float]]) -> dict[int, float]:
    """pass@1, 2, 4, ... up to the smallest number of samples an item has; empty for single samples."""
    fewest = min((len(v) for v in values.values()), default=0)
    if fewest < 2:
        return {}
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < fewest] + [fewest]
    return {k: float(np.mean([pass_at_k(len(v), sum(x >= RIGHT for x in v), k) for v in values.values()])) for k in ks}


def compare_runs(a: Run, b: Run, allow: Iterable[str] = ()) -> Comparison:
    """Run ``b`` against run ``a`` on the items that both judged.

    Raises :class:`~evals.store.PinsDiffer` when anything but the policy was pinned otherwise.
    """
    check_comparable(a.pins, b.pins, allow)
    first, second = (
        {f"{task}/{item}": (task, float(np.mean(v))) for (task, item), v in item_values(run.rows).items()}
        for run in (a, b)
    )
    tasks = {key: task for key, (task, _) in (first | second).items()}
    return compare_paired({k: v for k, (_, v) in first.items()}, {k: v for k, (_, v) in second.items()}, tasks)
