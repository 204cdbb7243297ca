"""New weights for a server in service: versions out of the one folder that the command line names.

A version is a folder of :class:`~mmagent.generation.versions.Versions`, by its name there, with its checksums. Requests
wait while it is read; what becomes of those in flight is said by who asks
(:class:`~mmagent.generation.updates.WeightUpdate`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent.generation.local import LocalPolicy
from mmagent.generation.updates import IN_FLIGHT, buckets_of_state
from mmagent.generation.versions import ChainBuckets, Link, Versions
from mmagent.ops.tensor_files import WeightsError
from mmagent.serve.fields import Fields
from mmagent.serve.refusals import Refused, bad
from mmagent.serve.wire import LOGGER

_NUMBER = re.compile("[0-9]{1,18}")
_IGNORED = ("flush_cache", "abort_all_requests")  # what SGLang's clients say; both are so anyway


@dataclass(frozen=True)
class UpdateAsk:
    """Version ``version`` in ``folder`` (a name), and what becomes of requests ``in_flight``. ``seal``: that of the
    version that is meant; empty for whichever lies there."""

    folder: str
    version: int
    in_flight: str = "finish"
    seal: bytes = b""


def read_update(body: Mapping[str, Any]) -> UpdateAsk:
    """The body of ``POST /update_weights_from_disk``. Raises :class:`~mmagent.serve.refusals.Refused` (400)."""
    fields = Fields(body)
    folder, told = fields.text("model_path", None), fields.text("weight_version", None)
    in_flight, seal = fields.text("in_flight", "finish"), fields.text("seal", "") or ""
    fields.done(_IGNORED)
    if not folder or "\0" in folder or not told or not _NUMBER.fullmatch(told):
        raise bad("model_path and weight_version (a number in a text) are needed", "weight_version")
    if in_flight not in IN_FLIGHT:
        raise bad(f"in_flight: {in_flight!r:.40} is none of {', '.join(IN_FLIGHT)}", "in_flight")
    try:
        return UpdateAsk(folder, int(told), in_flight, bytes.fromhex(seal))
    except ValueError as error:
        raise bad("seal: a number in hexadecimal digits is wanted", "seal") from error


class Updates:
    """Takes versions from the folders in ``root`` for ``policy``, which starts as version -1, one at a time. One that
    has begun to be written is written to its end, though who asked for it leaves: half of one serves nobody."""

    def __init__(self, root: Path, policy: LocalPolicy):
        if not root.is_dir():
            raise ValueError(f"--updates {root}: there is no such folder")
        self.root, self.policy = root.resolve(), policy
        self._turn = asyncio.Lock()
        self._seal = b""  # of what is served
        self._running: set[asyncio.Task[None]] = set()

    async def take(self, ask: UpdateAsk) -> None:
        """Serve the version that is asked for; one that is served already is not read again. Raises
        :class:`~mmagent.serve.refusals.Refused`: 403 for a folder elsewhere, 422 for one that is not sound."""
        folder = (self.root / Path(ask.folder).name).resolve()
        if folder.parent != self.root or Path(ask.folder).name in ("", ".", ".."):
            raise _elsewhere(self.root, Path(ask.folder).name)
        task = asyncio.create_task(self._take(folder, ask))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.shield(task)

    async def _take(self, folder: Path, ask: UpdateAsk) -> None:
        async with self._turn:
            try:
                source = await asyncio.to_thread(self._checked, folder, ask)
                if source is None:
                    return
                self._seal = b""
                await self.policy.update(source, ask.in_flight, cast=True)
            except (WeightsError, OSError) as error:
                LOGGER.error("version %d was not taken: %s", ask.version, error)
                raise Refused(422, f"version {ask.version} was not taken: {error}", code="bad_version") from error
            self._seal = source.seal

    def _checked(self, folder: Path, ask: UpdateAsk) -> ChainBuckets | None:
        """The version, of which every bit is right: what is damaged is found while the old weights still serve. None
        where it is what is served."""
        versions, link, version = Versions(self.root), Link.of(folder), ask.version
        if link.version != version:
            raise WeightsError(f"{folder.name} holds version {link.version}, not {version}")
        if folder != versions.folder(version):  # which is where it, and what it is told from, are looked for
            raise WeightsError(f"version {version} is read from {versions.folder(version).name}, not {folder.name}")
        if elsewhere := [one.folder.name for one in versions.chain(version) if one.folder.resolve() != one.folder]:
            raise _elsewhere(self.root, elsewhere[0])
        if ask.seal and link.seal != ask.seal:
            raise WeightsError(
                f"{folder.name} holds other weights than those that are meant: were they written to the folder that "
                "--updates names here?"
            )
        if self.policy.version == version and link.seal == self._seal:
            return None
        held = None
        if self._seal:
            held = (self._seal, buckets_of_state(self.policy.generator.model.state_dict(), version, link.bucket_bytes))
        source = versions.read(version, held)
        source.check()
        return source


def _elsewhere(root: Path, name: str) -> Refused:
    return Refused(403, f"model_path: only folders in {root.name} are read, not {name:.80}", "model_path", "forbidden")
