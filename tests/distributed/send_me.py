"""Two processes for test_weight_sync.py: ``send_me.py RANK STORE FOLDER``. Rank 0 sends a version and is killed in the
middle of it; rank 1 serves, receives, and tells as JSON what became of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from mmagent.agent.weight_sync import buckets_of
from mmagent.generation.generator import Generator
from mmagent.generation.local import LocalPolicy
from mmagent.generation.updates import Bucket, Buckets, buckets_of_files, receive, send
from mmagent.generation.weights import HalfWritten
from mmagent.trajectories import Completion, Limits
from tests.agent_kit import prompt, tiny_model, tiny_vocab

TIMEOUT = 60.0


class Dies(Buckets):
    """Half of a version."""

    def __iter__(self) -> Iterator[Bucket]:
        for bucket in super().__iter__():
            if bucket.index == bucket.of // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield bucket


async def serve(folder: str) -> dict[str, object]:
    policy = LocalPolicy(Generator(tiny_model(0), tiny_vocab()))
    source, told, started = receive(0), [], time.monotonic()

    async def ask() -> Completion | str:
        try:
            return await policy.complete(prompt("click the word"), Limits(5, 1.0, seed=3))
        except HalfWritten as error:
            return str(error)

    try:
        await policy.update(source, "mark")
    except RuntimeError as error:
        told.append(type(error).__name__)
    waited, closed = time.monotonic() - started, await ask()
    await policy.update(buckets_of_files(folder))
    done = await ask()
    assert isinstance(done, Completion)
    return {"error": told, "waited": waited, "closed": closed, "ids": done.ids, "versions": done.versions}


def main(rank: str, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    if rank == "0":
        live = buckets_of(tiny_model(1), 1, 1 << 12)
        send(Dies(live._tensors.values(), 1, 1 << 12))
        return
    print(json.dumps(asyncio.run(serve(folder))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
