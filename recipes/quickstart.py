"""The whole lineage at laptop size: from two teachers to an agent that clicks, in one resumable command.

    python -m recipes.quickstart [--output runs/quickstart] [--processes 2] [--size laptop|debug]

Kill it at any moment; the same command goes on where it was. At the end it prints what it measured and leaves
``summary.json`` and ``report.html`` in the output folder.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from mmagent.browser import find_chromium
from recipes.lineage import Stage
from recipes.plan_command import run_or_exit
from recipes.quickstart_page import write
from recipes.quickstart_plan import SIZES, plan
from recipes.quickstart_report import shown, summarise


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m recipes.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--processes", type=int, default=min(cores, 2), help="training processes a stage (here: %(default)s)"
    )
    parser.add_argument("--size", choices=SIZES, default="laptop", help="debug runs everything, but learns nothing")
    parser.add_argument("--plan", action="store_true", help="print the stages with their commands and exit")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    browser = find_chromium() is not None
    stages = plan(args.output, args.size, args.processes, browser)
    if args.plan:
        for stage in stages:
            print(f"{stage.name}: {stage.about}\n  {_shown(stage)}\n")
        return 0
    if not browser:
        print(
            "No Chromium found: the stages that look at pages, click and render are left out, and the language\n"
            "stages train on drawn scenes and text. For the whole lineage: apt-get install chromium-headless-shell\n"
            "(or name any Chromium in MMAGENT_CHROMIUM), then run this again."
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    seconds = run_or_exit(stages, args.output)
    summary = summarise(args.output, seconds)
    write(args.output, summary)
    print(shown(summary))
    print(f"this call: {(time.monotonic() - started) / 60:.1f} min. Look at {args.output / 'report.html'}")
    return 0


def _shown(stage: Stage) -> str:
    return " ".join(["python", *stage.command()[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
