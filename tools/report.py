"""Write one page about a training run: what it learned, how fast, where the time and memory went, what went wrong.

    python tools/report.py RUN [RUN2 ...] [--out FILE] [--peak FLOPS | --peak measure]

RUN is the output folder of any training stage, be it of a run that goes on or was cut short. Several are compared,
and told about one after the other. The page needs nothing but itself; it lies in RUN/report.html unless said otherwise.
MFU wants the peak: known for some accelerators, else given by ``--peak`` (operations a second of one device, or
of one machine where its processors compute), or measured here with a large matrix product.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from markupsafe import Markup  # noqa: E402

from evals.report import training  # noqa: E402
from evals.report.training import TrainingRun  # noqa: E402
from mmagent.files import write_text  # noqa: E402
from mmagent.html.pieces import Section, join, number, page, paragraph, percent, table, tiles  # noqa: E402
from tools.router_load import draw  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folders of training stages")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first RUN")
    parser.add_argument("--peak", default="", metavar="FLOPS", help="such as 989e12, or the word measure")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not folder.is_dir():
            parser.error(f"{folder} is no folder")
        if not any((folder / name).is_file() for name in ("config.yaml", "log.jsonl")):
            parser.error(f"{folder} holds no run (neither config.yaml nor log.jsonl)")
    try:
        peak = measured_peak() if args.peak == "measure" else float(args.peak or 0)
    except ValueError:
        parser.error(f"--peak {args.peak}: a number of operations a second, or measure")
    out = args.out or args.runs[0] / "report.html"
    try:
        write_text(out, report([TrainingRun(folder) for folder in args.runs], peak))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"report: {out}")
    return 0


def report(runs: Sequence[TrainingRun], peak: float = 0.0) -> str:
    """The page. ``peak``: operations a second of one device (or machine), 0 for what is known of it."""
    sections = [Section("At a glance", join(_glance(run, peak, len(runs) > 1) for run in runs))]
    if len(runs) > 1:
        sections.append(_compared(runs))
    for run in runs:
        own = [
            training.losses(run),
            training.others(run),
            training.packing(run),
            training.throughput(run, run.peak(peak)),
            training.ranks(run),
            _router(run),
            training.memory(run),
            training.checkpoints(run),
            training.incidents(run),
            training.profiles(run),
            training.origin(run),
        ]
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        sections += [Section(prefix + s.title, s.body, s.intro) for s in own if s is not None and s.body]
    names = ", ".join(run.name for run in runs)
    return page(f"Training: {names}", sections, subtitle=", ".join(str(run.folder) for run in runs))


def _glance(run: TrainingRun, peak: float, titled: bool) -> Markup:
    if not run.rows:
        return paragraph(f"{run.name}: no step was logged yet. Not there: {'; '.join(run.missing)}.")
    last = run.rows[-1]
    shown = {"steps": number(last["step"])}
    for key in ("loss", "reward"):
        value = training.last_tenth(run.rows, key)
        shown |= {f"{key}, last tenth": number(value)} if math.isfinite(value) else {}
    held_out = [row["validation/loss"] for row in run.rows if "validation/loss" in row]
    shown |= {"validation loss": number(held_out[-1])} if held_out else {}
    for key, title in ((f"time/{run.unit}_per_second", f"{run.unit} a second"), ("time/step", "seconds a step")):
        value = run.median(key if key in run.keys else "time/tokens_per_second")
        shown |= {title: number(value)} if math.isfinite(value) else {}
    for key, title in (("time/data_share", "waiting for data"), ("time/rollout_share", "playing episodes")):
        shown |= {title: percent(run.median(key))} if key in run.keys else {}
    if useful := training.mfu(run)[1:]:
        rate = sorted(value for _, value in useful)[len(useful) // 2]
        whole = run.peak(peak)
        shown |= {"MFU": percent(rate / whole)} if whole else {}
        size, unit = training.scale_of(rate)
        shown |= {f"useful {unit}FLOP/s": number(rate / size)}
    slow = {entry["rank"] for row in run.ranks[-1:] for entry in row["slow"]}
    shown |= {"slow ranks": ", ".join(map(str, sorted(slow)))} if slow else {}
    shown |= {"incidents": str(len(run.incidents))} if run.incidents else {}
    told = [paragraph(text) for text in run.gaps]
    return (Markup("<h3>{}</h3>").format(run.name) if titled else Markup("")) + tiles(shown) + join(told)


def _compared(runs: Sequence[TrainingRun]) -> Section:
    keys = ("loss", "reward", "validation/loss", "grad_norm", "time/tokens_per_second", "time/step")
    shared = [key for key in keys if any(key in run.keys for run in runs)]
    figures, told = training.side_by_side(runs, shared)
    terms = list(dict.fromkeys(key for run in runs for key in run.under("loss/")))
    charts = training.compare(runs, lambda run: [k for k in (*shared, *terms) if k in run.keys], smooth=0.8)
    rows = [{"run": run.name, "steps": len(run.rows), **own} for run, own in zip(runs, figures, strict=True)]
    return Section("Compared", table(rows, caption=told) + charts)


def _router(run: TrainingRun) -> Section | None:
    if not run.router:
        return None
    row = run.router[-1]
    picture = draw(row["step"], row["layers"], row["load"], run.log)
    return Section("Router load", Markup('<div class="scroll drawn">{}</div>').format(Markup(picture)))


def measured_peak(side: int = 2048, seconds: float = 3.0) -> float:
    """Operations a second of the fastest of several bfloat16 (or float32) matrix products on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=device).to(dtype)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            started = time.perf_counter()
            (a @ a).sum().item()
            best = max(best, 2 * side**3 / (time.perf_counter() - started))
    print(f"measured peak: {best:.3g} FLOP/s on {device.type}", file=sys.stderr)
    return best


if __name__ == "__main__":
    sys.exit(main())
