"""What the quickstart measured: ``summary.json`` for machines and a few lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.store import Run, RunError, read_run
from evals.summary import summarise as summarise_rows
from mmagent.train.hooks import read_jsonl

STAGES = ("untrained", "sft", "rl", "blind")
"""Who is judged; the last is the agent after RL, shown blank screens: what it scores without seeing."""
TAIL = 20  # steps at the end of a log over which a final figure is taken


def summarise(root: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Read every stage's own records into one plain dictionary, and write it to ``root/summary.json``."""
    runs = {name: run_of(root / "evals" / name / "miniwob") for name in STAGES}
    summary: dict[str, Any] = {
        "miniwob": _miniwob({name: run for name, run in runs.items() if run is not None}),
        "encoder": _json(root / "probes" / "probes.json"),
        "pretrain": _pretrain(root / "pretrain"),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
    }
    for name in ("page_grounding", "screenshot_to_html"):
        run = run_of(root / "evals" / "pages" / name)
        summary[name] = _score(run) if run is not None else None
    (root / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def run_of(folder: Path) -> Run | None:
    """The evaluation in ``folder``, or None where there is none."""
    try:
        return read_run(folder)
    except (RunError, FileNotFoundError):  # a stage that this machine left out for want of a browser
        return None


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _score(run: Run) -> dict[str, Any]:
    score = summarise_rows(run.rows).score
    return {"mean": score.mean, "low": score.low, "high": score.high, "items": score.n, "errors": len(run.errors)}


def _miniwob(runs: Mapping[str, Run]) -> dict[str, Any] | None:
    if not runs:
        return None
    by_stage = {name: summarise_rows(run.rows) for name, run in runs.items()}
    tasks = sorted({task for s in by_stage.values() for task in s.by_task})
    scores = {name: _score(run) for name, run in runs.items()}
    return {
        **{name: score["mean"] for name, score in scores.items()},
        "intervals": {name: [score["low"], score["high"]] for name, score in scores.items()},
        "episodes": {name: score["items"] for name, score in scores.items()},
        "errors": {name: score["errors"] for name, score in scores.items()},
        "tasks": {t: {name: s.by_task[t].mean for name, s in by_stage.items() if t in s.by_task} for t in tasks},
    }


def _pretrain(folder: Path) -> dict[str, float] | None:
    rows = read_jsonl(folder / "log.jsonl")
    held_out = next((row for row in reversed(rows) if "validation/loss/lm" in row), {})
    rows = rows[-TAIL:]
    timing = read_jsonl(folder / "log.time.jsonl")
    if not rows:
        return None
    keys = [k for k in rows[-1] if k in ("loss/lm", "visual_share", "data/fill") or (k.startswith("mtp_") and "/" in k)]
    keys += [k for k in rows[-1] if k.startswith("loss/mtp_")]
    found = {k: [row[k] for row in rows if k in row] for k in keys}
    rates = sorted(row["time/tokens_per_second"] for row in timing)
    figures = {k: sum(values) / len(values) for k, values in found.items()}
    figures |= {k: held_out[k] for k in held_out if k.startswith(("validation/loss/lm", "validation/loss/mtp_"))}
    return {**figures, "tokens_per_second": rates[len(rates) // 2], "steps": rows[-1]["step"]}


def shown(summary: Mapping[str, Any]) -> str:
    """The summary as lines for a terminal."""
    lines = ["", "What this run measured"]
    if summary["encoder"]:
        for name, scores in summary["encoder"].items():
            lines.append(f"  encoder {name:16} " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    if summary["pretrain"]:
        lines.append("  pretraining  " + "  ".join(f"{k} {v:.4g}" for k, v in summary["pretrain"].items()))
    if summary["miniwob"]:
        miniwob = summary["miniwob"]
        for name, (low, high) in miniwob["intervals"].items():
            lines.append(
                f"  MiniWoB++ {name:11} {miniwob[name]:6.1%}  [{low:.1%}, {high:.1%}]  "
                f"{miniwob['episodes'][name]} held-out episodes of {len(miniwob['tasks'])} tasks"
            )
    for name in ("page_grounding", "screenshot_to_html"):
        if score := summary[name]:
            lines.append(f"  {name:21} {score['mean']:6.1%}  [{score['low']:.1%}, {score['high']:.1%}]")
    slowest = sorted(summary["seconds"].items(), key=lambda pair: -pair[1])
    lines.append(
        f"  wall time {summary['seconds_total'] / 60:.1f} min: " + ", ".join(f"{n} {s:.0f} s" for n, s in slowest)
    )
    return "\n".join(lines)
