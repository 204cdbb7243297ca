"""Pages of a PDF: a picture of each, its text in reading order, and where every line of it stands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any

from data_pipelines.ingest.files import RefusedError
from mmagent.records import EncodedImage, Region, encode_image

MAX_PAGES = 10_000
"""Pages of one file that are read: a page tree may name itself a billion times."""
MAX_PAGE_PIXELS = 6_000_000
"""A page of more is drawn smaller: that is what a model sees at most (8000 visual tokens)."""
_MAX_LINES = 4000
_MAX_ROWS = 300  # of a page in which columns are looked for: every cut between two of them is tried
_PROSE = 6  # a column of text is at least as many times wider than its lines are high; narrower ones are of tables
_GUTTER = 0.8  # and at least as many heights of a line away from the next one


@dataclass(frozen=True)
class Line:
    """A run of text and the pixels ``(x1, y1, x2, y2)`` it takes."""

    text: str
    box: tuple[float, float, float, float]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]


@dataclass(frozen=True)
class PdfPage:
    """``text`` has the ``lines`` in reading order."""

    image: EncodedImage
    text: str
    lines: tuple[Region, ...]


def read_pages(data: bytes, start: int = 0, dpi: int = 144) -> Iterator[PdfPage | RefusedError]:
    """The pages from number ``start`` (0 is the first), each a page or why it is none.

    A file that is no PDF, or needs a password, is one refusal; so are the pages beyond :data:`MAX_PAGES`. Raises
    :class:`RefusedError` without the library that draws them.
    """
    pdfium = _library()
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        yield RefusedError("pdf", f"is damaged, locked or no PDF, and cannot be opened: {error}")
        return
    try:
        count = len(document)
        if count == 0:
            yield RefusedError("pdf", "there is no page in it")
        for number in range(start, min(count, MAX_PAGES)):
            try:
                yield _page(pdfium, document, number, dpi)
            except RefusedError as error:
                yield error
            except pdfium.PdfiumError as error:
                yield RefusedError("page", f"cannot be drawn: {error}")
        if count > MAX_PAGES:
            yield RefusedError("pdf", f"{count} pages: those from {MAX_PAGES + 1} on are left out")
    finally:
        document.close()


def _library() -> ModuleType:
    try:
        import pypdfium2
    except ImportError as error:
        raise RefusedError("pdf", "needs the library pypdfium2: pip install 'mmagent[ingest]'") from error
    return pypdfium2


def _page(pdfium: ModuleType, document: Any, number: int, dpi: int) -> PdfPage:
    page = document[number]
    text = None
    try:
        width, height = page.get_size()
        if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
            raise RefusedError("page", f"a size of {width:g} x {height:g} points")
        if max(width, height) > 200 * min(width, height):
            raise RefusedError("page", f"a size of {width:g} x {height:g} points is a line, no page")
        scale = min(dpi / 72, math.sqrt(MAX_PAGE_PIXELS / (width * height)))
        bitmap = page.render(scale=scale, rev_byteorder=True, may_draw_forms=False)
        pixels = bitmap.to_numpy()[..., :3].copy()
        text = page.get_textpage()
        lines = reading_order(_lines(text, bitmap.get_posconv(page), pixels.shape[1], pixels.shape[0]))
    finally:
        if text is not None:
            text.close()
        page.close()
    told = "\n".join(line.text for line in lines)
    return PdfPage(encode_image(pixels), told, tuple(Region(0, line.box, f'line "{line.text}"') for line in lines))


def _lines(text: Any, place: Any, width: int, height: int) -> list[Line]:
    """Runs of text as the file has them, in pixels; what lies outside the page is not seen and left out."""
    count = text.count_rects()
    if count > _MAX_LINES:
        raise RefusedError("page", f"{count} pieces of text, the limit is {_MAX_LINES}")
    found = []
    for n in range(count):
        left, bottom, right, top = text.get_rect(n)
        said = text.get_text_bounded(left, bottom, right, top)
        said = " ".join(said.replace("\x02", "-").replace("\ufffe", "-").replace("\x00", "").split())
        xs, ys = zip(*(place.to_bitmap(x, y) for x, y in ((left, bottom), (right, top))), strict=True)
        box = (max(min(xs), 0), max(min(ys), 0), min(max(xs), width), min(max(ys), height))
        if said and box[0] < box[2] and box[1] < box[3]:
            found.append(Line(said, tuple(map(float, box))))  # type: ignore[arg-type]
    return found


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Lines of text as people read them: columns of prose one after the other, everything else row by row.

    The page is cut recursively (the X-Y cut of Nagy and Seth, 1984), but not at every gap: where a column's gutter does
    not go through, the lines above or below that keep it from doing so are cut off first. Pieces of one row become one
    line. Writing from left to right, rows from top to bottom.
    """
    lines = list(lines)
    if len(lines) < 2:
        return lines
    high = median(line.height for line in lines)
    return [row for block in _blocks(lines, high) for row in _rows(block)]


