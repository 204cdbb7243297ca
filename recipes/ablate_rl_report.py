"""What the ablation of RL found: change by category, how often a category falls, and differences between arms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.statistics import mean_interval
from mmagent.files import write_text
from recipes.ablate_rl_tasks import JOINT, NARROW, VISUAL
from recipes.ablation_report import dot_plot, t_interval, with_interval

Scores = dict[str, list[float]]
"""Of every item, by task."""
FIGURES = ("change", "categories that fall", "what falls")
NAMES = {task: category for category, task in JOINT.items()}


def read(output: Path, who: str) -> Scores:
    """Raises ``ValueError`` naming what has not been judged."""
    path = output / "judged" / who / "scores.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the ablation has not come to {who}")
    return json.loads(path.read_text(encoding="utf-8"))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interference(before: Scores, after: Scores, leave: Sequence[str] = ()) -> dict[str, float]:
    """Over tasks but ``leave``: the mean change, which share of those that stood above 0 falls, and by how much on
    average over all. Answers are greedy and items the same: a task whose answers do not change neither falls nor rises.
    """
    changes = {task: mean(after[task]) - mean(before[task]) for task in before if task not in leave}
    falls = [-change for change in changes.values() if change < -1e-9]
    able = sum(mean(before[task]) > 0 for task in changes)
    return dict(
        zip(FIGURES, (mean(list(changes.values())), len(falls) / max(able, 1), sum(falls) / len(changes)), strict=True)
    )


def write(part: str, output: Path, seeds: int) -> str:
    """``part.json``, ``part.md`` and ``part.svg`` in ``output``; returns the tables."""
    before = read(output, f"{part}-before" if part in ("visual", "miniwob") else "base")
    arms = {label: [read(output, name.format(seed)) for seed in range(seeds)] for label, name in ARMS[part].items()}
    if part in ("visual", "miniwob"):
        rows = {label: {"score": [_whole(seed) for seed in found]} for label, found in arms.items()}
        rows["before"] = {"score": [_whole(before)] * seeds}
    else:
        own = {label: JOINT[category] for label in arms for category in NARROW if category in label}
        rows = {
            label: {
                **{name: [] for name in FIGURES},
                **_columns([interference(before, seed, [own[label]] if label in own else []) for seed in found]),
                **{category: [mean(seed[JOINT[category]]) for seed in found] for category in NARROW},
            }
            for label, found in arms.items()
        }
    tables = [_arms(rows), _differences(rows), _tasks(before, arms)]
    write_text(output / f"{part}.json", json.dumps({"before": before, "arms": arms, "figures": rows}, indent=1) + "\n")
    write_text(output / f"{part}.md", "\n\n".join(tables) + "\n")
    write_text(output / f"{part}.svg", dot_plot(rows, tuple(next(iter(rows.values())))))
    return "\n\n".join(tables)


ARMS: Mapping[str, Mapping[str, str]] = {
    "joint": {"joint RL": "joint-rl-{}", "joint SFT": "joint-sft-{}"},
    "narrow": {
        **{
            f"{how.upper()} on {category} alone": f"only-{how}-{category}-{{}}"
            for category in NARROW
            for how in ("rl", "sft")
        },
        "joint RL": "joint-rl-{}",
    },
    "experts": {"one model of two experts": "experts-{}"},
    "visual": {arm: f"visual-{arm}-{{}}" for arm in VISUAL.arms},
    "miniwob": {"after": "miniwob-{}"},
}
"""``{part: {label: who was judged, with a place for the seed}}``."""


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _whole(scores: Scores) -> float:
    """The mean of the tasks' means."""
    return mean([mean(values) for values in scores.values()])


def _arms(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    names = tuple(next(iter(rows.values())))
    lines = ["| means over seeds | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for label, figures in rows.items():
        lines.append(f"| {label} | " + " | ".join(with_interval(t_interval(figures[name])) for name in names) + " |")
    return "\n".join(lines)


def _differences(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Every arm less the last, seed by seed."""
    *others, last = rows
    names = tuple(rows[last])
    lines = [f"| less {last} | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for label in others:
        pairs = [[a - b for a, b in zip(rows[label][name], rows[last][name], strict=True)] for name in names]
        lines.append(f"| {label} | " + " | ".join(with_interval(t_interval(each), sign=True) for each in pairs) + " |")
    return "\n".join(lines)


def _tasks(before: Scores, arms: Mapping[str, Sequence[Scores]]) -> str:
    """By task: the score before, and the change with a bootstrap interval over items, each the mean of its seeds."""
    lines = [f"| | before | {' | '.join(arms)} |", "| --- " * (len(arms) + 2) + "|"]
    for task, values in before.items():
        cells = []
        for seeds in arms.values():
            apart = [mean([seed[task][n] for seed in seeds]) - value for n, value in enumerate(values)]
            same = len(set(apart)) == 1  # nothing to draw from
            cells.append(f"{apart[0]:+.3f}" if same else with_interval(mean_interval(apart), sign=True))
        lines.append(f"| {NAMES.get(task, task)} | {mean(values):.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)
