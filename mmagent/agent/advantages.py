"""From the rewards of a group of trajectories to one advantage a trajectory.

A group is what one prompt was answered with, found by its id and never by position. Broken environments are
no zeros: their trajectories are removed, and the group is filled up from its valid ones when more than half
are valid, else dropped. A group whose rewards are all equal teaches nothing and is dropped, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmagent.config import locate
from mmagent.dist import World
from mmagent.trajectories import Status, Trajectory

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "raw")
GLOBAL = ("reinforce++", "reinforce++_baseline")
"""Estimators that divide by the deviation over all groups of all ranks."""
SPREAD_FLOOR = 1e-6
"""Rewards of a group closer together than this are equal."""


Estimator = Callable[[Tensor, Sequence[str]], Tensor]
"""``(rewards (N,), group names)`` of this rank to advantages ``(N,)``."""
Shape = Callable[[Sequence[Trajectory]], Sequence[float]]
"""A group's trajectories to their rewards, where these are not what verifiers said."""


@dataclass
class AdvantageConfig:
    """``estimator``: ``grpo`` centres and divides by the standard deviation of the group (Shao et al. 2024),
    ``dr_grpo`` only centres (Liu et al. 2025), ``rloo`` subtracts the mean of the *others* (Ahmadian et al. 2024).
    ``reinforce++`` centres and divides by mean and deviation over all ranks, ``reinforce++_baseline`` does so with
    rewards from which the group's mean was taken (Hu et al. 2025). ``raw`` leaves rewards as they are, for a critic.
    Else the import path of an :data:`Estimator`. ``keep_degenerate``: groups of equal rewards stay, which teach only
    where advantages are not the group's (``reinforce++``, ``raw``, distillation)."""

    estimator: str = "grpo"
    keep_degenerate: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS and ":" not in self.estimator:
            told = f"none of {', '.join(ESTIMATORS)}, and no import path"
            raise ValueError(f"advantage estimator {self.estimator!r} is {told}")


@dataclass(frozen=True)
class Group:
    """Trajectories of one prompt that can be trained on, and how many of the ``size`` had failed. ``shaped``: their
    rewards, where these are not what verifiers said. ``silent``: numbers of those that count for the others' advantages
    and are not trained on themselves."""

    name: str
    trajectories: tuple[Trajectory, ...]
    failed: int
    shaped: tuple[float, ...] = ()
    silent: frozenset[int] = frozenset()

    @property
    def rewards(self) -> tuple[float, ...]:
        return self.shaped or tuple(t.reward for t in self.trajectories)

    @property
    def degenerate(self) -> bool:
        """All rewards equal, so that no advantage but zero exists."""
        return max(self.rewards) - min(self.rewards) < SPREAD_FLOOR

    @property
    def version(self) -> int:
        """The oldest policy that had a part in it."""
        return min(t.policy_version for t in self.trajectories)


@dataclass(frozen=True)
class Selection:
    """What :func:`select` kept, with its counts of groups: ``dropped`` for too many failures, ``degenerate``
    for equal rewards (kept or not)."""

    groups: tuple[Group, ...]
    dropped: int
    degenerate: int

    @property
    def degenerate_share(self) -> float:
        """Share of groups that taught nothing, among those that could be judged."""
        judged = len(self.groups) + self.degenerate
        return self.degenerate / judged if judged else 0.0


