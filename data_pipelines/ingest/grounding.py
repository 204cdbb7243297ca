"""Marks of places in texts of the Qwen-VL family, read into boxes of a record and into the library's own words.

Qwen-VL writes ``<ref>the dog</ref><box>(x1,y1),(x2,y2)</box>`` (and ``<quad>`` with four corners), Qwen2-VL the same
with ``<|object_ref_start|>``, ``<|box_start|>``, ``<|quad_start|>`` and their ends; coordinates are thousandths of the
image, [0, 1000). The library writes a place as ``x1,y1,x2,y2`` in the frame of :mod:`mmagent.geometry`, which is the
same but for 1000 itself, the far edge, which some data sets hold: it becomes 999.

Qwen2.5-VL and Qwen3-VL answer in JSON, ``{"bbox_2d": [x1, y1, x2, y2], "label": "the dog"}`` and ``{"point_2d": [x,
y]}``: Qwen3-VL in thousandths again, Qwen2.5-VL in pixels of the image as its processor resizes it. The same numbers
may be either, so whoever ingests has to say which.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from data_pipelines.ingest.files import RefusedError
from mmagent.geometry import FRAME, GeometryConfig, ImageView, fit
from mmagent.records import Region

_NEW = {"object_ref": "ref", "box": "box", "quad": "quad"}
_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_POINT = re.compile(rf"\({_NUMBER},{_NUMBER}\)")
_PLACE = re.compile(r"<(box|quad)>((?:\s*,?\s*\([^()<>]{1,40}\))*)\s*</\1>")
_MARK = re.compile(r"</?(?:ref|box|quad)>")
_REF = re.compile(r"<ref>((?:(?!<ref>).)*?)</ref>", re.S)


_ANSWER = re.compile(r'"(bbox|point)_2d"\s*:\s*(\[[^\[\]]*\]|[^\s,}]*)')
_OBJECT = re.compile(r"\{[^{}]*\}")
_RESIZED = GeometryConfig(min_tokens=4, max_tokens=1280)
"""How the published fine-tuning code of Qwen2.5-VL sizes images for its boxes: multiples of 28 pixels, 56 * 56 to
28 * 28 * 1280 of them."""
COORDINATES = ("thousandths", "pixels")


@dataclass(frozen=True)
class Grounded:
    """A text with its places in the library's words, and the boxes and points they are, in pixels."""

    text: str
    boxes: tuple[Region, ...]
    points: tuple[Region, ...] = ()


def read_marks(text: str, image: int, size: tuple[int, int] | None) -> Grounded:
    """``text`` about image number ``image`` of ``(height, width)``; a size of None (a video) gives no boxes.

    Several boxes of one phrase are joined by ``; ``. Raises :class:`RefusedError` for marks that do not close, are no
    numbers, lie outside [0, 1000], or mark an empty box.
    """
    text = re.sub(r"<\|(object_ref|box|quad)_(start|end)\|>", lambda m: _plain(m[1], m[2] == "end"), text)
    boxes: list[Region] = []
    phrase = ""
    out: list[str] = []
    at = 0
    for match in _PLACE.finditer(text):
        between = text[at : match.start()]
        if between.rstrip().endswith("</ref>"):
            refs = _REF.findall(between)
            phrase = refs[-1].strip() if refs else ""
            between = between.rstrip() + " "
        elif between.strip(" ,;") or not out:
            phrase = ""
        else:
            between = "; "
        out.append(_REF.sub(lambda m: m[1], between))
        points = [_point(a, b, match[0]) for a, b in _POINT.findall(match[2])]
        wanted = (1, 2) if match[1] == "box" else (4,)
        if len(points) not in wanted or len(points) != match[2].count("("):
            raise RefusedError("boxes", f"{match[0]!r} is no place")
        view = ImageView((FRAME, FRAME), (FRAME, FRAME))
        out.append(",".join(f"{x},{y}" for x, y in (view.to_frame(*point) for point in points)))
        if size is not None and len(points) > 1:
            boxes.append(_region(points, image, size, phrase, match[0]))
        at = match.end()
    out.append(_REF.sub(lambda m: m[1], text[at:]))
    read = "".join(out)
    if left := _MARK.search(read):
        raise RefusedError("boxes", f"{left[0]} without its other half, or with something else than numbers in it")
    return Grounded(read, tuple(boxes))


