"""Referring expressions: an element by its place, company, colour, state or size, and nothing else by it.

Every phrase here is strict: what else on the screen could be meant in a loose reading rules it out. So "the button to
the right of X" needs that no other button lies anywhere to the right of X at its height, not only no nearer one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mmagent.worlds.elements import Box, Element, Group
from mmagent.worlds.questions import Target, color_name, noun, targets

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
SIDES = {"to the right of": (0, 1), "to the left of": (0, -1), "below": (1, 1), "above": (1, -1)}
"""Relations, as the axis (0 is across) and the direction along it."""
STATED = ("checkbox", "radio", "switch")
_MEANT = ("button", "link", "textbox", "checkbox", "radio", "combobox", "tab", "slider", "menuitem", "image", "cell")
_NEAR = 220  # pixels between two things that are named together
_APART = 6  # pixels by which the outermost of a kind stands out
_LARGER = 1.5
_NAME = 28  # characters of an anchor's text


def expressions(elements: Sequence[Element], groups: Sequence[Group] = ()) -> list[Target]:
    """Phrases of all kinds for the elements of a screen that show, each with the one element it means."""
    found = [*_beside(elements), *_within(elements, groups), *_cells(elements, groups), *_coloured(elements)]
    found += [*_stated(elements), *_outermost(elements)]
    often = Counter(target.phrase for target in found)
    return [target for target in found if often[target.phrase] == 1 and target.element.clear >= 0.5]


def _kinds(elements: Sequence[Element]) -> dict[str, list[Element]]:
    """Elements by their noun, hidden ones too: what shows a little could be meant."""
    kinds: dict[str, list[Element]] = {}
    for element in elements:
        if element.role in _MEANT:
            kinds.setdefault(noun(element), []).append(element)
    return kinds


def lies(box: Box, anchor: Box, relation: str) -> bool:
    """Whether ``box`` is ``relation`` to ``anchor`` in a loose reading: past its border, level with some of it."""
    axis, way = SIDES[relation]
    other = 1 - axis
    level = min(box[other + 2], anchor[other + 2]) > max(box[other], anchor[other])
    past = box[axis] >= anchor[axis + 2] - 2 if way > 0 else box[axis + 2] <= anchor[axis] + 2
    return level and past


def _gap(box: Box, anchor: Box, relation: str) -> int:
    axis, way = SIDES[relation]
    return box[axis] - anchor[axis + 2] if way > 0 else anchor[axis] - box[axis + 2]


def _beside(elements: Sequence[Element]) -> Iterator[Target]:
    anchors = [t for t in targets(elements) if t.element.text and len(t.element.text) <= _NAME]
    for kind, same in sorted(_kinds(elements).items()):
        for phrase, anchor in anchors:
            if noun(anchor) == kind:
                continue
            for relation in SIDES:
                there = [e for e in same if lies(e.box, anchor.box, relation)]
                if len(there) == 1 and _gap(there[0].box, anchor.box, relation) <= _NEAR:
                    yield Target(f"the {kind} {relation} {phrase}", there[0])


def _in_order(same: Sequence[Element]) -> list[Element] | None:
    """Reading order, None where lines are not clear."""
    ordered = sorted(same, key=lambda e: (e.box[1], e.box[0]))
    for one, next_one in pairwise(ordered):
        below = next_one.box[1] - one.box[1] >= 4
        beside = next_one.box[1] == one.box[1] and next_one.box[0] >= one.box[2]
        if not (below or beside):
            return None
    return ordered


def _titled(groups: Sequence[Group]) -> Iterator[tuple[str, Group]]:
    often = Counter((group.role, group.name) for group in groups)
    for group in groups:
        if group.name and len(group.name) <= _NAME and often[group.role, group.name] == 1:
            yield f'the {group.role} "{group.name}"', group


def _within(elements: Sequence[Element], groups: Sequence[Group]) -> Iterator[Target]:
    for place, group in _titled(groups):
        for kind, same in sorted(_kinds([elements[n] for n in group.members]).items()):
            if kind == "cell":
                continue
            if len(same) == 1:
                yield Target(f"the {kind} in {place}", same[0])
            elif len(same) <= len(ORDINALS) and (ordered := _in_order(same)):
                last = Target(f"the last {kind} in {place}", ordered[-1])
                yield from (
                    Target(f"the {word} {kind} in {place}", e) for word, e in zip(ORDINALS, ordered, strict=False)
                )
                yield last


def _cells(elements: Sequence[Element], groups: Sequence[Group]) -> Iterator[Target]:
    """By row and column of a table: the row by its first words, the column by its head."""
    for _, table in ((g.name, g) for g in groups if g.role == "table"):
        heads = [elements[n] for n in table.members if elements[n].role == "columnheader" and elements[n].text]
        often = Counter(head.text for head in heads)
        for place, row in _titled(groups):
            if row.role != "row" or not set(row.members) <= set(table.members):
                continue
            cells = [elements[n] for n in row.members if elements[n].role == "cell"]
            for head in heads:
                under = [
                    c
                    for c in cells
                    if head.box[0] <= (c.box[0] + c.box[2]) / 2 < head.box[2] and c.box[1] > head.box[1]
                ]
                if often[head.text] == 1 and len(head.text) <= _NAME and len(under) == 1:
                    yield Target(f'the cell under "{head.text}" in {place}', under[0])


def _coloured(elements: Sequence[Element]) -> Iterator[Target]:
    for kind, same in sorted(_kinds(elements).items()):
        names = [color_name(e.background) for e in same]
        if len(same) < 2 or kind in ("cell", "image") or None in names:
            continue
        for name, count in sorted(Counter(names).items(), key=str):
            if count == 1:
                yield Target(f"the {name} {kind}", same[names.index(name)])


def _stated(elements: Sequence[Element]) -> Iterator[Target]:
    for kind, same in sorted(_kinds(elements).items()):
        if len(same) < 2:
            continue
        states: list[tuple[str, list[Element]]] = [("disabled", [e for e in same if not e.enabled])]
        if same[0].role in STATED:
            states += [
                (f"{word} ", [e for e in same if e.checked is value])
                for word, value in (("checked", True), ("unchecked", False))
            ]
        elif any(e.checked is not None for e in same):
            states.append(("selected", [e for e in same if e.checked]))
        if same[0].role == "textbox":
            states += [("empty", [e for e in same if not e.value]), ("focused", [e for e in same if e.focused])]
        for word, having in states:
            if len(having) == 1:
                yield Target(f"the {word.strip()} {kind}", having[0])


def _outermost(elements: Sequence[Element]) -> Iterator[Target]:
    for kind, same in sorted(_kinds(elements).items()):
        if len(same) < 2 or kind == "cell":
            continue
        for word, side, way in (("leftmost", 0, 1), ("rightmost", 2, -1), ("topmost", 1, 1), ("lowest", 3, -1)):
            ordered = sorted(same, key=lambda e: way * e.box[side])
            if abs(ordered[1].box[side] - ordered[0].box[side]) >= _APART:
                yield Target(f"the {word} {kind}", ordered[0])
        areas = sorted(((e.box[2] - e.box[0]) * (e.box[3] - e.box[1]), n) for n, e in enumerate(same))
        if areas[-1][0] >= _LARGER * areas[-2][0]:
            yield Target(f"the largest {kind}", same[areas[-1][1]])
        if areas[1][0] >= _LARGER * areas[0][0]:
            yield Target(f"the smallest {kind}", same[areas[0][1]])
