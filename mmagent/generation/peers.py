"""Ranks that decode one sequence together: what they say to each other, and how they fail together.

They have two groups of their own. In ``now`` one thing happens after the other, and everyone waits for it; in ``ahead``
transfers go on while ranks compute. Collectives of one group keep an order, so were both in one, what is needed at once
would stand behind what may take its time.

A rank that fails leaves its peers in the middle of something. It gives both groups up, which ends that with an error
everywhere; then all tell what they know over the group they came from, and each raises the cause.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmagent import dist
from mmagent.models.context import Context


class PeerLost(RuntimeError):
    """Something that ranks do together did not come to its end: a peer failed, or is gone, or late."""


class Peers:
    """The ranks of ``context``, numbered from 0, or this one alone. To be built by all ranks of the world, each with
    its own. ``timeout`` (seconds) bounds what they do together; ``device`` is where their tensors live."""

    def __init__(self, context: Context, timeout: float, device: torch.device):
        self.rank, self.ranks = context.rank, context.ranks
        self.broken = ""
        self._group, self._device = context.group, device
        self._now = self._ahead = None
        if self.ranks > 1:
            self._now, self._ahead = (dist.twin(context.group, timeout, device) for _ in range(2))

    # ------------------------------------------------------------ together; nothing where one is alone

    def gather_into(self, everyone: Tensor, rows: Tensor) -> None:
        """``rows (n, ...)`` of every rank into ``everyone (R * n, ...)``, in order of ranks."""
        if self.ranks == 1:
            everyone.copy_(rows)
            return
        with _reaching():
            dist.gather_into(everyone, rows, self._now)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite ``tensor`` with that of rank ``source``."""
        if self.ranks > 1:
            with _reaching():
                dist.broadcast(tensor, self._world(source), self._now)

    def broadcast_ahead(self, tensor: Tensor, source: int) -> Callable[[], None]:
        """The same, while ranks compute: call what is returned before ``tensor`` is read or, on the source, changed."""
        if self.ranks == 1:
            return lambda: None
        with _reaching():
            ended = dist.broadcast_ahead(tensor, self._world(source), self._ahead)

        def wait() -> None:
            with _reaching():
                ended()

        return wait

    def send(self, tensor: Tensor, receiver: int) -> None:
        with _reaching():
            dist.exchange([(tensor, self._world(receiver))], [], self._now)

    def receive(self, buffer: Tensor, sender: int) -> Tensor:
        """``buffer``, filled."""
        with _reaching():
            dist.exchange([], [(buffer, self._world(sender))], self._now)
        return buffer

    def all_to_all(self, rows: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """As :func:`mmagent.dist.all_to_all`."""
        if self.ranks == 1:
            return rows
        with _reaching():
            return dist.all_to_all(rows, sends, receives, self._now)

    # ------------------------------------------------------------ agreeing

    def agree(self, value: Any, problem: str) -> None:
        """Raise ``ValueError`` on all ranks where one has a ``problem`` (in words), or their ``value`` (anything JSON
        can hold) is not the same, before one waits for what another never does."""
        if self.broken:
            raise RuntimeError(f"ranks failed together before, and cannot go on: {self.broken}")
        if self.ranks == 1:
            if problem:
                raise ValueError(problem)
            return
        found = dist.gather_objects([value, problem], self._device, self._group)
        if said := [f"rank {rank} of {self.ranks}: {told}" for rank, (_, told) in enumerate(found) if told]:
            raise ValueError("\n".join(said))
        if any(other != found[0][0] for other, _ in found):
            raise ValueError(
                f"the {self.ranks} ranks of a group decode one list of prompts together, but came with different "
                f"prompts, limits or settings: {[other for other, _ in found]}"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks come to the end of the block, or all raise: who failed its own error, others a ``RuntimeError``
        that says whose it was."""
        if self.ranks == 1:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
            self._give_up(error)
        except BaseException as error:  # asked to end: others are told by what they wait for, and nobody is waited for
            self._give_up(error)
            raise
        own = "" if problem is None else f"{type(problem).__name__}: {problem}"
        try:
            told = dist.gather_objects([own, isinstance(problem, PeerLost)], self._device, self._group)
        except RuntimeError as gone:
            raise PeerLost(f"a rank is gone, and cannot say why: {own or gone}") from problem or gone
        failed = [(rank, text, lost) for rank, (text, lost) in enumerate(told) if text]
        if not failed:
            return
        causes = [item for item in failed if not item[2]] or failed
        self.broken = "\n".join(f"rank {rank} of {self.ranks}: {text}" for rank, text, _ in causes)
        if problem is not None and not isinstance(problem, PeerLost):
            raise problem
        raise RuntimeError(self.broken) from problem

    def _give_up(self, error: BaseException) -> None:
        """Gloo closes its connections, and so tells peers, when the last reference to a group or to what is under way
        in it goes; the frames that ``error`` came through hold some. A transfer ahead that others have not begun would
        keep us here, but what waits in ``now`` ends first, and who is furthest behind has begun no such transfer."""
        self.broken = f"{type(error).__name__}: {error}"
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        groups = [self._now, self._ahead]
        self._now = self._ahead = None
        gc.collect()
        while groups:
            group = groups.pop(0)
            assert group is not None
            dist.abort(group)
            del group

    def _world(self, rank: int) -> int:
        assert self._group is not None
        return dist.first_of(self._group, rank)


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error
