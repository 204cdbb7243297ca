"""Design2Code's scores by the flow that was published, step for step and as slow: the peer of our own.

Every picture is taken by a Python process of its own with a browser of its own, three for each page; pixels are
compared one by one in Python; every colour is looked for in the whole picture and intersected with the list of text
pixels; every attempt to merge two blocks compares all texts anew. Written from the paper's repository
(``metrics/ocr_free_utils.py`` and ``metrics/visual_score.py``), with numpy where that calls OpenCV, and without CLIP,
whose weights would have to be downloaded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from bs4 import BeautifulSoup, Comment, NavigableString, Tag
from PIL import Image, ImageColor
from scipy.optimize import linear_sum_assignment
from skimage.color import deltaE_ciede2000

from mmagent.tasks.block_match import to_lab  # no part of what is compared
from mmagent.tasks.page_blocks import TEXT_TAGS

BlockDict = dict[str, Any]
TEXT = list(TEXT_TAGS)
CAMERA = """
import asyncio, sys
from pathlib import Path
from PIL import Image
from mmagent.browser import BrowserPool

async def take(source, target):
    async with BrowserPool(begin_frame=False) as pool, pool.page(1280, 720, scripts=False) as page:
        await page.set_content(Path(source).read_text())
        Image.fromarray(await page.whole()).save(target)

asyncio.run(take(*sys.argv[1:]))
"""


def screenshot(html: str) -> Image.Image:
    """A new process, a new browser, one picture."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "page.html", Path(folder) / "page.png"
        source.write_text(html)
        subprocess.run([sys.executable, "-c", CAMERA, str(source), str(target)], check=True)
        return Image.open(target).convert("RGB").copy()


def pool_of_colours(offset: int) -> list[str]:
    """Taken from its end."""
    values = range(10, 251, 16)
    shifted = [[(v + offset) % 256 for v in (r, g, b)] for r in values for g in values for b in values]
    return ["#{:02X}{:02X}{:02X}".format(*colour) for colour in shifted]


def inject(html: str, offset: int = 0) -> str:
    soup = BeautifulSoup(html, "html.parser")

    def style(element: Tag, name: str, value: object) -> None:
        old = element.attrs.get("style", "").split(";")
        new = [s for s in old if not s.strip().startswith(name) and len(s.strip()) > 0] + [
            f"{name}: {value} !important"
        ]
        element["style"] = "; ".join(new).strip()

    for element in soup.find_all(True):
        style(element, "background-color", "rgba(255, 255, 255, 0.0)")
    colours = pool_of_colours(offset)
    for tag in soup.find_all(TEXT):
        style(tag, "color", colours.pop())
        style(tag, "opacity", 1.0)
    return str(soup)


def different_pixels(first: Image.Image, second: Image.Image) -> np.ndarray | None:
    """Rows and columns, pixel by pixel."""
    if first.size != second.size:
        return None
    a, b, found = first.load(), second.load(), []
    assert a is not None
    assert b is not None
    for x in range(first.size[0]):
        for y in range(first.size[1]):
            one, other = a[x, y], b[x, y]
            if all(abs((one[c] + 50) % 256 - other[c]) <= 8 for c in range(3)):
                found.append((y, x))
    return np.stack(found) if found else None


def texts(html: str) -> list[tuple[str, str]]:
    def colour_of(tag: Tag) -> str | None:
        styles = [s for s in tag.attrs.get("style", "").split(";") if "color" in s and "background-color" not in s]
        if not styles:
            return None
        name = styles[-1].split(":")[1].strip().replace(" !important", "")
        if name[0] == "#":
            return name
        try:
            values = tuple(map(int, name[4:-1].split(","))) if name.startswith("rgb") else ImageColor.getrgb(name)
            return "#{:02x}{:02x}{:02x}".format(*values)
        except ValueError:
            return None

    def walk(element: object, colour: str) -> Iterator[tuple[str, str]]:
        if isinstance(element, Comment):
            return
        if isinstance(element, NavigableString):
            if element.strip():
                yield element.strip(), colour
        elif isinstance(element, Tag):
            inner = colour_of(element) or colour
            for child in element.children:
                yield from walk(child, inner)

    body = BeautifulSoup(html, "html.parser").body
    return list(walk(body, "#000000")) if body else []