def _blocks(lines: list[Line], high: float) -> Iterator[list[Line]]:
    waiting = [lines]
    while waiting:
        block = waiting.pop()
        parts = _columns(block, high) or _above_and_below(block, high)
        if parts:
            waiting += reversed(parts)
        else:
            yield block


def _columns(block: list[Line], high: float) -> list[list[Line]]:
    """A block in its columns of prose, or nothing where it has only one."""
    groups = _runs(block, 0, _GUTTER * high)
    if len(groups) < 2 or any(len(_spans(row, high)) > len(groups) for row in _runs(block, 1, 0.0)):
        return []  # a row of more pieces than there are columns is of a table
    wide = [median(line.box[2] - line.box[0] for line in group) >= _PROSE * high for group in groups]
    return groups if all(wide) and max(map(len, groups)) > 1 else []


def _above_and_below(block: list[Line], high: float) -> list[list[Line]]:
    """A block cut above and below the longest part of it that is in columns."""
    rows = _runs(block, 1, 0.0)
    best = range(0)
    for first in range(len(rows) if len(rows) <= _MAX_ROWS else 0):
        end, most, seen = first, 1, []
        for last in range(first, len(rows)):
            most = max(most, len(_spans(rows[last], high)))
            seen = _merged(seen + _spans(rows[last], high), _GUTTER * high)
            end = last + 1 if 1 < len(seen) >= most else end
        if end - first > len(best) and _columns([line for row in rows[first:end] for line in row], high):
            best = range(first, end)
    if not best:
        return []
    cuts = [rows[: best.start], rows[best.start : best.stop], rows[best.stop :]]
    return [[line for row in cut for line in row] for cut in cuts if cut]


def _spans(lines: Sequence[Line], high: float) -> list[tuple[float, float]]:
    """What lines take of a page's width."""
    return _merged([(line.box[0], line.box[2]) for line in lines], _GUTTER * high)


def _merged(spans: list[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Intervals with those that overlap, or are nearer than ``gap``, made one."""
    out: list[tuple[float, float]] = []
    for low, high in sorted(spans):
        if out and low < out[-1][1] + gap:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return out


def _runs(lines: list[Line], axis: int, gap: float) -> list[list[Line]]:
    """Lines that overlap along an axis, or are nearer than ``gap``, in groups, in order."""
    groups: list[list[Line]] = []
    end = -math.inf
    for line in sorted(lines, key=lambda line: (line.box[axis], line.box[1 - axis])):
        if line.box[axis] >= end + gap:
            groups.append([])
        groups[-1].append(line)
        end = max(end, line.box[axis + 2])
    return groups


def _rows(block: list[Line]) -> list[Line]:
    """Pieces of text in rows, each from left to right, one line a row."""
    rows: list[list[Line]] = []
    for line in sorted(block, key=lambda line: (line.box[1] + line.box[3]) / 2):
        middle = (line.box[1] + line.box[3]) / 2
        last = rows[-1][-1].box if rows else (0, math.inf, 0, -math.inf)
        if last[1] < middle < last[3]:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [_joined(sorted(row, key=lambda line: line.box[0])) for row in rows]


def _joined(row: list[Line]) -> Line:
    boxes = [line.box for line in row]
    box = (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))
    return Line(" ".join(line.text for line in row), box)
