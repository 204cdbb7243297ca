"""What the ablation of discrete diffusion found: a table, a picture, and a page of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from mmagent.files import write_text
from mmagent.html.pieces import Section, page, paragraph
from recipes.ablation_report import dot_plot, t_interval, with_interval

FIGURES = (
    *("exact", "exact, page", "exact, page edit", "exact, function", "exact, function edit"),
    *("alike", "nats/token", "tokens/forward", "tokens/s"),
)
COMPARED = {
    "edits in the noise": ("edits", "masks"),
    "edits, where they can mend": ("edits revised", "masks revised"),
    "looking again": ("edits revised", "edits"),
    "best orders": ("best orders", "any orders"),
    "own orders": ("best orders", "more of the same"),
    "reinforced speed": ("quickened", "edits"),
    "diffusion": ("edits", "next token"),
}
"""``{what: (with it, without)}``: equal data, seed and tokens through the decoder."""

Found = Mapping[str, Sequence[Mapping[str, float]]]


def gather(folder: Path, arms: Sequence[str], seeds: int) -> dict[str, list[dict[str, float]]]:
    """``{arm: [figures of a seed]}``. Raises ``ValueError`` naming what is missing."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for arm in arms:
        for seed in range(seeds):
            path = folder / f"{arm.replace(' ', '-')}-{seed}.json"
            if not path.is_file():
                raise ValueError(f"{path} is missing: the ablation has not come to {arm}, seed {seed}")
            found[arm].append(json.loads(path.read_text(encoding="utf-8")))
    return found


def write(folder: Path, arms: Sequence[str], seeds: int) -> str:
    """``ablation.json``, ``ablation.md``, ``ablation.svg`` and ``report.html``; returns the tables."""
    found = gather(folder, arms, seeds)
    rows = {arm: {name: [run[name] for run in runs] for name in FIGURES} for arm, runs in found.items()}
    tables = _table(rows), _differences(rows), *_followed(found)
    write_text(folder / "ablation.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "ablation.md", "\n\n".join(tables) + "\n")
    picture = dot_plot(rows, ("exact", "alike", "nats/token", "tokens/forward"))
    write_text(folder / "ablation.svg", picture)
    about = f"{seeds} seeds; means with Student's 95 % intervals; differences seed by seed."
    sections = [
        Section("What was found", Markup("<pre>{}</pre>").format(tables[0]), about),
        Section("Differences", Markup("<pre>{}</pre>").format("\n\n".join(tables[1:]))),
        Section("A picture", Markup(picture) + paragraph("Dots are seeds, bars are intervals.", quiet=True)),
    ]
    write_text(folder / "report.html", page("Discrete diffusion on small pages and functions", sections))
    return "\n\n".join(tables)


def _table(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for arm, figures in rows.items():
        lines.append(f"| {arm} | " + " | ".join(with_interval(t_interval(figures[name])) for name in FIGURES) + " |")
    return "\n".join(lines)


def _differences(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for what, (mine, other) in COMPARED.items():
        if mine in rows and other in rows:
            cells = []
            for name in FIGURES:
                each = [a - b for a, b in zip(rows[mine][name], rows[other][name], strict=True)]
                cells.append(with_interval(t_interval(each), sign=True))
            lines.append(f"| {what}: {mine} - {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _followed(found: Found) -> list[str]:
    """How many questions own orders were learnt from: without any, such arms are what they began as."""
    told = {arm: [int(run["followed"]) for run in runs if "followed" in run] for arm, runs in found.items()}
    return [f"{arm}: own right answers to {each} questions, by seed" for arm, each in told.items() if each]