def blocks_of(
    nodes: Sequence[tuple[str, str]], first: Image.Image, second: Image.Image, plain: Image.Image
) -> list[BlockDict]:
    """Colour by colour over the whole picture."""
    text = different_pixels(first, second)
    if text is None:
        return []
    picture, blocks = np.array(first), []
    height, width = picture.shape[:2]
    for words, name in nodes:
        try:
            paint = np.array([int(name.lstrip("#")[n : n + 2], 16) for n in (0, 2, 4)], dtype=np.uint8)
        except ValueError:
            continue
        mask = ((picture >= paint - np.uint8(4)) & (picture <= paint + np.uint8(4))).all(axis=2)
        places = np.column_stack(np.where(mask)).astype(text.dtype)
        kind = [("", text.dtype)] * 2
        both = np.intersect1d(np.ascontiguousarray(places).view(kind), np.ascontiguousarray(text).view(kind))
        places = both.view(text.dtype).reshape(-1, 2)
        if places.size == 0:
            continue
        (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
        original = np.array(plain)
        colour = np.mean([original[y, x] for y, x in places], axis=0)
        box = (left / width, top / height, (right - left + 1) / width, (bottom - top + 1) / height)
        blocks.append({"text": words.lower(), "bbox": box, "color": tuple(colour.astype(int))})
    return blocks


def look(html: str) -> list[BlockDict]:
    """The blocks of a page, from three processes."""
    first, second = inject(html), inject(html, 50)
    plain, one, other = screenshot(html), screenshot(first), screenshot(second)
    return blocks_of(texts(first), one, other, plain)


# ---------------------------------------------------------------------------------------------- scores


def by_box(blocks: list[BlockDict]) -> list[BlockDict]:
    merged: dict[tuple, BlockDict] = {}
    for block in blocks:
        old = merged.get(tuple(block["bbox"]))
        if old is None:
            merged[tuple(block["bbox"])] = block
        else:
            old["text"] += " " + block["text"]
            old["color"] = [(a + b) / 2 for a, b in zip(old["color"], block["color"], strict=True)]
    return list(merged.values())


def together(one: BlockDict, other: BlockDict) -> BlockDict:
    a, b = one["bbox"], other["bbox"]
    x, y = min(a[0], b[0]), min(a[1], b[1])
    box = (x, y, max(a[0] + a[2], b[0] + b[2]) - x, max(a[1] + a[3], b[1] + b[3]) - y)
    colour = tuple((c + d) // 2 for c, d in zip(one["color"], other["color"], strict=True))
    return {"text": one["text"] + " " + other["text"], "bbox": box, "color": colour}


def matching(A: list[BlockDict], B: list[BlockDict], bonus: float) -> tuple[list[tuple[int, int]], list[float]]:
    costs = np.zeros((len(A), len(B)))
    for i, a in enumerate(A):
        for j, b in enumerate(B):
            costs[i, j] = -SequenceMatcher(None, a["text"], b["text"]).ratio()
    adjusted = np.copy(costs)
    for i in range(len(A)):
        for j in range(len(B)):
            if costs[i, j] < -0.5:
                near = np.sort(costs[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].flatten())[::-1]
                near = np.delete(near, np.where(near == costs[i, j])[0][0])
                adjusted[i, j] += bonus * np.sum(near[-2:])
    rows, columns = linear_sum_assignment(adjusted)
    return list(zip(rows, columns, strict=True)), adjusted[rows, columns].tolist()


def improvement(before: list[float], after: list[float]) -> float:
    one, other = Counter(before), Counter(after)
    for value in set(before) & set(after):
        same = min(one[value], other[value])
        one[value] -= same
        other[value] -= same
    left, right = list(one.elements()), list(other.elements())
    change = (sum(left) / len(left) if left else 0) - (sum(right) / len(right) if right else 0)
    if change > 0:
        return change if min(left) > min(right) else 0.0
    return change


def merge_side(A: list[BlockDict], B: list[BlockDict], swapped: bool) -> tuple[list[BlockDict], bool]:
    def cost(blocks: list[BlockDict]) -> list[float]:
        return (matching(B, blocks, 0.0) if swapped else matching(blocks, B, 0.0))[1]

    current, merges = cost(A), []
    for i in range(len(A) - 1):
        new = deepcopy(A)
        new[i] = together(new[i], new[i + 1])
        new.pop(i + 1)
        gain = improvement(current, cost(new))
        if gain > 0.05:
            merges.append([i, i + 1, gain])
    merges.sort(key=lambda entry: entry[2], reverse=True)
    gone, any_merge = [], bool(merges)
    while merges:
        i, j, _ = merges[0]
        A[i] = together(A[i], A[j])
        gone.append(j)
        merges = [m for m in merges[1:] if not {m[0], m[1]} & {i, j}]
    for index in sorted(gone, reverse=True):
        A.pop(index)
    return A, any_merge


def score(predicted: list[BlockDict], original: list[BlockDict]) -> tuple[float, float, float, float]:
    """Block match, text, position and colour."""
    if not predicted or not original:
        return 0.0, 0.0, 0.0, 0.0
    A, B = by_box(deepcopy(predicted)), by_box(deepcopy(original))
    while True:
        A, one = merge_side(A, B, swapped=False)
        B, other = merge_side(B, A, swapped=True)
        if not one and not other:
            break
    pairs = [(i, j, SequenceMatcher(None, A[i]["text"], B[j]["text"]).ratio()) for i, j in matching(A, B, 0.1)[0]]
    pairs = [pair for pair in pairs if pair[2] >= 0.5]
    if not pairs:
        return 0.0, 0.0, 0.0, 0.0

    def area(block: BlockDict) -> float:
        return block["bbox"][2] * block["bbox"][3]

    alone = sum(area(a) for n, a in enumerate(A) if n not in [i for i, _, _ in pairs])
    alone += sum(area(b) for n, b in enumerate(B) if n not in [j for _, j, _ in pairs])
    both = [area(A[i]) + area(B[j]) for i, j, _ in pairs]
    places, colours = [], []
    for i, j, _ in pairs:
        a, b = A[i]["bbox"], B[j]["bbox"]
        dx, dy = abs(a[0] + a[2] / 2 - b[0] - b[2] / 2), abs(a[1] + a[3] / 2 - b[1] - b[3] / 2)
        places.append(1 - max(dx, dy))
        difference = deltaE_ciede2000(np.array(to_lab(A[i]["color"])), np.array(to_lab(B[j]["color"])))
        colours.append(max(0, 1 - float(difference) / 100))
    text = float(np.mean([ratio for _, _, ratio in pairs]))
    return float(sum(both) / (alone + sum(both))), text, float(np.mean(places)), float(np.mean(colours))
