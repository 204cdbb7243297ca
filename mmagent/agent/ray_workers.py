"""Rollout workers as actors of a Ray cluster: generators that decode for a trainer elsewhere.

A worker holds the agent that the run begins with and is given weights in buckets through Ray's object store, where they
lie once for all workers of a machine; the same objects bring up a worker that was started again. It is asked through a
:class:`RayDoor` of a :class:`~mmagent.generation.fleet.Fleet`, as servers behind HTTP are.

Ray is an extra: ``pip install 'mmagent[ray]'``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from mmagent import dist
from mmagent.generation.block_decoding import make_generator
from mmagent.generation.generator import GeneratorConfig
from mmagent.generation.http_transport import EndpointRefused, EndpointUnavailable, OtherWeights
from mmagent.generation.local import LocalPolicy
from mmagent.generation.token_endpoints import UNKNOWN
from mmagent.generation.updates import Bucket, Manifest, Source
from mmagent.generation.weights import HalfWritten
from mmagent.interop.agent_folder import load_agent
from mmagent.ops.tensor_files import WeightsError
from mmagent.trajectories import Completion, Limits, Trajectory


@dataclass(frozen=True)
class Parcel:
    """A version in the object store: an object ``(n,)`` uint8 a bucket, their checksums, and the seal of all."""

    manifest: str
    objects: tuple[Any, ...]
    digests: tuple[bytes, ...]
    seal: bytes


class ParcelBuckets:
    """A parcel as a :class:`~mmagent.generation.updates.Source`: one bucket at a time is fetched."""

    def __init__(self, parcel: Parcel):
        self.parcel, self.manifest = parcel, Manifest.from_json(parcel.manifest)

    def __iter__(self) -> Iterator[Bucket]:
        parcel, count = self.parcel, len(self.parcel.objects)
        for index, (where, told) in enumerate(zip(parcel.objects, parcel.digests, strict=True)):
            data = torch.from_numpy(ray.get(where).copy())  # what lies there is not to be written to
            yield Bucket(self.manifest.version, index, count, data, told, parcel.seal if index == count - 1 else b"")


def put_parcel(source: Source, full: bool = False) -> Parcel | None:
    """A version into the object store, by the main rank of those that hold the model whole. It lies there as long as
    somebody here has the parcel."""
    if not dist.is_main():
        return None
    objects, digests, seal = [], [], b""
    for bucket in source:
        objects.append(ray.put(bucket.data.numpy()))
        digests.append(bucket.digest)
        seal = bucket.seal
    return Parcel(source.manifest.to_json(), tuple(objects), tuple(digests), seal)


class RolloutWorker:
    """An actor: the agent in ``folder`` behind a generator. Its weights are version -1 until it is given some."""

    def __init__(self, folder: str, config: GeneratorConfig):
        agent = load_agent(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = agent.model.eval().to(device)
        self.policy = LocalPolicy(make_generator(model, agent.vocab, config), UNKNOWN)

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        """Cancelled with its task."""
        return await self.policy.complete(prompt, limits)

    async def load(self, parcel: Parcel, in_flight: str) -> None:
        """Serve a version. Raises :class:`~mmagent.ops.tensor_files.WeightsError`."""
        await self.policy.update(ParcelBuckets(parcel), in_flight)

    async def version(self) -> int:
        """Of the weights that are served."""
        return self.policy.version

    async def pid(self) -> int:
        """Of the worker's process."""
        return os.getpid()


class RayDoor:
    """The worker of this ``name`` as a :class:`~mmagent.generation.fleet.Door`."""

    def __init__(self, name: str, in_flight: str = "finish", timeout: float = 300.0, update_timeout: float = 900.0):
        self.name, self.in_flight, self.version = name, in_flight, UNKNOWN
        self.timeout, self.update_timeout = timeout, update_timeout
        self._coming = UNKNOWN

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        """Raises what the worker's policy raises, :class:`EndpointUnavailable` where the worker is gone, and
        :class:`OtherWeights` where it was started again meanwhile."""
        oldest = self.version
        completion = await self._asked(self.timeout, "complete", prompt, limits)
        newest = max(self.version, self._coming)
        if strange := [v for v in completion.versions if not oldest <= v <= newest or v == UNKNOWN]:
            raise OtherWeights(f"{self.name}: {prompt.key}: sampled by version {strange[0]}, not {oldest} to {newest}")
        return completion

    async def ready(self, timeout: float) -> None:
        """Raises :class:`EndpointUnavailable` where the worker does not answer in time."""
        await self._asked(timeout, "version")

    async def hold(self, version: int, *, wait: bool = True) -> None:
        """The worker itself holds requests back; a version is on its way."""
        self._coming = version

    async def load(self, folder: Parcel, version: int) -> None:
        """Raises :class:`EndpointRefused` for weights that do not fit."""
        try:
            await self._asked(self.update_timeout, "load", folder, self.in_flight)
        except WeightsError as error:
            raise EndpointRefused(f"{self.name}: version {version} was not taken: {error}") from error

    def release(self, version: int, confirmed: bool) -> None:
        """It serves ``version``, or nobody knows what."""
        self.version, self._coming = (version, UNKNOWN) if confirmed else (UNKNOWN, UNKNOWN)

    async def inspect(self) -> None:
        """Raises :class:`OtherWeights` where it serves others than were given."""
        told = await self._asked(self.timeout, "version")
        if told != self.version:
            raise OtherWeights(f"{self.name} serves version {told}, not {self.version}")

    async def _asked(self, timeout: float, what: str, *given: Any) -> Any:
        """What a method of the worker returns; it is cancelled there with this task."""
        try:
            actor = await asyncio.to_thread(ray.get_actor, self.name)
            asked = getattr(actor, what).remote(*given)
        except (ValueError, RayError) as error:  # there is none of this name, or the cluster does not answer
            raise EndpointUnavailable(f"{self.name}: {error}") from error
        try:
            return await asyncio.wait_for(asked, timeout)
        except asyncio.CancelledError:
            ray.cancel(asked)
            raise
        except TimeoutError as error:
            ray.cancel(asked)
            raise EndpointUnavailable(f"{self.name}: no answer to {what} within {timeout:g} s") from error
        except (RayActorError, GetTimeoutError, HalfWritten) as error:
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise EndpointUnavailable(f"{self.name}: {told[0]}") from error
