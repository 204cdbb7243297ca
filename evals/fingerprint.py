"""Signatures of everything the suites judge by, in one file for who cleans training data.

    python -m evals fingerprint evals.npz [SUITE[=WHERE] ...] [--seeds 0 1 ...]

An item is signed by its first observation, the words and the screens that its prompt shows; by the later screens that
the expert sees, where its suite allows more than one step; and by the expert's answers that are long enough to convict
alone (:data:`mmagent.contamination.TELLING`). ``WHERE`` are published data, as ``--data`` takes them; without, what is
signed is the split that a suite makes of its own. Suites of one's own go through :func:`fingerprint`, which takes them
as values.

To act as the expert takes about 1.5 times as long again as the first screens do: on two busy cores 0.12 s an item of
MiniWoB++, two to three minutes for all of it, and nothing to speak of for suites of one step.
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
from evals.suites import SUITES, named_suite
from mmagent.contamination import TELLING, WORDS, Fingerprint, Judged, Signed, alike
from mmagent.protocols import Task
from mmagent.signatures import shingles
from mmagent.tasks.base import retried
from mmagent.tasks.grounding import GroundingTask
from mmagent.tasks.miniwob import MiniWobTask
from mmagent.tasks.sites import SiteTask
from mmagent.tasks.ui_repair import UiRepairTask
from mmagent.trajectories import Item, Observation
from mmagent.worlds.miniwob import UNTAUGHT

SIGNED = 2
"""Raised with what is signed of an item: files of before know less."""
_LATER, _ANSWER = "#later", "#answer"  # behind the name of an item
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

            async def sign(task: Task, item: Item) -> list[Judged]:
                async with free:
                    judged = await _sign(suite, task, item)
                bar.update()
                return judged

            return [one for each in await asyncio.gather(*(sign(*entry) for entry in items)) for one in each]


async def _sign(suite: Suite, task: Task, item: Item) -> list[Judged]:
    """The item itself; then what its episode shows and says, without the words of the question: what they have in
    common with other items would be taken for their form."""
    actions = await _gold(task, item)
    first, *later = await _watch(task, item, actions if suite.play.max_steps > 1 else ())
    name = f"{suite.name}-{suite.seed}/{item_key(task, item)}"
    shown = tuple(Signed.of(image) for image in first.images)
    judged = [Judged(name, first.text, shown)]
    seen = list(shown)
    for picture in (Signed.of(image) for one in later for image in one.images):
        if not any(alike(one.bits[None], one.thumb[None], picture)[0] for one in seen):
            seen.append(picture)
    if len(seen) > len(shown):
        judged.append(Judged(f"{name}{_LATER}", "", tuple(seen[len(shown) :])))
    answers = (action for action in dict.fromkeys(actions) if len(shingles(action, WORDS)) >= TELLING)
    return judged + [Judged(f"{name}{_ANSWER}", answer) for answer in answers]


async def _gold(task: Task, item: Item) -> list[str]:
    match task:
        case MiniWobTask() if task.page in UNTAUGHT:
            return []  # nobody knows what is right
        case MiniWobTask() | SiteTask():
            return await retried(lambda: task.demonstrate(item))
        case GroundingTask():
            return [await task.answer(item)]
        case UiRepairTask():
            return [(await task.broken(item)).source.html]
        case _:  # in this thread, with which it may share what it remembers
            return list(task.gold(item))


async def _watch(task: Task, item: Item, actions: Sequence[str]) -> list[Observation]:
    environment = task.environment(item)
    try:
        seen = [await environment.reset()]
        for action in actions:
            if seen[-1].done:
                break
            seen.append(await environment.step(action))
    finally:
        await environment.close()
    return seen


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("python -m evals fingerprint", description="Sign what the suites judge by.")
    parser.add_argument("out", type=Path, metavar="FILE", help="such as evals.npz")
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE[=WHERE]",
        help=f"of {', '.join(SUITES)}, with its published data; all without",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of the suites (default: their own)")
    args = parser.parse_args(argv)
    chosen = [named_suite(name, SUITES) for name in args.suites or SUITES]
    if args.seeds:
        chosen = [dataclasses.replace(suite, seed=seed) for suite in chosen for seed in args.seeds]
    made = fingerprint(chosen)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(args.out)
    items = sum(not name.endswith((_LATER, _ANSWER)) for name in made.names)
    print(f"{args.out}: {items} items with {made.pictures} pictures of {len(chosen)} suites")
    return 0
