"""How hard items are, found out before training: how often a policy was right, of how many tries, item by item.

A file of grades is made of recorded rollouts (``python -m recipes.grade_items``): play a pool of items many times with
a policy that is at hand, and keep the counts. A curriculum then takes, stage by stage, items whose grade lies in a band
(GLM-4.5, arXiv 2508.06471: middling ones first, then those that are hard, and that a policy yet solves sometimes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb
from pathlib import Path

from mmagent.files import write_text
from mmagent.trajectories import Item, Status, Trajectory

FORMAT = 1
PASS = 0.5
"""A reward from here on counts as passed, for pass@k."""


def pass_at(right: int, tries: int, k: int) -> float:
    """Unbiased chance that one of ``k`` tries is right, from ``right`` of ``tries`` (arXiv 2107.03374, equation 1)."""
    if not 0 <= right <= tries or not 1 <= k <= tries:
        raise ValueError(f"pass@{k} of {right} right among {tries} tries")
    return 1.0 - comb(tries - right, k) / comb(tries, k)


@dataclass(frozen=True)
class Grades:
    """``counts[task][item key]``: right answers and tries."""

    counts: Mapping[str, Mapping[str, tuple[int, int]]]

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Grades:
        """What came of recorded episodes; failed ones were no tries. Episodes of an item add up."""
        counts: dict[str, dict[str, tuple[int, int]]] = {}
        for row in trajectories:
            if row.status in (Status.FAILED, Status.ABORTED, Status.RUNNING):
                continue
            own = counts.setdefault(row.source, {})
            right, tries = own.get(key := row.group.removeprefix(f"{row.source}/"), (0, 0))
            own[key] = right + (row.reward >= PASS), tries + 1
        return cls(counts)

    def rate(self, item: Item) -> float | None:
        """Share of tries that were right; None for an item that was not played."""
        found = self.counts.get(item.task, {}).get(item.key)
        return found[0] / found[1] if found else None

    def task_rate(self, task: str) -> float | None:
        """Mean of its items' rates; None for a task that was not played."""
        rates = [right / tries for right, tries in self.counts.get(task, {}).values()]
        return sum(rates) / len(rates) if rates else None

    def pass_at(self, task: str, k: int) -> float | None:
        """pass@k of a task: the mean over items that were tried so often; None without any."""
        found = [pass_at(right, tries, k) for right, tries in self.counts.get(task, {}).values() if tries >= k]
        return sum(found) / len(found) if found else None

    def save(self, path: Path | str) -> None:
        write_text(Path(path), json.dumps({"format": FORMAT, "counts": self.counts}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Grades:
        """Raises ``ValueError`` naming the file where it is missing or holds something else."""
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            if body["format"] != FORMAT:
                raise ValueError(f"format {body['format']!r}, this version reads {FORMAT}")
            counts = {
                task: {key: (int(right), int(tries)) for key, (right, tries) in items.items()}
                for task, items in body["counts"].items()
            }
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing: grade items with python -m recipes.grade_items") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no grades of items: {error}") from error
        odd = [f"{t}/{k}" for t, items in counts.items() for k, (r, n) in items.items() if not 0 <= r <= n or n < 1]
        if odd:
            raise ValueError(f"{path}: {odd[0]} has more right answers than tries, or no try")
        return cls(counts)


def band_at(bands: Mapping[int, list[float]], collection: int) -> tuple[float, float] | None:
    """The band that holds in a collection: that of the last stage which has begun; None before the first."""
    begun = [start for start in bands if start <= collection]
    return (bands[max(begun)][0], bands[max(begun)][1]) if begun else None