def read_json(text: str, image: int, size: tuple[int, int] | None, coordinates: str, told: bool) -> Grounded:
    """``text`` with every ``bbox_2d`` and ``point_2d`` in thousandths, about image number ``image`` of ``(height,
    width)``; a size of None (a video) gives no boxes. ``coordinates``: one of :data:`COORDINATES`, what they are in.

    Raises :class:`RefusedError` where that is not known, or numbers do not fit it, and for what is no place at all in a
    text that is ``told`` by the model; a question may show the form that it wants.
    """
    regions: dict[str, list[Region]] = {"bbox": [], "point": []}
    labels = {at: found for match in _OBJECT.finditer(text) for at, found in _labelled(match)}

    def converted(match: re.Match[str]) -> str:
        numbers = _numbers(match[2], 4 if match[1] == "bbox" else 2)
        if numbers is None and not told:
            return match[0]
        place = match[0][:100]
        if numbers is None:
            raise RefusedError("boxes", f"{place!r} is no place")
        span = _span(size, coordinates)
        if not all(0 <= value <= most for value, most in zip(numbers, span[::-1] * 2, strict=False)):
            raise RefusedError("boxes", f"{place!r} lies outside of {span[1]}x{span[0]}, so it is not in {coordinates}")
        if match[1] == "bbox" and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
            raise RefusedError("boxes", f"{place!r} is empty or inverted")
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        if size is not None:
            view = ImageView(size, span)
            pixels = tuple(value for point in points for value in view.from_seen(*point))
            regions[match[1]].append(Region(image, pixels, labels.get(match.start(), "")))
        frame = [value for point in points for value in ImageView(span, span).to_frame(*point)]
        return f'"{match[1]}_2d": {json.dumps(frame)}'

    return Grounded(_ANSWER.sub(converted, text), tuple(regions["bbox"]), tuple(regions["point"]))


def _labelled(found: re.Match[str]) -> list[tuple[int, str]]:
    """Where the places of a JSON object begin, each with the object's label."""
    try:
        label = json.loads(found[0]).get("label", "")
    except ValueError:
        return []
    named = label if isinstance(label, str) else ""
    return [(found.start() + match.start(), named) for match in _ANSWER.finditer(found[0])]


def _numbers(text: str, count: int) -> list[float] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    fine = isinstance(values, list) and len(values) == count and all(type(v) in (int, float) for v in values)
    return values if fine else None


def _span(size: tuple[int, int] | None, coordinates: str) -> tuple[int, int]:
    """``(height, width)`` of the frame that coordinates are in."""
    if coordinates == "thousandths":
        return FRAME, FRAME
    if coordinates != "pixels":
        raise RefusedError("boxes", "bbox_2d may be thousandths (Qwen3-VL) or pixels (Qwen2.5-VL): --coordinates says")
    if size is None:
        raise RefusedError("boxes", "pixels of a video, whose resized size is not agreed on")
    try:
        resized = fit(*size, _RESIZED)
    except ValueError as error:
        raise RefusedError("boxes", str(error)) from error
    if min(size) < _RESIZED.unit:
        told = f"pixels of an image of {size[1]}x{size[0]}: the resized size of a side below {_RESIZED.unit} is not"
        raise RefusedError("boxes", f"{told} agreed on")
    return resized


def _plain(mark: str, end: bool) -> str:
    return f"<{'/' if end else ''}{_NEW[mark]}>"


def _point(x: str, y: str, place: str) -> tuple[float, float]:
    point = float(x), float(y)
    if not all(0 <= value <= FRAME for value in point):
        raise RefusedError("boxes", f"{place!r} lies outside the frame of 0 to {FRAME}")
    return point


def _region(points: list[tuple[float, float]], image: int, size: tuple[int, int], phrase: str, place: str) -> Region:
    height, width = size
    xs, ys = [x / FRAME * width for x, _ in points], [y / FRAME * height for _, y in points]
    if len(points) == 2 and (xs[0] >= xs[1] or ys[0] >= ys[1]):
        raise RefusedError("boxes", f"{place!r} is empty or inverted")
    return Region(image, (min(xs), min(ys), max(xs), max(ys)), phrase)
