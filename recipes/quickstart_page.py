"""The quickstart's page to look at: figures, loss curves, screens with clicks, a rendered page beside its target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.report import Section, bar_chart, facts, heading, join, line_chart, page, paragraph, series_of, table, tiles
from evals.report.runs import pairs, screens
from evals.statistics import Estimate
from mmagent.train.hooks import read_jsonl
from recipes.quickstart_report import run_of


def write(root: Path, summary: Mapping[str, Any]) -> Path:
    """``root/report.html``: figures, curves, screens with clicks, a rendered page beside its target."""
    sections = [Section("At a glance", _overview(summary))]
    curves = [_curves(root / name, title) for name, title in CURVES.items()]
    sections.append(Section("Loss curves", join(c for c in curves if c), "One line a loss term, by optimizer step."))
    for stage, title in (
        ("rl", "Clicks after RL"),
        ("sft", "Clicks after fine-tuning"),
        ("untrained", "Clicks before"),
        ("blind", "Clicks on blank screens"),
    ):
        run = run_of(root / "evals" / stage / "miniwob")
        if run is not None:
            intro = "Held-out seeds; the ring is where the agent clicked, as the benchmark judged it."
            intro += " A control: the agent after RL was shown white, so what it scores here it did not see." * (
                stage == "blind"
            )
            sections.append(Section(title, screens(run), intro))
    grounding = run_of(root / "evals" / "pages" / "page_grounding")
    if grounding is not None:
        sections.append(Section("Grounding on rendered pages", screens(grounding)))
    html = run_of(root / "evals" / "pages" / "screenshot_to_html")
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
        parts.append(bar_chart(estimates, "Mean success on held-out seeds, with 95 % intervals"))
        rows = [{"task": task, **values} for task, values in scores["tasks"].items()]
        parts += [heading("By task"), table(rows)]
    if summary["encoder"]:
        parts += [heading("Encoder probes"), table([{"encoder": n, **v} for n, v in summary["encoder"].items()])]
    if summary["pretrain"]:
        parts += [heading("Pretraining"), facts({k: f"{v:.4g}" for k, v in summary["pretrain"].items()})]
    return join(parts) if parts else paragraph("No stage has left a figure yet.")


def _curves(folder: Path, title: str) -> Any:
    rows = read_jsonl(folder / "log.jsonl")
    names = sorted({k for row in rows for k in row if k == "reward" or (k.startswith("loss/") and k.count("/") == 1)})
    titles = {name: name.removeprefix("loss/") for name in names if name != "loss/balance"}
    series = series_of(rows, titles)
    held_out = series_of(rows, {f"validation/{name}": f"{title}, held out" for name, title in titles.items()})
    return line_chart(series | held_out, title, smooth=0.8, exact=held_out) if series else ""


def _times(summary: Mapping[str, Any]) -> Any:
    return bar_chart({name: {"seconds": value} for name, value in summary["seconds"].items()}, "Seconds a stage")
