"""A record for the eye: its pictures with boxes and points drawn on them, its turns, and what of them is trained on.

Everything a sample says goes through ``Markup.format``, which escapes it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image as PILImage

from mmagent.chat import Box, Image, Part, Text, Thinking, ToolCall, Video
from mmagent.html.pieces import join, tag
from mmagent.records import Record, Region, decode_image

TEXT = 4000
"""Characters of one part that are shown."""
LABELLED = 8
"""Up to so many regions of one picture have their labels written beside them, or below the picture where they would
cover too much of it; all have them under the pointer."""
_COVERED = 0.05  # of a picture, by the labels written on it
_CUT = 24  # characters of a label that are written on a picture
_SMALL, _ENLARGED, _TALLEST, _CARD = 240, 6.0, 640, 320  # pixels on the page: below it enlarged, at most, height, width
_LETTER = 0.62  # of its height is the width of one


@dataclass(frozen=True)
class Shot:
    """A picture that a page can show: its address, and the ``width`` and ``height`` that regions are measured in."""

    address: str
    width: int
    height: int


def inline(pixels: np.ndarray, longest: int = 480) -> Shot:
    """A picture inside the page, scaled down to at most ``longest`` pixels a side: JPEG, or PNG where that is less."""
    height, width = pixels.shape[:2]
    image = PILImage.fromarray(pixels)
    image.thumbnail((longest, longest))
    files = []
    for kind, options in (("JPEG", {"quality": 82}), ("PNG", {})):  # an optimised PNG takes ten times as long
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append((buffer.tell(), kind.lower(), buffer.getvalue()))
    _, kind, data = min(files)
    return Shot(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height)


def inline_shots(record: Record, longest: int = 480) -> Callable[[int], Shot]:
    """Its pictures inside the page. Asking for one raises :class:`~mmagent.records.RecordError` if it cannot be
    decoded."""
    return lambda n: inline(decode_image(record.images[n].data, record.key, f"images[{n}]"), longest)


def figure(shot: Shot, regions: Sequence[Region] = (), caption: str = "") -> Markup:
    """A picture with its regions; their labels stand beside them, and under the pointer. A small one is enlarged, so
    that what is marked on it can be seen."""
    scale = min(_ENLARGED, max(1.0, _SMALL / max(shot.width, shot.height)), _TALLEST / shot.height)
    wide = max(round(shot.width * scale), 1)
    unit = 1.5 * shot.width / min(wide, _CARD)  # one and a half pixels on the page, in pixels of the picture
    labels = [region.label if len(regions) <= LABELLED else "" for region in regions]
    letters = sum(min(len(label), _CUT) for label in labels)
    apart = letters * _LETTER * _size(unit) ** 2 > _COVERED * shot.width * shot.height
    told = [str(n) if apart and any(labels) else label for n, label in enumerate(labels, 1)]
    drawn = [_region(region, unit, shot, label) for region, label in zip(regions, told, strict=True)]
    listed = Markup("<ol>{}</ol>").format(join(Markup("<li>{}</li>").format(label or "(no label)") for label in labels))
    return Markup(
        '<figure class="shot {kind}"><div style="--wide: {wide}px">'
        '<img src="{src}" width="{w}" height="{h}" alt="{alt}" loading="lazy">'
        '<svg viewBox="0 0 {w} {h}" aria-hidden="true">{drawn}</svg></div>{listed}{caption}</figure>'
    ).format(
        kind="small" if scale > 1 else "",
        wide=wide,
        listed=listed if apart else "",
        src=shot.address,
        w=shot.width,
        h=shot.height,
        alt=caption or "picture",
        drawn=join(drawn),
        caption=Markup("<figcaption>{}</figcaption>").format(caption) if caption else "",
    )


def _size(unit: float) -> float:
    """Height of the letters of a label."""
    return 6.5 * unit


def _region(region: Region, unit: float, shot: Shot, label: str) -> Markup:
    """One region, with ``label`` written on the picture: above it, or below where it is at the upper edge."""
    x, y = region.coordinates[:2]
    if len(region.coordinates) == 4:
        right, bottom = region.coordinates[2:]
        mark = Markup(
            '<rect class="halo" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" stroke-width="{b:.2f}"/>'
            '<rect class="region" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" stroke-width="{s:.2f}"/>'
        ).format(x=x, y=y, w=right - x, h=bottom - y, b=2.2 * unit, s=1.1 * unit)
    else:
        mark = Markup(
            '<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="{r:.2f}" stroke-width="{b:.2f}"/>'
            '<circle class="region" cx="{x:.1f}" cy="{y:.1f}" r="{r:.2f}" stroke-width="{s:.2f}"/>'
        ).format(x=x, y=y, r=4 * unit, b=2.4 * unit, s=1.2 * unit)
    size = _size(unit)
    name = Markup("")
    if label:
        cut = label if len(label) <= _CUT else label[: _CUT - 1] + "…"
        beside = x if len(region.coordinates) == 4 else x + 5 * unit  # of a circle
        left = min(beside, max(shot.width - _LETTER * size * len(cut), 0))
        below = region.coordinates[-1] + 1.2 * size
        base = below if y - 1.5 * unit < size and below < shot.height else max(y - 1.5 * unit, size)
        name = Markup(
            '<text class="label" x="{:.1f}" y="{:.1f}" style="font-size:{:.1f}px;stroke-width:{:.1f}px">{}</text>'
        ).format(left, base, size, size / 3, cut)
    return Markup("<g><title>{}</title>{}{}</g>").format(region.label or "(no label)", mark, name)


def record_view(record: Record, shots: Callable[[int], Shot], where: str = "") -> Markup:
    """The whole record as a card; ``shots(n)`` is its picture number ``n``, ``where`` its place on disk."""
    seen = _Pictures(record, shots)
    if record.messages:
        body = join(
            Markup('<div class="turn {}"><span class="role">{}</span><div>{}</div></div>').format(
                "trained" if message.role == "assistant" and message.trainable else "",
                message.role,
                join(_part(part, seen) for part in message.parts),
            )
            for message in record.messages
        )
    else:
        body = Markup('<div class="turn trained"><span class="role">text</span><div>{}</div></div>').format(
            join(_part(part, seen) for part in record.parts)
        )
    facts = [tag(record.source)] + ([tag(record.task)] if record.task else [])
    rest = ""
    if record.answer:
        rest = Markup('<p class="small">answer: <code>{}</code></p>').format(_cut(record.answer))
    return Markup(
        '<article class="sample"><header><b>{}</b> {} <span class="quiet small">{}</span></header>{}{}{}</article>'
    ).format(record.key, join(facts, " "), where, _tools(record), body, rest)


class _Pictures:
    """Hands out a record's pictures in the order in which its parts show them."""

    def __init__(self, record: Record, shots: Callable[[int], Shot]):
        self.record, self.shots, self.next = record, shots, 0

    def take(self, caption: str = "") -> Markup:
        n, self.next = self.next, self.next + 1
        regions = [r for r in (*self.record.boxes, *self.record.points) if r.image == n]
        return figure(self.shots(n), regions, caption)


def _part(part: Part, pictures: _Pictures) -> Markup:
    match part:
        case Image():
            return pictures.take()
        case Video(timestamps):
            frames = join(pictures.take(f"{time:g} s") for time in timestamps)
            return Markup('<div class="frames">{}</div>').format(frames)
        case Text(text):
            return Markup('<p class="said">{}</p>').format(_cut(text))
        case Thinking(text):
            return Markup('<p class="said thinking">{}</p>').format(_cut(text))
        case Box(text):
            return Markup('<p class="said boxed">{}</p>').format(_cut(text))
        case ToolCall(name, arguments):
            told = ", ".join(f"{key}={value}" for key, value in arguments.items())
            return Markup('<p class="said"><code>{}({})</code></p>').format(name, _cut(told))


def _tools(record: Record) -> Markup | str:
    if not record.tools:
        return ""
    return Markup('<p class="quiet small">tools: {}</p>').format(
        ", ".join(_cut(tool.declaration, 200) for tool in record.tools)
    )


def _cut(text: str, limit: int = TEXT) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"
