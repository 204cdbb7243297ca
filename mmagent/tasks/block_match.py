"""How two pages' text blocks agree: matching and scores of Design2Code (Si et al. 2024, ``metrics/visual_score.py``).

Blocks with one box are one block. Then neighbours are merged, on either side, while that makes the matched texts more
alike by more than 0.05 on average; the last matching prefers pairs whose neighbours match as well. Pairs whose texts
agree by less than a half are none. All four scores are as published. Ratios of texts are computed once, which is what
makes it fast; an answer whose comparison would take minutes is :class:`TooMuchWork`, by a count and not by a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import cbrt

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmagent.tasks.page_blocks import Block, Box, Colour, TooMuchWork

LEAST_RATIO, LEAST_GAIN, BONUS = 0.5, 0.05, 0.1
MOST_WORK = 2_000_000_000
"""Of pairs of characters compared, and of cells of matrices times their shorter side: some tens of seconds."""
_RGB_TO_XYZ = (
    (0.412424, 0.357579, 0.180464),
    (0.212656, 0.715158, 0.0721856),
    (0.0193324, 0.119193, 0.950444),
)  # of the library that the published code uses, to its last digit
_WHITE = (0.95047, 1.0, 1.08883)


@dataclass(frozen=True)
class BlockScores:
    """``block``: share of the blocks' area that is matched; means over matched pairs of how alike their ``text`` is,
    how near their ``position`` and how alike their ``color``; 0 where nothing matches. ``pairs``: boxes that match,
    the candidate's first."""

    block: float = 0.0
    text: float = 0.0
    position: float = 0.0
    color: float = 0.0
    pairs: tuple[tuple[Box, Box], ...] = ()

    def parts(self) -> dict[str, float]:
        return {"block": self.block, "text": self.text, "position": self.position, "color": self.color}


def compare_blocks(candidate: Sequence[Block], reference: Sequence[Block], most_work: int = MOST_WORK) -> BlockScores:
    """Raises :class:`TooMuchWork`."""
    ours, theirs = merged_by_box(candidate), merged_by_box(reference)
    if not ours or not theirs:
        return BlockScores()
    ours, theirs, pairs = _Matcher(most_work).match(ours, theirs)
    texts = [(i, j, SequenceMatcher(None, ours[i].text, theirs[j].text).ratio()) for i, j in pairs]
    matched = [(ours[i], theirs[j], ratio) for i, j, ratio in texts if ratio >= LEAST_RATIO]
    if not matched:
        return BlockScores()
    left, right = ({pair[side] for pair in texts if pair[2] >= LEAST_RATIO} for side in (0, 1))
    alone = sum(_area(block) for n, block in enumerate(ours) if n not in left) + sum(
        _area(block) for n, block in enumerate(theirs) if n not in right
    )
    both = [_area(one) + _area(other) for one, other, _ in matched]
    return BlockScores(
        float(np.sum(both) / np.sum([alone, *both])),
        float(np.mean([ratio for _, _, ratio in matched])),
        float(np.mean([_nearness(one.box, other.box) for one, other, _ in matched])),
        float(np.mean([color_likeness(one.colour, other.colour) for one, other, _ in matched])),
        tuple((one.box, other.box) for one, other, _ in matched),
    )


