"""Every world of questions there is, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mmagent.worlds import (
    algebra,
    biology,
    boxes3d,
    chart_questions,
    chemistry,
    counting,
    figures,
    formulas,
    geo,
    instructions,
    papers,
    passages,
    physics,
    picture_puzzles,
    programs,
    puzzles,
    scene_questions,
    spatial,
    svg_questions,
    tables,
    videos,
)
from mmagent.worlds.drawing import once
from mmagent.worlds.examples import World


@once
def all_worlds() -> dict[str, World]:
    """Name to world, families together."""
    families = (
        chart_questions,
        tables,
        formulas,
        figures,
        svg_questions,
        counting,
        spatial,
        boxes3d,
        puzzles,
        picture_puzzles,
        videos,
        papers,
        programs,
        passages,
        algebra,
        physics,
        chemistry,
        biology,
        geo,
        scene_questions,
        instructions,
    )
    return {world.name: world for family in families for world in family.worlds()}


def choose_worlds(names: Sequence[str]) -> list[World]:
    """The worlds of these names, or of whole families (``charts``); all where none is named. Raises ``ValueError``
    for an unknown one, with the nearest."""
    known = all_worlds()
    chosen: dict[str, World] = {}
    for name in names or known:
        meant = {one: world for one, world in known.items() if name in (one, one.partition("/")[0])}
        if not meant:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise ValueError(f"unknown world {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        chosen |= meant
    return list(chosen.values())
