"""Grade the MiniWoB++ pages by what their experts do: how many actions, and on how many elements.

    python tools/grade_pages.py [--seeds 20] [--pages click-tab,login-user] [--out difficulty.txt]

Plays every page that has an expert, on training seeds; the same seeds give the same table. Without ``--out`` it is
printed; the one in use is `mmagent/worlds/miniwob/difficulty.txt`, and `difficulty.py` there tells what it means.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mmagent.actions import Action, Click, Drag, Finished, Scroll
from mmagent.browser import BrowserPool, Page
from mmagent.browser.perform import perform
from mmagent.tasks.miniwob import EXPERT_STEPS
from mmagent.worlds import miniwob
from mmagent.worlds.miniwob.difficulty import Effort, write_table

TOUCHED = """points => {
  const elements = points.length ? points.map(([x, y]) => document.elementFromPoint(x, y)) : [document.activeElement];
  for (const element of elements) if (element) touched.add(element);
}"""
"""Notes the elements under the points of an action, or the one that has the focus where the action has no point."""


def places(action: Action) -> list[tuple[float, float]]:
    """Where the mouse goes, in pixels."""
    match action:
        case Drag():
            return [miniwob.VIEW.from_frame(action.x1, action.y1), miniwob.VIEW.from_frame(action.x2, action.y2)]
        case Scroll() | Click():
            return [miniwob.VIEW.from_frame(action.x, action.y)]
        case _:
            return []


async def effort(page: Page, name: str, seed: int) -> tuple[int, int]:
    """Actions of the expert in one episode, and elements that they went to. Raises ``ValueError`` where it fails."""
    act, taken = miniwob.expert(name), 0
    await miniwob.restart(page, name, seed)
    await page.evaluate("window.touched = new Set(), 0")
    while taken < EXPERT_STEPS and not (await miniwob.state(page))[0]:
        action = await act(page)
        if isinstance(action, Finished):
            break
        await page.evaluate(TOUCHED, places(action))
        await perform(page, action, miniwob.VIEW)
        taken += 1
    done, reward = await miniwob.state(page)
    if not done or reward <= 0:
        raise ValueError(f"the expert failed on {name}, seed {seed}: grade nothing by it")
    return taken, await page.evaluate("touched.size")


async def measured(names: Sequence[str], seeds: int) -> dict[str, Effort]:
    """The mean effort of each page's expert."""
    found = {}
    async with BrowserPool(roots=[miniwob.html_folder()]) as pool, pool.page(miniwob.WIDTH, miniwob.HEIGHT) as page:
        for name in tqdm(names, unit="page"):
            played = [await effort(page, name, miniwob.seed_for("train", n)) for n in range(seeds)]
            actions, elements = (sum(counts) / seeds for counts in zip(*played, strict=True))
            found[name] = Effort(round(actions, 2), round(elements, 2))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Grade the MiniWoB++ pages by what their experts do.")
    parser.add_argument("--seeds", type=int, default=20, help="episodes of a page (default: %(default)s)")
    parser.add_argument("--pages", help="some, by comma; all that have an expert without")
    parser.add_argument("--out", type=Path, help="the table's file; printed without")
    args = parser.parse_args(argv)
    names = args.pages.split(",") if args.pages else miniwob.TASKS
    if args.seeds < 1:
        parser.error(f"--seeds must be positive, got {args.seeds}")
    if unknown := sorted(set(names) - set(miniwob.TASKS)):
        parser.error(f"no page {unknown[0]!r} with an expert")
    table = write_table(asyncio.run(measured(names, args.seeds)), args.seeds)
    if args.out:
        args.out.write_text(table, encoding="utf-8")
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