def merged_by_box(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of one box as one: texts one after the other, colours by halves."""
    merged: dict[Box, Block] = {}
    for block in blocks:
        known = merged.get(block.box)
        if known is not None:
            r, g, b = ((one + other) / 2 for one, other in zip(known.colour, block.colour, strict=True))
            block = Block(f"{known.text} {block.text}", block.box, (r, g, b))
        merged[block.box] = block
    return list(merged.values())


def joined(one: Block, other: Block) -> Block:
    """Two neighbours as one block."""
    left, top = min(one.box[0], other.box[0]), min(one.box[1], other.box[1])
    right = max(one.box[0] + one.box[2], other.box[0] + other.box[2])
    bottom = max(one.box[1] + one.box[3], other.box[1] + other.box[3])
    r, g, b = ((a + c) // 2 for a, c in zip(one.colour, other.colour, strict=True))
    return Block(f"{one.text} {other.text}", (left, top, right - left, bottom - top), (r, g, b))


class _Matcher:
    def __init__(self, most_work: int):
        self.ratios: dict[tuple[str, str], float] = {}
        self.left = most_work

    def match(self, ours: list[Block], theirs: list[Block]) -> tuple[list[Block], list[Block], list[tuple[int, int]]]:
        """The blocks after merging, and which of them go together."""
        while True:
            costs = self._costs(ours, theirs)
            ours, costs, changed = self._merge(ours, theirs, costs, swapped=False)
            theirs, costs, also = self._merge(theirs, ours, costs.T, swapped=True)
            if not (changed or also):
                return ours, theirs, self._assign(_with_context(self._costs(ours, theirs)))[0]

    def _merge(
        self, blocks: list[Block], others: list[Block], costs: np.ndarray, swapped: bool
    ) -> tuple[list[Block], np.ndarray, bool]:
        """Merge neighbours in ``blocks`` where it pays, best first and none twice in a round; ``costs`` has a row a
        block. Their order in the published code decides which of two equal assignments is found: hence ``swapped``."""
        if len(blocks) < 2:
            return blocks, (costs.T if swapped else costs), False

        def paid(matrix: np.ndarray) -> list[float]:
            return self._assign(matrix.T if swapped else matrix)[1]

        current = paid(costs)
        gains = []
        for n in range(len(blocks) - 1):
            row = self._row(joined(blocks[n], blocks[n + 1]), others, swapped)
            gain = _gain(current, paid(np.concatenate([costs[:n], row[None], costs[n + 2 :]])))
            if gain > LEAST_GAIN:
                gains.append((n, gain))
        gains.sort(key=lambda entry: entry[1], reverse=True)
        if not gains:
            return blocks, (costs.T if swapped else costs), False
        taken: set[int] = set()
        result: dict[int, Block] = dict(enumerate(blocks))
        for n, _ in gains:
            if n in taken or n + 1 in taken:
                continue
            taken |= {n, n + 1}
            result[n] = joined(result[n], result.pop(n + 1))
        merged = list(result.values())
        return merged, (self._costs(others, merged) if swapped else self._costs(merged, others)), True

    def _costs(self, ours: Sequence[Block], theirs: Sequence[Block]) -> np.ndarray:
        return np.array([self._row(block, theirs, False) for block in ours])

    def _row(self, block: Block, others: Sequence[Block], swapped: bool) -> np.ndarray:
        """Costs of one block; the ratio of two texts depends on their order."""
        if swapped:
            return np.array([-self._ratio(other.text, block.text) for other in others])
        return np.array([-self._ratio(block.text, other.text) for other in others])

    def _ratio(self, one: str, other: str) -> float:
        if one == other:
            return 1.0
        found = self.ratios.get((one, other))
        if found is None:
            self._work(len(one) * len(other))
            found = self.ratios[one, other] = SequenceMatcher(None, one, other).ratio()
        return found

    def _assign(self, costs: np.ndarray) -> tuple[list[tuple[int, int]], list[float]]:
        self._work(costs.size * min(costs.shape))
        rows, columns = linear_sum_assignment(costs)
        return list(zip(rows.tolist(), columns.tolist(), strict=True)), costs[rows, columns].tolist()

    def _work(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TooMuchWork("more blocks or longer ones than can be compared")


def _gain(before: list[float], after: list[float]) -> float:
    """By how much the mean cost falls, of what is not the same before and after."""
    counts, others = Counter(before), Counter(after)
    for value in set(before) & set(after):
        both = min(counts[value], others[value])
        counts[value] -= both
        others[value] -= both
    one, other = list(counts.elements()), list(others.elements())
    gain = (sum(one) / len(one) if one else 0) - (sum(other) / len(other) if other else 0)
    return 0.0 if gain > 0 and min(one) <= min(other) else gain


def _with_context(costs: np.ndarray, window: int = 1) -> np.ndarray:
    """Costs of likely pairs, lowered by a tenth of the two best pairs around them."""
    adjusted = costs.copy()
    for i, j in zip(*np.nonzero(costs < -LEAST_RATIO), strict=True):
        around = costs[max(0, i - window) : i + window + 1, max(0, j - window) : j + window + 1].flatten()
        around = np.sort(around)[::-1]
        around = np.delete(around, np.nonzero(around == costs[i, j])[0][0])
        adjusted[i, j] += BONUS * np.sum(around[-window * 2 :])
    return adjusted


def _area(block: Block) -> float:
    return block.box[2] * block.box[3]


def _nearness(one: Box, other: Box) -> float:
    dx = (one[0] + one[2] / 2) - (other[0] + other[2] / 2)
    dy = (one[1] + one[3] / 2) - (other[1] + other[3] / 2)
    return 1.0 - max(abs(dx), abs(dy))


def color_likeness(one: Colour, other: Colour) -> float:
    """One less a hundredth of their CIEDE2000 difference, at least 0."""
    from skimage.color import deltaE_ciede2000

    return max(0.0, 1.0 - float(deltaE_ciede2000(np.array(to_lab(one)), np.array(to_lab(other)))) / 100.0)


def to_lab(colour: Colour) -> tuple[float, float, float]:
    """CIELAB of an sRGB colour (0 to 255), by two degrees and D65."""
    shares = (value / 255.0 for value in colour)
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
    xyz = (max(sum(m * v for m, v in zip(row, linear, strict=True)), 0.0) for row in _RGB_TO_XYZ)
    scaled = (value / white for value, white in zip(xyz, _WHITE, strict=True))
    x, y, z = (cbrt(v) if v > 216.0 / 24389.0 else 7.787 * v + 16.0 / 116.0 for v in scaled)
    return 116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)
