"""Look at synthetic pages: a picture of many of them, over kinds, languages, themes and levels.

    python tools/page_sheet.py sheet.png [--count 24] [--size 480x360] [--seed 0] [--kinds mail,code] [--languages en]

Pages go round the kinds and the languages, so that a sheet of 24 shows 24 kinds. ``--boxes`` draws what was read off
each page: elements in red, lines of text in blue.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from mmagent.browser import BrowserPool
from mmagent.worlds.languages import NAMES
from mmagent.worlds.pages import LEVELS, TEMPLATES, Scene, generate, render
from mmagent.worlds.pages.fonts import lacking

GAP, CAPTION = 6, 14


async def scenes(args: argparse.Namespace) -> list[tuple[str, Scene]]:
    """What is on the sheet, with a caption each."""
    width, height = map(int, args.size.split("x"))
    kinds, languages = args.kinds.split(","), args.languages.split(",")
    out = []
    async with BrowserPool() as pool, pool.page(width, height, hide_scrollbars=True) as page:
        if problems := await lacking(page, languages):
            raise SystemExit("error: " + "\nerror: ".join(problems.values()))
        for n in tqdm(range(args.count), unit="page"):
            kind, spoken = kinds[(args.first + n) % len(kinds)], languages[n % len(languages)]
            source = generate(args.seed + n, width, height, 1 + n % LEVELS, kind, spoken)
            caption = f"{kind} {spoken} level {source.difficulty}"
            out.append((caption, await render(page, source.html, width, height, trusted=True)))
    return out


def sheet(shown: list[tuple[str, Scene]], boxes: bool) -> Image.Image:
    """All of them in a grid."""
    columns = math.ceil(math.sqrt(len(shown)))
    height, width = shown[0][1].size
    rows = -(-len(shown) // columns)
    out = Image.new("RGB", (columns * (width + GAP), rows * (height + CAPTION + GAP)), "#888888")
    for n, (caption, scene) in enumerate(shown):
        x, y = n % columns * (width + GAP), n // columns * (height + CAPTION + GAP)
        picture = Image.fromarray(scene.image)
        pen = ImageDraw.Draw(picture)
        if boxes:
            for things, colour in ((scene.elements, "red"), (scene.lines, "blue")):
                for thing in things:
                    pen.rectangle((*thing.box[:2], thing.box[2] - 1, thing.box[3] - 1), outline=colour)
        out.paste(picture, (x, y + CAPTION))
        ImageDraw.Draw(out).text((x + 2, y + 1), caption, fill="white")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--size", default="480x360", help="of a page, default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first kind")
    parser.add_argument("--kinds", default=",".join(TEMPLATES), help="default: all")
    parser.add_argument("--languages", default=",".join(NAMES), help="default: all")
    parser.add_argument("--boxes", action="store_true")
    args = parser.parse_args()
    sheet(asyncio.run(scenes(args)), args.boxes).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
