"""What records would cost in training, against the packs of the presets: told where data is made, not where it is
refused.

A picture costs what :func:`~mmagent.geometry.fit` makes of its size, known from its header; text is counted at
:data:`TEXT_BYTES` a token where nobody has named a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

TEXT_BYTES = 4
"""UTF-8 bytes of text that are taken for a token: about what a vocabulary of 150,000 makes of English and Chinese. A
small vocabulary makes more tokens of them."""
_AROUND = 2  # tokens that begin and end a picture


@dataclass(frozen=True)
class Pack:
    """What a micro-batch may hold."""

    tokens: int
    patches: int

    @property
    def picture(self) -> int:
        """Visual tokens that a picture may have at most, alone in it."""
        return min(self.tokens - _AROUND, self.patches // _merge())


PACKS = {
    "recipes.pretrain --preset laptop": Pack(2048, 4096),
    "recipes.sft --preset laptop": Pack(2048, 8192),
    "--preset small": Pack(1 << 15, 1 << 16),
}
"""Of the presets, which this package may not import: a test compares them."""


@lru_cache(maxsize=1)
def _merge() -> int:
    from mmagent.geometry import GeometryConfig  # brings torch along

    return GeometryConfig().merge_size ** 2


@lru_cache(maxsize=4096)
def picture_tokens(height: int, width: int) -> int:
    """Visual tokens of a picture of so many pixels, in the geometry of the presets (28 x 28 pixels a token)."""
    from mmagent.geometry import GeometryConfig, image_grid, visual_tokens

    geometry = GeometryConfig()
    return visual_tokens(image_grid(height, width, geometry), geometry.merge_size)


@dataclass
class Costs:
    """Over all records: the largest ``picture`` (tokens, width, height, key) and the longest ``record`` (tokens,
    patches, key); by pack, how many records are ``over`` it, and how many of these by one picture ``alone``."""

    picture: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    over: dict[str, int] = field(default_factory=dict)
    alone: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, sizes: Sequence[tuple[int, int]], text: int) -> None:
        """Count a record with pictures of ``sizes (height, width)`` and ``text`` tokens of anything else."""
        visual = [picture_tokens(*size) for size in sizes]
        most = max(visual, default=0)
        if most > self.picture.get("tokens", 0):
            height, width = sizes[visual.index(most)]
            self.picture = {"tokens": most, "width": width, "height": height, "key": key}
        tokens, patches = sum(visual) + text, sum(visual) * _merge() if visual else 0
        if tokens > self.record.get("tokens", 0):
            self.record = {"tokens": tokens, "patches": patches, "key": key}
        for name, pack in PACKS.items():
            if tokens > pack.tokens or patches > pack.patches:
                self.over[name] = self.over.get(name, 0) + 1
                if most and most > pack.picture:
                    self.alone[name] = self.alone.get(name, 0) + 1


def text_tokens(text: int, pictures: int) -> int:
    """About how many tokens ``text`` bytes are, with what stands around the pictures."""
    return -(-text // TEXT_BYTES) + _AROUND * pictures


def cost_lines(costs: Costs, *, counted: bool = False, dpi: int = 0) -> Iterator[str]:
    """The same for people, with what to do about what exceeds a pack. ``counted``: by a tokenizer; ``dpi`` at which
    pages were drawn, 0 where there are none."""
    if not costs.record:
        return
    largest, seen = "", costs.picture
    if seen:
        largest = f"largest picture {seen['tokens']} tokens ({seen['width']}x{seen['height']}, {_shown(seen['key'])}); "
    about = "" if counted else "about "
    how = "" if counted else f"; text at {TEXT_BYTES} bytes a token, validate --tokenizer counts it"
    yield f"{largest}longest record {about}{costs.record['tokens']} tokens ({_shown(costs.record['key'])}){how}"
    for name, count in costs.over.items():
        pack, alone = PACKS[name], costs.alone.get(name, 0)
        one = f", {alone} of them by one picture (at most {pack.picture} tokens)" if alone else ""
        yield f"{count} records exceed a pack of {name}, {pack.tokens} tokens and {pack.patches} patches{one}"
    if costs.alone:
        yield f"  a picture larger than a pack is refused, data.split_long or not: {_remedies(costs, dpi)}"
    if any(count > costs.alone.get(name, 0) for name, count in costs.over.items()):
        yield "  longer records are cut between turns, parts and paragraphs by data.split_long=true, else refused"


def _shown(key: str) -> str:
    key = key if key.isprintable() else ascii(key)[1:-1]
    return key if len(key) <= 100 else f"{key[:97]}..."


def _remedies(costs: Costs, dpi: int) -> str:
    least = min(PACKS[name].picture for name in costs.alone)
    smaller = math.floor(0.98 * dpi * math.sqrt(least / costs.picture["tokens"]))  # sizes are rounded to tokens
    pages = f"draw pages with --dpi {smaller}, " if smaller >= 36 else ""
    return (
        f"{pages}pretrain with geometry.max_tokens={least}, which sees every picture at most so large, "
        "or raise data.tokens_per_microbatch and data.patches_per_microbatch"
    )


def costs_of(state: Mapping[str, Any]) -> Costs:
    """What ``asdict`` made of some, or none."""
    return Costs(**state)
