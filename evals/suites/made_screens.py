"""Small sets of our own rendered pages in the formats of ScreenSpot, -v2, -Pro and OSWorld-G."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mmagent.browser import BrowserPool
from mmagent.files import write_text
from mmagent.records import encode_image
from mmagent.worlds import pages
from mmagent.worlds.elements import Element
from mmagent.worlds.questions import Target, targets
from mmagent.worlds.seeds import seed_for

SEED = 0
PAGES, TARGETS = 4, 4
"""Pages a platform, and targets a page at most."""
FIRST = 7 * 10**8
"""The first seed of these pages in their split: no other suite shows them."""
SCREENS = {
    "mobile": ((360, 640), ("ios", "android")),
    "desktop": ((960, 600), ("windows", "macos")),
    "web": ((800, 600), ("shop", "gitlab", "forum", "tool")),
}
GROUPS = {
    "Dev": "vscode",
    "Creative": "blender",
    "CAD": "autocad",
    "Scientific": "matlab",
    "Office": "word",
    "OS": "linux",
}
PRO_SIZE, OSWORLD_SIZE = (1920, 1080), (1280, 720)


@dataclass(frozen=True)
class _Shot:
    """A page that was drawn: its picture's name, its size and what on it can be asked for."""

    file: str
    size: tuple[int, int]
    named: Sequence[Target]


async def make_set(name: str, folder: Path) -> None:
    """Write set ``name`` into ``folder`` as it is published."""
    maker = {"screenspot": _screenspot, "screenspot_v2": _screenspot, "screenspot_pro": _pro, "osworld_g": _osworld}[
        name
    ]
    async with BrowserPool() as pool, pool.page(*OSWORLD_SIZE, scripts=False) as page:
        await maker(name, folder, _Painter(page))


class _Painter:
    """Draws one page after the other that names at least two things."""

    def __init__(self, page: Any):
        self.page, self.next = page, FIRST + SEED

    async def shot(self, pictures: Path, size: tuple[int, int]) -> _Shot:
        named: list[Target] = []
        while len(named) < 2:
            seed = seed_for("test", self.next)
            self.next += 1
            source = pages.generate(seed, *size, 2 + seed % 3)
            scene = await pages.render(self.page, source.html, *size, trusted=True)
            named = [target for target in targets(scene.elements) if _reachable(target.element, size)]
        pictures.mkdir(parents=True, exist_ok=True)
        file = f"made_{seed}.png"
        (pictures / file).write_bytes(encode_image(scene.image).data)
        kinds = sorted(named, key=lambda target: (kind_of(target.element) == "text", Random(seed).random()))
        some = [*kinds[: TARGETS // 2], *kinds[-(TARGETS - TARGETS // 2) :]]  # signs and pictures first, words last
        return _Shot(file, size, list(dict.fromkeys(some)))


def kind_of(element: Element) -> str:
    """ "icon" for what carries no word, else "text", as the sets call them."""
    return "text" if any(letter.isalnum() for letter in element.text) else "icon"


def _reachable(element: Element, size: tuple[int, int]) -> bool:
    x1, y1, x2, y2 = element.box
    return 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]


async def _screenspot(name: str, folder: Path, painter: _Painter) -> None:
    later = "_v2" if name == "screenspot_v2" else ""
    pictures = folder / ("screenspotv2_image" if later else "screenspot_imgs")
    for platform, (size, sources) in SCREENS.items():
        rows = []
        for number in range(PAGES):
            shot = await painter.shot(pictures, size)
            rows += [
                {
                    "img_filename": shot.file,
                    "bbox": _sides(target.element),
                    "instruction": target.phrase,
                    "data_type": kind_of(target.element),
                    "data_source": sources[number % len(sources)],
                }
                for target in shot.named
            ]
        write_text(folder / f"screenspot_{platform}{later}.json", json.dumps(rows))


async def _pro(name: str, folder: Path, painter: _Painter) -> None:
    for group, application in GROUPS.items():
        shot = await painter.shot(folder / "images", PRO_SIZE)
        rows = [
            {
                "img_filename": shot.file,
                "bbox": list(target.element.box),
                "instruction": target.phrase,
                "id": f"{application}_{number}",
                "application": application,
                "platform": "linux",
                "img_size": list(shot.size),
                "ui_type": kind_of(target.element),
                "group": group,
            }
            for number, target in enumerate(shot.named)
        ]
        (folder / "annotations").mkdir(exist_ok=True)
        write_text(folder / "annotations" / f"{application}_linux.json", json.dumps(rows))


async def _osworld(name: str, folder: Path, painter: _Painter) -> None:
    rows: list[dict[str, Any]] = []
    shots = [await painter.shot(folder / "images", OSWORLD_SIZE) for _ in range(2 * PAGES)]
    for number, shot in enumerate(shots):
        here = {target.phrase for target in shot.named}
        absent = next(t for other in shots[number + 1 :] + shots for t in other.named if t.phrase not in here)
        regions: list[tuple[Target, str, list[float]]] = [
            (target, *(("polygon", _corners(target.element)) if n == 1 else ("bbox", _sides(target.element))))
            for n, target in enumerate(shot.named)
        ]
        regions.append((Target(f"{absent.phrase} for the moon", absent.element), "refusal", [-1, -1, -1, -1]))
        for n, (target, kind, numbers) in enumerate(regions):
            rows.append(
                {
                    "id": f"made{number}-{n}",
                    "image_path": shot.file,
                    "image_size": list(shot.size),
                    "instruction": target.phrase,
                    "box_type": kind,
                    "box_coordinates": numbers,
                    "GUI_types": [target.element.role],
                }
            )
    write_text(folder / "OSWorld-G.json", json.dumps(rows))


def _sides(element: Element) -> list[float]:
    x1, y1, x2, y2 = element.box
    return [x1, y1, x2 - x1, y2 - y1]


def _corners(element: Element) -> list[float]:
    """The box as a polygon with its corners cut off."""
    x1, y1, x2, y2 = element.box
    a, b = (x2 - x1) / 4, (y2 - y1) / 4
    return [x1 + a, y1, x2 - a, y1, x2, y1 + b, x2, y2 - b, x2 - a, y2, x1 + a, y2, x1, y2 - b, x1, y1 + b]
