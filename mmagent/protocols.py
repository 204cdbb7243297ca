"""What a user implements. Each protocol is small; `mmagent.testing` has a check for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from mmagent.trajectories import Completion, Item, Limits, Observation, Score, Trajectory
from mmagent.types import PackedVision, ParamRole, StepOutput, VisionFeatures


@runtime_checkable
class VisionEncoder(Protocol):
    """An ``nn.Module`` that turns packed patches into features.

    ``patch_size`` and ``merge_size`` in pixels and patches; ``width`` is W of the returned tokens.
    Images of a pack must not see each other; `mmagent.testing.check_encoder` proves it.
    """

    patch_size: int
    merge_size: int
    width: int

    def __call__(self, vision: PackedVision, layers: Sequence[int] = ()) -> VisionFeatures: ...


@runtime_checkable
class Trainable(Protocol):
    """What engines and optimizers ask of a model, instead of matching its parameters' names."""

    def roles(self) -> Mapping[str, ParamRole]:
        """Every parameter's name to what it is."""
        ...

    def blocks(self) -> Iterable[nn.Module]:
        """Modules to shard or recompute as one unit, inner ones first."""
        ...

    def leaves(self) -> Iterable[nn.Module]:
        """Modules whose parameters must be gathered as a whole (mixture-of-experts blocks under ZeRO-3)."""
        ...


@runtime_checkable
class ExpertParallel(Protocol):
    """Experts, somewhere inside a model, that ranks can share."""

    def split_experts(self, mesh: DeviceMesh) -> None:
        """Keep this rank's share of what is one expert's, as ``DTensor`` parameters sharded along dimension 0 over the
        one-dimensional ``mesh``; from then on tokens travel in the forward. ``ValueError`` where they do not divide."""
        ...


@runtime_checkable
class Objective(Protocol):
    """An ``nn.Module`` around a model and its losses. Returns *sums*: only ``train_step`` divides."""

    weights: Mapping[str, float]

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """``{term: ()}``: how many items each sum runs over, from labels and masks alone, before any forward."""
        ...

    def __call__(self, batch: Any) -> StepOutput: ...

    def after_step(self) -> Mapping[str, float] | None:
        """Non-gradient updates once a step: router bias, EMA, temperature clamp. May return metrics that only a whole
        step has, the same on every rank."""
        ...


@runtime_checkable
class Prepared(Protocol):
    """What an :class:`Objective` may offer beside, if its loss compares samples of *different* micro-batches, or its
    ranks must agree on something before they compute them."""

    def prepare(self, micro_batches: Sequence[Any], forward: Callable[[Any], StepOutput]) -> None:
        """Called by all ranks once a step, before the forward and backward of each of ``micro_batches`` in their
        order. ``forward(batch)`` calls the objective as those will, in the engine's precision; call it under
        ``torch.no_grad``, so that nothing is kept. Draw no random numbers that the forward after it would miss."""
        ...


@runtime_checkable
class Objects(Protocol):
    """What an :class:`Objective` offers beside, if a forward can show that a step must not be taken."""

    def objections(self) -> Sequence[str]:
        """What speaks against the step that this rank's micro-batches have just gone through, in words; called by all
        ranks once a step, after the last backward. No collective: where any rank objects, all raise before a weight
        has moved."""
        ...


@runtime_checkable
class Measured(Protocol):
    """What an :class:`Objective` offers beside, if it knows how much work a batch is."""

    def flops(self, batch: Any) -> float:
        """Useful operations of forward and backward over ``batch``, a multiplication and an addition being two: nothing
        for padding, for what is frozen above what learns, for what is computed again. No collective."""
        ...


@runtime_checkable
class Forgets(Protocol):
    """What an :class:`Objective` offers beside, if its forwards gather what :meth:`Objective.after_step` uses."""

    def forget(self) -> None:
        """Drop what the forwards since the last ``after_step`` gathered: the step they were for is not taken. Whoever
        skips it must leave no trace: what the next step finds is what this one found. No collective."""
        ...


@runtime_checkable
class SharesPacks(Protocol):
    """What an :class:`Objective` offers beside, if ranks may compute one batch together (context parallelism)."""

    def share_packs(self, group: ProcessGroup) -> None:
        """From now on all ranks of ``group`` give the same batches, and each returns sums, counts and metrics of its
        part alone: added up over the group they are those of the whole."""
        ...


class Engine(Protocol):
    """Sharding, precision, clipping and the optimizer behind six calls."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; after the ``last`` gradients are summed over ranks."""
        ...

    def forward(self, batch: Any) -> StepOutput:
        """The objective's forward, through whatever wraps it and in the engine's precision."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Back-propagate; over all micro-batches and ranks the gradient is the *sum*."""
        ...

    def step(self, lr_scale: float = 1.0, role_scales: Mapping[str, float] | None = None) -> float:
        """Clip, step with every learning rate times ``lr_scale``, or that of its role in ``role_scales``, zero. Returns
        the global gradient norm before clipping. An engine that knows the norm of each role's gradient as well leaves
        them in ``role_norms`` (``Mapping[str, float]``). Raises ``FloatingPointError`` where the norm is not finite, on
        all ranks and before any weight has changed."""
        ...

    def discard(self) -> None:
        """Drop the gradients instead of stepping: weights, optimizer and schedule stay as they are. After the last
        micro-step, or after a :meth:`step` that raised."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None: ...


class Policy(Protocol):
    """Something that completes a trajectory: the local generator or a server behind HTTP."""

    version: int

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion: ...


@runtime_checkable
class Identified(Protocol):
    """A :class:`Policy` that can say who it is: ``identity()`` is equal where its numbers come of equal weights and
    settings. ``steady``: to the last bit, whoever else is served at the same time."""

    @property
    def steady(self) -> bool: ...

    def identity(self) -> str: ...


class Environment(Protocol):
    """One episode: ``reset`` once, then ``step`` with what the policy said until the observation is ``done``.

    Nonsense is answered by an observation; only a broken environment raises. ``close`` may be called twice.
    """

    async def reset(self) -> Observation: ...

    async def step(self, action: str) -> Observation: ...

    async def close(self) -> None: ...


@runtime_checkable
class Task(Protocol):
    """One object for the RL reward, the evaluation score and the SFT gold."""

    name: str
    category: str

    def items(self, split: str, seed: int) -> Iterable[Item]:
        """Items of ``split`` ("train" or "test"); the two never share a scene."""
        ...

    def environment(self, item: Item) -> Environment: ...

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        """A value in [0, 1]; an error is not a zero."""
        ...

    def gold(self, item: Item) -> Iterator[str]:
        """Actions that must score 1."""
        ...


@runtime_checkable
class Demonstrates(Protocol):
    """A :class:`Task` whose ``gold`` would start a browser of its own: ``demonstrate`` finds the same actions in the
    pages that the task has, within the running loop."""

    async def demonstrate(self, item: Item) -> list[str]: ...
