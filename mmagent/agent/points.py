"""The places where a user's own code takes part in reinforcement learning, each by one import path.

``points.NAME=package.module:function`` in a config; :data:`POINTS` says what each is called with. What is wrong with a
path is told before anything is played.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from mmagent.agent.advantages import Group
from mmagent.objectives.surrogates import own
from mmagent.protocols import Identified, Policy, Task
from mmagent.trajectories import Completion, Item, Limits, Score, Status, Trajectory


class Point(NamedTuple):
    """``takes`` positional arguments, as ``signature`` says; ``key`` is where a config names it."""

    key: str
    signature: str
    takes: int
    does: str


POINTS = {
    "generate": Point(
        "points.generate", "async (policy, trajectory, limits) -> Completion", 3, "says one turn, in the policy's stead"
    ),
    "rollout": Point(
        "points.rollout", "async (prompts, policy, codec, config, seed) -> trajectories", 5, "plays a whole collection"
    ),
    "reward": Point("points.reward", "async (task, item, trajectory) -> Score", 3, "judges one ended episode"),
    "group_reward": Point(
        "collector.rewards.groups.TASK", "(trajectories) -> rewards", 1, "judges the trajectories of a group together"
    ),
    "aggregate": Point("points.aggregate", "(trajectory) -> reward", 1, "makes one reward of the parts of a score"),
    "post_process": Point(
        "points.post_process", "(trajectories, rewards) -> rewards", 2, "has the last word on rewards"
    ),
    "source": Point(
        "points.source", "(tasks, split, seed) -> draws like ItemStream", 3, "draws prompts, and can be resumed"
    ),
    "dynamic_filter": Point("points.dynamic_filter", "(group) -> bool", 1, "whether a group is trained on"),
    "buffer_filter": Point(
        "points.buffer_filter", "(groups, version) -> groups", 2, "which of the groups that are ready come first"
    ),
    "sample_filter": Point("points.sample_filter", "(trajectory) -> bool", 1, "whether a trajectory is trained on"),
    "advantage": Point(
        "collector.advantages.estimator", "(rewards (N,), group names) -> (N,)", 2, "makes advantages of rewards"
    ),
    "loss": Point("policy.loss", "(tokens, config) -> PolicySum", 2, "the surrogate"),
    "correction": Point(
        "policy.correction", "(trainer (N,), behavior (N,)) -> weights (N,)", 2, "corrects for the sampler's policy"
    ),
    "reduction": Point("policy.reduction", "(rows (N,), trajectories) -> weights (N,)", 2, "weighs tokens"),
    "log": Point("points.log", "(step, record) -> None", 2, "sees every step's record, on every rank"),
    "evaluate": Point(
        "points.evaluate", "async (policy, step) -> figures", 2, "measures the policy every evaluate_every steps"
    ),
    "weights": Point("points.weights", "(policy, version) -> None", 2, "is told when new weights are served"),
}


@dataclass
class PointsConfig:
    """Import paths; empty ones leave what is built in. :data:`POINTS` has the signatures, and those of points that
    stand in other configs."""

    generate: str = ""
    rollout: str = ""
    reward: str = ""
    aggregate: str = ""
    post_process: str = ""
    source: str = ""
    dynamic_filter: str = ""
    buffer_filter: str = ""
    sample_filter: str = ""
    log: str = ""
    evaluate: str = ""
    weights: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            path = getattr(self, field.name)
            if path and ":" not in path:
                raise ValueError(f"points.{field.name}: {path!r} is no import path of the form package.module:name")


class Points:
    """What a :class:`PointsConfig` names, imported; None where it names nothing. Raises ``ValueError`` for what does
    not take the arguments that it will get."""

    def __init__(self, config: PointsConfig | None = None):
        config = config or PointsConfig()
        found = {f.name: own(getattr(config, f.name), f"points.{f.name}", POINTS[f.name].takes) for f in fields(config)}
        self.generate, self.rollout, self.reward = found["generate"], found["rollout"], found["reward"]
        self.aggregate, self.post_process, self.source = found["aggregate"], found["post_process"], found["source"]
        self.dynamic_filter, self.buffer_filter = found["dynamic_filter"], found["buffer_filter"]
        self.sample_filter, self.log = found["sample_filter"], found["log"]
        self.evaluate, self.weights = found["evaluate"], found["weights"]

    def speaking(self, policy: Policy) -> Policy:
        """``policy``, whose turns the user's ``generate`` says where there is one."""
        if self.generate is None:
            return policy
        return _OwnIdentified(policy, self.generate) if isinstance(policy, Identified) else _Own(policy, self.generate)

    async def judge(self, task: Task, item: Item, trajectory: Trajectory) -> Score:
        """The task's verdict, or the user's."""
        if self.reward is None:
            return await task.score(item, trajectory)
        return await self.reward(task, item, trajectory)


class _Own:
    """A policy with another's way of speaking."""

    def __init__(self, policy: Policy, generate: Callable[[Policy, Trajectory, Limits], Any]):
        self.policy, self.generate = policy, generate

    @property
    def version(self) -> int:
        return self.policy.version

    @version.setter
    def version(self, version: int) -> None:
        self.policy.version = version

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        return await self.generate(self.policy, prompt, limits)


class _OwnIdentified(_Own):
    @property
    def steady(self) -> bool:
        return self.policy.steady  # type: ignore[attr-defined]

    def identity(self) -> str:
        return f"{self.generate.__module__}:{self.generate.__qualname__} {self.policy.identity()}"  # type: ignore


# ------------------------------------------------------------------------------------------- ready-made ones


def finished(trajectory: Trajectory) -> bool:
    """A sample filter: those that were cut at a limit count for their group, and are not trained on (DAPO's overlong
    filtering)."""
    return trajectory.status is not Status.TRUNCATED


def medium(group: Group) -> bool:
    """A dynamic filter: groups of which between a fifth and four fifths of the rewards are above one half."""
    passed = sum(reward > 0.5 for reward in group.rewards) / len(group.rewards)
    return 0.2 <= passed <= 0.8


def newest_first(groups: Sequence[Group], version: int) -> list[Group]:
    """A buffer filter: those of the newest policy come first."""
    return sorted(groups, key=lambda group: -group.version)
