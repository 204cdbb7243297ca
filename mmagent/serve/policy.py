"""What the server needs of a policy; :class:`mmagent.generation.local.LocalPolicy` is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from mmagent.trajectories import Completion, Limits, Trajectory


class Delta(Protocol):
    """What was sampled since the last one; the last brings the whole ``completion``."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def completion(self) -> Completion | None: ...


class Policy(Protocol):
    """Cancelling the task of ``complete``, and closing the iterator of ``stream``, cancels the request."""

    version: int

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion: ...
    def stream(self, prompt: Trajectory, limits: Limits) -> AsyncIterator[Delta]: ...


def cache_use(policy: object) -> Mapping[str, float]:
    """Figures about the key-value cache, where the policy's generator tells them."""
    told = getattr(getattr(policy, "generator", None), "cache_use", None)
    return told() if callable(told) else {}


class Whole:
    """A policy that cannot stream, told whole at the end."""

    def __init__(self, policy: Any):
        self.policy = policy

    @property
    def version(self) -> int:
        return self.policy.version

    @property
    def generator(self) -> Any:
        return self.policy.generator

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        return await self.policy.complete(prompt, limits)

    async def stream(self, prompt: Trajectory, limits: Limits) -> AsyncIterator[Any]:
        from types import SimpleNamespace

        done = await self.policy.complete(prompt, limits)
        yield SimpleNamespace(ids=done.ids, logprobs=done.logprobs, completion=done)
