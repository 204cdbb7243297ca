"""What the quickstart measured: ``summary.json`` for machines, a few lines for the terminal, a page to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.report import Section, bar_chart, facts, heading, join, line_chart, page, paragraph, series_of, table, tiles
from evals.report.runs import pairs, screens
from evals.statistics import Estimate
from evals.store import Run, RunError, read_run
from evals.summary import summarise as summarise_rows
from mmagent.train.hooks import read_jsonl

STAGES = ("untrained", "pretrained", "sft", "rl")
TAIL = 20  # steps at the end of a log over which a final figure is taken


def summarise(root: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Read every stage's own records into one plain dictionary, and write it to ``root/summary.json``."""
    runs = {name: _run(root / "evals" / name / "miniwob") for name in STAGES}
    summary: dict[str, Any] = {
        "miniwob": _miniwob({name: run for name, run in runs.items() if run is not None}),
        "encoder": _json(root / "probes" / "probes.json"),
        "pretrain": _pretrain(root / "pretrain"),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
    }
    for name in ("page_grounding", "screenshot_to_html"):
        run = _run(root / "evals" / "rl" / name)
        summary[name] = _score(run) if run is not None else None
    (root / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _run(folder: Path) -> Run | None:
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
    rows = read_jsonl(folder / "log.jsonl")[-TAIL:]
    timing = read_jsonl(folder / "log.time.jsonl")
    if not rows:
        return None
    keys = [k for k in rows[-1] if k in ("loss/lm", "visual_share", "fill") or (k.startswith("mtp_") and "/" in k)]
    keys += [k for k in rows[-1] if k.startswith("loss/mtp_")]
    found = {k: [row[k] for row in rows if k in row] for k in keys}
    rates = sorted(row["time/tokens_per_second"] for row in timing)
    figures = {k: sum(values) / len(values) for k, values in found.items()}
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


def write(root: Path, summary: Mapping[str, Any]) -> Path:
    """``root/report.html``: figures, curves, screens with clicks, a rendered page beside its target."""
    sections = [Section("At a glance", _overview(summary))]
    curves = [_curves(root / name, title) for name, title in CURVES.items()]
    sections.append(Section("Loss curves", join(c for c in curves if c), "One line a loss term, by optimizer step."))
    for stage, title in (
        ("rl", "Clicks after RL"),
        ("sft", "Clicks after fine-tuning"),
        ("untrained", "Clicks before"),
    ):
        run = _run(root / "evals" / stage / "miniwob")
        if run is not None:
            intro = "Held-out seeds; the ring is where the agent clicked, as the benchmark judged it."
            sections.append(Section(title, screens(run), intro))
    grounding = _run(root / "evals" / "rl" / "page_grounding")
    if grounding is not None:
        sections.append(Section("Grounding on rendered pages", screens(grounding)))
    html = _run(root / "evals" / "rl" / "screenshot_to_html")
    if html is not None:
        sections.append(Section("Screenshot to HTML", pairs(html), "The page asked for beside what the model wrote."))
    sections.append(Section("Wall time", _times(summary)))
    path = root / "report.html"
    path.write_text(page("mmagent quickstart", sections, subtitle="from two teachers to an agent that clicks"))
    return path


CURVES = {
    "distill": "Distillation from two teachers",
    "align": "Contrastive alignment",
    "pretrain": "Pretraining",
    "sft": "Fine-tuning",
    "rl": "Reinforcement learning",
}


def _overview(summary: Mapping[str, Any]) -> Any:
    parts = []
    if summary["miniwob"]:
        scores = summary["miniwob"]
        parts.append(tiles({f"MiniWoB++ {name}": f"{scores[name]:.1%}" for name in scores["intervals"]}))
        estimates = {
            name: {"success": Estimate(scores[name], *interval, scores["episodes"][name])}
            for name, interval in scores["intervals"].items()
        }
        parts.append(bar_chart(estimates, "Mean success on held-out seeds, with 95 % bootstrap intervals"))
        rows = [{"task": task, **values} for task, values in summary["miniwob"]["tasks"].items()]
        parts += [heading("By task"), table(rows)]
    if summary["encoder"]:
        parts += [heading("Encoder probes"), table([{"encoder": n, **v} for n, v in summary["encoder"].items()])]
    if summary["pretrain"]:
        parts += [heading("Pretraining"), facts({k: f"{v:.4g}" for k, v in summary["pretrain"].items()})]
    return join(parts) if parts else paragraph("No stage has left a figure yet.")


def _curves(folder: Path, title: str) -> Any:
    rows = read_jsonl(folder / "log.jsonl")
    names = sorted({k for row in rows for k in row if k == "reward" or (k.startswith("loss/") and k.count("/") == 1)})
    series = series_of(rows, {name: name.removeprefix("loss/") for name in names if name != "loss/balance"})
    return line_chart(series, title, smooth=0.8) if series else ""


def _times(summary: Mapping[str, Any]) -> Any:
    return bar_chart({name: {"seconds": value} for name, value in summary["seconds"].items()}, "Seconds a stage")
