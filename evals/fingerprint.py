"""Signatures of everything the suites judge by, in one file for who cleans training data.

    python -m evals fingerprint evals.npz [SUITE ...] [--seeds 0 1 ...]

An item is signed by its first observation: the words and the screens that its prompt shows. Suites of one's own go
through :func:`fingerprint`, which takes them as values.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from evals.suite import Suite, item_key
from evals.suites import SUITES
from mmagent.contamination import Fingerprint, Judged, Signed
from mmagent.protocols import Task
from mmagent.trajectories import Item

_AT_ONCE = 8


def fingerprint(suites: Sequence[Suite], progress: bool = True) -> Fingerprint:
    """Sign all items of ``suites``. Raises what a task raises: an item that is left out would be trained on."""
    judged: list[Judged] = []
    for suite in suites:
        judged += asyncio.run(_sign_suite(suite, progress))
    return Fingerprint(judged)


async def _sign_suite(suite: Suite, progress: bool) -> list[Judged]:
    async with suite.open(suite.tasks) as tasks:
        items = suite.items(tasks)
        free = asyncio.Semaphore(_AT_ONCE)
        with tqdm(
            total=len(items), desc=suite.name, unit="item", delay=2.0, smoothing=0.05, leave=False, file=sys.stderr,
            disable=not progress,
        ) as bar:  # fmt: skip

            async def sign(task: Task, item: Item) -> Judged:
                async with free:
                    judged = await _sign(suite, task, item)
                bar.update()
                return judged

            return list(await asyncio.gather(*(sign(task, item) for task, item in items)))


async def _sign(suite: Suite, task: Task, item: Item) -> Judged:
    environment = task.environment(item)
    try:
        seen = await environment.reset()
    finally:
        await environment.close()
    name = f"{suite.name}-{suite.seed}/{item_key(task, item)}"
    return Judged(name, seen.text, tuple(Signed.of(image) for image in seen.images))


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("python -m evals fingerprint", description="Sign what the suites judge by.")
    parser.add_argument("out", type=Path, metavar="FILE", help="such as evals.npz")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all without")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of the suites (default: their own)")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.suites) - set(SUITES)):
        raise ValueError(f"no suite {unknown[0]!r}; see: {', '.join(SUITES)}")
    chosen = [SUITES[name]() for name in args.suites or SUITES]
    if args.seeds:
        chosen = [dataclasses.replace(suite, seed=seed) for suite in chosen for seed in args.seeds]
    made = fingerprint(chosen)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(args.out)
    print(f"{args.out}: {len(made)} items with {made.pictures} pictures of {len(chosen)} suites")
    return 0
