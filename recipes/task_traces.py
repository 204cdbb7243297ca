"""Write conversations of tasks as shards that `recipes.sft` trains on: the tasks' answers, or a policy's right ones.

    python -m recipes.task_traces folder=runs/traces/gold tasks=[worlds/counting/objects,games/maze] per_task=100
    python -m recipes.rl --preset laptop train=false collector.record=runs/rollouts tasks=[games/maze] output=runs/play
    python -m recipes.task_traces folder=runs/traces/own tasks=[games/maze] rollouts=runs/rollouts answers=own

Every conversation is played through its task's environment, so what later turns show is what the answers brought about,
and kept if it ends with a score of ``least`` or more. The second form is one round of expert iteration: sample with the
collector, keep verified right answers, fine-tune on them. A folder is written once: a call that finds it whole is done,
and one that asks for something else than what was written is refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from data_pipelines.shards import ShardWriter
from mmagent.agent.advantages import gather_groups
from mmagent.agent.codec import Codec
from mmagent.agent.rollout import group_of
from mmagent.config import ConfigError, parse_cli
from mmagent.files import new_folder
from mmagent.interop.agent_folder import load_agent
from mmagent.protocols import Task
from mmagent.tasks import open_tasks
from mmagent.train.launch import launch
from mmagent.trajectories import Item, Status
from recipes.conversations import answer, conversation
from recipes.grade_items import recorded

ASKED = "asked.json"
SEARCHED = 100_000
"""Items of a task among which those of rollouts are looked for."""
NOT_RIGHT = ", not right"
Asked = tuple[Task, Item, list[str] | None]
"""An item, and what was said; None: the task's own answer."""


@dataclass
class Config:
    """``per_task`` items of ``split`` under ``seed``, or, where ``rollouts`` names what ``collector.record`` left, its
    prompts (``seed`` must be that run's): with the tasks' answers (``gold``), or with at most ``each`` different right
    ones of the rollouts (``own``), read with the vocabulary of ``agent``."""

    folder: str = "runs/traces"
    tasks: list[str] = field(default_factory=list)
    split: str = "train"
    seed: int = 0
    per_task: int = 100
    rollouts: str = ""
    answers: str = "gold"
    agent: str = "runs/sft/agent"
    each: int = 1
    least: float = 1.0
    pages: int = 8

    def __post_init__(self) -> None:
        if self.answers not in ("gold", "own") or (self.answers == "own" and not self.rollouts):
            raise ConfigError(f"answers must be gold, or own of rollouts that are named, got {self.answers!r}")
        if min(self.per_task, self.each) < 1:
            raise ConfigError("per_task and each must be at least 1")


def gold(tasks: Sequence[Task], config: Config) -> Iterator[Asked]:
    """Every task's first items, in turn."""
    for row in zip(*(islice(task.items(config.split, config.seed), config.per_task) for task in tasks), strict=True):
        for task, item in zip(tasks, row, strict=True):
            yield task, item, None


def played(tasks: Sequence[Task], config: Config) -> Iterator[Asked]:
    """The prompts of rollouts on ``tasks``; for ``own`` answers with what was said in those that were right."""
    names = {task.name for task in tasks}
    rows = [row for row in recorded(config.rollouts) if row.source in names]
    groups = gather_groups(rows)
    agent = load_agent(config.agent) if config.answers == "own" else None
    codec = Codec(agent.vocab, agent.geometry, agent.chat) if agent else None
    for task in tasks:
        left = {group for group in groups if groups[group][0].source == task.name}
        items = islice(task.items(config.split, config.seed), SEARCHED)
        while left:
            item = next(items, None)
            if item is None:
                raise ConfigError(f"{config.rollouts}: {min(left)} is no item of seed {config.seed}; is it that run's?")
            if (group := group_of(task, item)) not in left:
                continue
            left.remove(group)
            if codec is None:
                yield task, item, None
                continue
            right = [row for row in groups[group] if row.status is Status.FINISHED and row.reward >= config.least]
            for actions in sorted({tuple(codec.actions(row)) for row in right})[: config.each]:
                yield task, item, list(actions)


def _asked(config: Config) -> str:
    """All that decides what is written."""
    return json.dumps({k: v for k, v in asdict(config).items() if k not in ("folder", "pages")}, indent=1) + "\n"


def written(config: Config) -> bool:
    """Whether it is there already. Raises ``ConfigError`` where something else is."""
    folder = Path(config.folder)
    if not (folder / "traces.json").is_file():
        return False
    if not (folder / ASKED).is_file() or (folder / ASKED).read_text(encoding="utf-8") != _asked(config):
        raise ConfigError(f"folder={folder} holds other traces than are asked for now (see {ASKED}); name another")
    return True


async def write(config: Config) -> dict[str, int]:
    """The shards, and ``traces.json``: how many conversations of each task were kept, and how many were not."""
    if not config.tasks:
        raise ConfigError("tasks: name at least one")
    counts: dict[str, int] = {}
    with new_folder(Path(config.folder)) as beside:
        async with open_tasks(config.tasks, pages=config.pages) as tasks:
            with ShardWriter(beside) as writer:
                for task, item, actions in (played if config.rollouts else gold)(tasks, config):
                    said = await answer(task, item) if actions is None else actions
                    record = await conversation(task, item, said, config.least)
                    name = task.name if record else f"{task.name}{NOT_RIGHT}"
                    counts[name] = counts.get(name, 0) + 1
                    if record:
                        writer.write(record)
        (beside / ASKED).write_text(_asked(config), encoding="utf-8")
        (beside / "traces.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    """Write what is not written yet, and say what there is."""
    config = parse_cli({"laptop": Config}, __doc__ or "")
    counted = Path(config.folder) / "traces.json"
    if there := written(config):
        print(f"{counted} is there already; another folder, or none there, for others")
    counts = json.loads(counted.read_text(encoding="utf-8")) if there else asyncio.run(write(config))
    for name, count in counts.items():
        print(f"{name}: {count}")
    if not any(count for name, count in counts.items() if not name.endswith(NOT_RIGHT)):
        print(f"no answer was right: {config.folder} holds no conversation")


if __name__ == "__main__":
    launch(main)
