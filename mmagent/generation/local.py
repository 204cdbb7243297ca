"""The local generator as a policy: concurrent requests become one batch."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mmagent.generation.generator import Generator
from mmagent.models.feature_cache import content_key
from mmagent.trajectories import Completion, Limits, Trajectory


class LocalPolicy:
    """``complete`` for many callers of one event loop; implements :class:`~mmagent.protocols.Policy`.

    Requests made before the loop comes round again form one batch, in the order they were made. Later ones join
    between two decoding steps. While the model computes, in a thread of its own, the loop goes on serving
    browsers. ``version`` is what trajectories are stamped with; set it after every optimizer step.
    """

    def __init__(self, generator: Generator, version: int = 0):
        self.generator, self.version = generator, version
        self._futures: dict[int, asyncio.Future[Completion]] = {}
        self._waiting: list[tuple[Trajectory, Limits, asyncio.Future[Completion]]] = []
        self._worker: asyncio.Task[None] | None = None
        # one thread for ever: each thread that computes keeps a pool of its own workers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmagent-generator")

    @property
    def steady(self) -> bool:
        """Whether what a trajectory gets depends on itself, its seed and the weights alone."""
        return self.generator.config.steady

    def identity(self) -> str:
        """sha256 of all weights, buffers and settings that decide its numbers. Reads the weights once."""
        tensors = sorted(self.generator.model.state_dict().items())
        return content_key(repr(self.generator.config), *(part for pair in tensors for part in pair))

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        """Raises what :meth:`Generator.submit` raises; a failure while decoding reaches every caller in flight."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, limits, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.sleep(0)  # whoever is ready to ask does so first
            while self._waiting or self.generator.busy:
                self._submit()
                for ticket, completion in (await loop.run_in_executor(self._thread, self.generator.step)).items():
                    future = self._futures.pop(ticket)
                    if not future.done():  # its caller may have given up
                        future.set_result(completion)
                await asyncio.sleep(0)
        except BaseException as error:
            self.generator.abandon()
            for future in (*self._futures.values(), *(future for _, _, future in self._waiting)):
                if not future.done():
                    future.set_exception(error) if isinstance(error, Exception) else future.cancel()
            self._futures.clear()
            self._waiting.clear()
            if not isinstance(error, Exception):  # cancelled with its loop
                raise

    def _submit(self) -> None:
        for prompt, limits, future in self._waiting:
            try:
                self._futures[self.generator.submit(prompt, limits)] = future
            except ValueError as error:
                future.set_exception(error)
        self._waiting.clear()