def group_advantages(rewards: Tensor, groups: Sequence[str], estimator: str = "grpo") -> Tensor:
    """``rewards (N,)`` and the group of each to ``(N,)`` float32 advantages, in any order of the rows.

    The deviation is the sample's (``n - 1``), as in the reference implementations; a group of equal rewards, or
    of one, gets zeros. What the :data:`GLOBAL` estimators do over all groups is left to :func:`estimate`.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"advantage estimator {estimator!r} is none of {', '.join(ESTIMATORS)}")
    if rewards.shape != (len(groups),):
        raise ValueError(f"{tuple(rewards.shape)} rewards for {len(groups)} group names")
    if estimator in ("raw", "reinforce++"):
        return rewards.float()
    index = {name: n for n, name in enumerate(dict.fromkeys(groups))}
    rows = torch.tensor([index[name] for name in groups], dtype=torch.int64)
    values, zeros = rewards.double(), torch.zeros(len(index), dtype=torch.float64)
    sizes = zeros.index_add(0, rows, torch.ones_like(values))
    centred = values - (zeros.index_add(0, rows, values) / sizes.clamp(min=1))[rows]
    centred = torch.where(centred.abs() < SPREAD_FLOOR / 2, 0.0, centred)
    if estimator == "rloo":
        centred = centred * (sizes / (sizes - 1).clamp(min=1))[rows]
    elif estimator == "grpo":
        deviation = (zeros.index_add(0, rows, centred**2) / (sizes - 1).clamp(min=1)).sqrt()
        centred = centred / deviation.clamp(min=SPREAD_FLOOR)[rows]
    return centred.float()


def estimate(groups: Sequence[Group], estimator: str, world: World | None = None) -> list[float]:
    """The advantage of every trajectory, group by group. A collective where there is a ``world``, for estimators that
    look at all ranks' groups; without one those of this rank are all."""
    rewards = torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float64)
    names = [group.name for group in groups for _ in group.trajectories]
    if ":" in estimator:
        found = locate(estimator)(rewards, names)
        if not isinstance(found, Tensor) or found.shape != rewards.shape or not found.isfinite().all():
            raise ValueError(f"advantage estimator {estimator!r} must give {len(names)} finite numbers, got {found}")
        return found.double().tolist()
    values = group_advantages(rewards, names, estimator).double()
    return (whiten(values, world) if estimator in GLOBAL else values).tolist()


def whiten(values: Tensor, world: World | None = None) -> Tensor:
    """``values (N,)`` float64, less their mean, over their sample's deviation, both over all ranks of ``world``; zeros
    where they are equal."""

    def total(**sums: float) -> dict[str, float]:
        return sums if world is None else world.sum(sums, layout="whiten")

    first = total(count=float(values.numel()), sum=values.sum().item())
    centred = values - first["sum"] / max(first["count"], 1.0)
    deviation = (total(squares=(centred**2).sum().item())["squares"] / max(first["count"] - 1, 1.0)) ** 0.5
    return torch.zeros_like(values) if deviation < SPREAD_FLOOR else centred / deviation


def gather_groups(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Trajectories by group id, groups and members in order of first appearance."""
    found: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.group, []).append(trajectory)
    return found


def select(
    trajectories: Sequence[Trajectory],
    config: AdvantageConfig | None = None,
    shape: Shape | None = None,
    keep: Callable[[Group], bool] | None = None,
    trains: Callable[[Trajectory], bool] | None = None,
) -> Selection:
    """Groups fit for training: failures removed and made up for, hopeless and degenerate groups dropped.

    A group is filled by repeating its valid trajectories in turn. ``shape`` gives rewards in place of the verifiers'.
    ``keep`` decides about a group instead of its spread (a dynamic filter; what it drops counts as ``degenerate``),
    ``trains`` whether a trajectory is trained on (a sample filter; it still counts for the others' advantages). Raises
    ``ValueError`` for a trajectory that is still running or was stopped on the way: it belongs in a buffer, not in a
    batch.
    """
    config = config or AdvantageConfig()
    kept: list[Group] = []
    dropped = degenerate = 0
    for name, members in gather_groups(trajectories).items():
        unfinished = [t.key for t in members if t.status in (Status.RUNNING, Status.ABORTED)]
        if unfinished:
            raise ValueError(f"group {name!r}: trajectory {unfinished[0]!r} has not ended")
        valid = [t for t in members if t.status is not Status.FAILED]
        missing = len(members) - len(valid)
        if 2 * len(valid) <= len(members):
            dropped += 1
            continue
        rewards = list(shape(valid)) if shape is not None else [t.reward for t in valid]
        rows = (*valid, *valid[:missing])
        silent = frozenset(n for n, row in enumerate(rows) if trains is not None and not trains(row))
        shaped = () if shape is None else (*rewards, *rewards[:missing])
        group = Group(name, rows, missing, shaped, silent)
        teaches = keep(group) if keep is not None else not group.degenerate or config.keep_degenerate
        degenerate += not teaches or (keep is None and group.degenerate)
        if teaches and len(silent) < len(rows):
            kept.append(group)
    return Selection(tuple(kept), dropped, 0 if config.keep_degenerate and keep is None else degenerate)
