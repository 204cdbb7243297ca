"""What an agent scores on held-out items of any tasks of the library, task by task.

    python -m recipes.judge_tasks init=runs/rl/agent tasks=[worlds/counting/objects,games/maze] output=runs/judged

Greedy, through the runner of `evals`: kill it at any moment, the same command goes on. It leaves ``scores.json``, the
score of every item by task, in the order of items, and `evals`' run folder beside it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from evals.local import LocalAgent
from evals.runner import Options, evaluate_now
from evals.suite import Play, Suite
from mmagent.config import ConfigError, parse_cli
from mmagent.files import write_text
from mmagent.interop.agent_folder import load_agent
from mmagent.tasks import open_tasks
from mmagent.tasks.catalogue import needs_browser
from mmagent.train.launch import launch


@dataclass
class Config:
    """``per_task`` test items of each task under ``seed``, in episodes of ``max_steps`` turns of ``max_tokens``."""

    init: str = "runs/rl/agent"
    output: str = "runs/judged"
    tasks: list[str] = field(default_factory=list)
    per_task: int = 50
    seed: int = 0
    max_steps: int = 6
    max_tokens: int = 64
    temperature: float = 0.0
    concurrency: int = 64

    def __post_init__(self) -> None:
        if self.per_task < 1:
            raise ConfigError(f"per_task must be at least 1, got {self.per_task}")


def suite_of(config: Config) -> Suite:
    """Those tasks as `evals` takes them."""
    return Suite(
        name="named_tasks",
        version=1,
        summary="Tasks by name, as reinforcement learning plays them.",
        prompt="the task's own",
        judge="the task's own (mmagent.tasks)",
        tasks=tuple(config.tasks),
        open=open_tasks,
        per_task=config.per_task,
        play=Play(config.max_steps, config.max_tokens, config.temperature),
        seed=config.seed,
        needs_browser=any(map(needs_browser, config.tasks)),
    )


def judge(config: Config) -> dict[str, list[float]]:
    """``{task: score of every item}``, written as well. Raises ``RuntimeError`` naming the first item that could not
    be judged: to leave it out would compare agents on different items. ``ConfigError`` where no task is named."""
    if not config.tasks:
        raise ConfigError("tasks: name at least one")
    agent = load_agent(config.init)
    who = LocalAgent(agent, config.init)
    options = Options(concurrency=config.concurrency, progress=False, retry_errors=True)
    run = evaluate_now(suite_of(config), who, Path(config.output) / "run", options)
    if run.errors:
        raise RuntimeError(f"{config.output}: {run.errors[0].key} could not be judged: {run.errors[0].error}")
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for row in sorted(run.judged, key=lambda row: row.key):
        scores[row.task].append(row.value)
    write_text(Path(config.output) / "scores.json", json.dumps(scores, indent=1) + "\n")
    return dict(scores)


def main() -> None:
    """Judge, and print a line a task."""
    for task, scores in judge(parse_cli({"laptop": Config}, __doc__ or "")).items():
        print(f"{task}: {sum(scores) / len(scores):.3f} of {len(scores)}")


if __name__ == "__main__":
    launch(main)
