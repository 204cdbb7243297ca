"""What pruning cost, by pattern and density: a table and a plot from the logs of runs that did it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from mmagent.files import write_text
from mmagent.train.hooks import read_jsonl
from recipes.ablation_report import t_interval, with_interval

DENSE = "dense"
LAST = 5
"""Steps that an encoder's loss is the mean of: one alone says more of its pictures than of the encoder."""
HELD_OUT = "validation/loss/lm"
PAIRS = (("tile-2d", "block"), ("tile-element", "tile-2d"), ("element", "tile-element"))
"""What is expected to lose less, and than what."""

Points = list[tuple[float, float]]


def read(run: Path, levels: int, each: int) -> Points:
    """``(density, loss)`` at the end of the scoring and of every level of one run. Raises ``ValueError`` where its log
    is shorter."""
    rows = read_jsonl(run / "log.jsonl")
    if len(rows) < each * (levels + 1):
        raise ValueError(f"{run}: the log has {len(rows)} steps, {each * (levels + 1)} are wanted")
    found = []
    for end in range(each, each * (levels + 1) + 1, each):
        last = rows[end - 1]
        loss = last[HELD_OUT] if HELD_OUT in last else fmean(row["loss"] for row in rows[end - min(LAST, each) : end])
        found.append((last.get("sparsity/density", 1.0), loss))
    return found


def write(
    output: Path, parts: Sequence[str], patterns: Sequence[str], levels: Sequence[float], seeds: int, each: int
) -> str:
    """Read all runs, ``PART-PATTERN-SEED`` in ``output``; write the files; return the table."""
    found = {
        part: {p: [read(output / f"{part}-{p}-{seed}", len(levels), each) for seed in range(seeds)] for p in patterns}
        for part in parts
    }
    tables = [table(*one, levels) for one in found.items() for table in (_table, _pairs)]
    table = "\n\n".join(filter(None, tables))
    write_text(output / "sparsity.md", table + "\n")
    plot(found, output / "sparsity.png")
    return table


def _table(part: str, by_pattern: dict[str, list[Points]], levels: Sequence[float]) -> str:
    """Losses less the dense run's at the same step and seed, means over seeds with Student's 95 % intervals."""
    lines = [f"| {part} | asked | left | loss | more than dense |", "| --- | --- | --- | --- | --- |"]
    dense = by_pattern[DENSE]
    for pattern, runs in by_pattern.items():
        for n, level in enumerate([0.0, *levels]):
            if pattern != DENSE and not n:
                continue  # nothing is pruned there
            losses = [run[n][1] for run in runs]
            more = [loss - base[n][1] for loss, base in zip(losses, dense, strict=True)]
            left = 100 * fmean(run[n][0] for run in runs)
            asked = "" if pattern == DENSE else f"{100 * level:g} %"
            told = "" if pattern == DENSE else with_interval(t_interval(more), sign=True)
            lines.append(f"| {pattern} | {asked} | {left:.1f} % | {with_interval(t_interval(losses))} | {told} |")
    return "\n".join(lines)


def _pairs(part: str, by_pattern: dict[str, list[Points]], levels: Sequence[float]) -> str:
    """Losses of patterns less those of others at the same step and seed; empty where none of the pairs is there."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(by_pattern)]
    if not pairs:
        return ""
    lines = [
        f"| {part} | {' | '.join(f'{mine} - {other}' for mine, other in pairs)} |",
        "| --- " * (len(pairs) + 1) + "|",
    ]
    for n, level in enumerate(levels, start=1):
        cells = []
        for mine, other in pairs:
            runs = zip(by_pattern[mine], by_pattern[other], strict=True)
            cells.append(with_interval(t_interval([a[n][1] - b[n][1] for a, b in runs]), sign=True))
        lines.append(f"| {100 * level:g} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, list[Points]]], path: Path) -> None:
    """A panel a part: loss above the dense run's by density; thin lines are seeds, thick ones their means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(5.4 * len(found), 4.4), layout="constrained", squeeze=False)
    for axes, (part, by_pattern) in zip(panels[0], found.items(), strict=True):
        dense = by_pattern[DENSE]
        for number, (pattern, runs) in enumerate((p, r) for p, r in by_pattern.items() if p != DENSE):
            curves = [
                [(100 * x, y - base[n][1]) for n, (x, y) in enumerate(run)]
                for run, base in zip(runs, dense, strict=True)
            ]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=f"C{number}", linewidth=0.6, alpha=0.5)
            mean = [tuple(map(fmean, zip(*points, strict=True))) for points in zip(*curves, strict=True)]
            axes.plot(*zip(*mean, strict=True), "o-", color=f"C{number}", markersize=4, label=pattern)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.invert_xaxis()
        axes.set_xlabel("weights left, % (counted)")
        axes.set_ylabel("loss above the dense run's")
        axes.set_title(f"{part} ({len(dense)} seeds)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
