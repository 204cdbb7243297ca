"""Grade items by recorded rollouts: how often a policy was right, of how many tries, for `curriculum.grades`.

    python -m recipes.rl --preset laptop train=false collector.record=runs/pool steps=50 output=runs/play
    python -m recipes.grade_items rollouts=runs/pool output=runs/grades.json
    python -m recipes.rl --preset laptop collector.curriculum.grades=runs/grades.json \\
        "collector.curriculum.bands={0: [0.2, 0.9], 300: [0.01, 0.3]}"

The training must be given the seed of the recording run, so that it draws from the same items. Tries of several runs,
whose folders are named with commas between, add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmagent.agent.difficulty import Grades
from mmagent.agent.store import load_trajectories
from mmagent.config import ConfigError, parse_cli
from mmagent.train.launch import launch
from mmagent.trajectories import Trajectory


@dataclass
class Config:
    """Folders that ``collector.record`` left, separated by commas; pass@``k`` is printed, for every task."""

    rollouts: str = "runs/pool"
    output: str = "runs/grades.json"
    k: list[int] = field(default_factory=lambda: [1, 8])


def recorded(folders: str) -> Iterator[Trajectory]:
    """All trajectories under ``folders``. Raises ``ConfigError`` naming one that has none."""
    for folder in folders.split(","):
        found = sorted(path.parent for path in Path(folder).glob("*/rank-*/trajectories.json"))
        if not found:
            raise ConfigError(f"rollouts={folder} holds none: record them with collector.record={folder}")
        for path in found:
            yield from load_trajectories(path)


def main() -> None:
    """Count, write, and print a line a task."""
    config = parse_cli({"laptop": Config}, __doc__ or "")
    grades = Grades.of(recorded(config.rollouts))
    grades.save(config.output)
    for task, items in grades.counts.items():
        known = [(k, grades.pass_at(task, k)) for k in config.k]
        told = ", ".join(f"pass@{k} {value:.3f}" for k, value in known if value is not None)
        print(f"{task}: {len(items)} items, {told or 'too few tries'}")


if __name__ == "__main__":
    launch(main)
