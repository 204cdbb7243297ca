"""What ablations on the quickstart's agent have in common: their command, what they need, and one pretraining."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.lineage import Stage
from recipes.plan_command import run_or_exit

ADAPTER = 10
"""Steps of the first phase, in which the encoder is frozen."""


def parser(module: str, doc: str | None, output: str, *, seeds: int, steps: int) -> argparse.ArgumentParser:
    """The options that all of them have, with these defaults."""
    out = argparse.ArgumentParser(
        f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quickstart = Path("runs/quickstart")
    out.add_argument(
        "--quickstart", type=Path, default=quickstart, help="what `recipes.quickstart` left (default: %(default)s)"
    )
    out.add_argument("--output", type=Path, default=Path(output), help="default: %(default)s")
    out.add_argument("--seeds", type=int, default=seeds, help="at least two (default: %(default)s)")
    out.add_argument("--steps", type=int, default=steps, help="of every agent (default: %(default)s)")
    cores = len(os.sched_getaffinity(0))
    about = "of a stage; 0: one without torchrun, which keeps to OMP_NUM_THREADS=1 (here: %(default)s)"
    out.add_argument("--processes", type=int, default=min(cores, 2), help=about)
    out.add_argument("--plan", action="store_true", help="print the commands and exit")
    return out


def parse(command: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, those that all have judged."""
    args = command.parse_args()
    if args.seeds < 2 or args.steps <= ADAPTER or args.processes < 0:
        command.error(f"--seeds must be at least 2, for an interval; --steps above {ADAPTER}; --processes not negative")
    return args


def pretraining(quickstart: Path, mix: Mapping[str, float], steps: int, validate_every: int) -> tuple[str, ...]:
    """The arguments of ``recipes.pretrain`` on the quickstart's encoder and data, judged on held-out ones."""
    data = quickstart / "data"
    return (
        *("recipes.pretrain", "--preset", "laptop", f"encoder={quickstart}/align/encoder"),
        *(f"tokenizer={data}/tokenizer.json", f"data.folder={data}/pretrain"),
        *(f"data.sources.{name}.weight={weight}" for name, weight in mix.items()),
        *(f"validation.folder={data}/validation", "validation.steps=6", f"validate_every={validate_every}"),
        *(f"phases.0.steps={ADAPTER}", f"phases.1.steps={steps - ADAPTER}"),
    )


def carry_out(command: argparse.ArgumentParser, args: argparse.Namespace, stages: Sequence[Stage]) -> bool:
    """Run the stages, or print them where only the plan was asked for (then it is False). Exits where what the
    quickstart leaves is missing."""
    if args.plan:
        print("\n".join(" ".join(["python", *stage.command()[1:]]) for stage in stages))
        return False
    needed = [args.quickstart / name for name in ("align/encoder", "data/pretrain", "data/validation")]
    if missing := [str(path) for path in needed if not path.is_dir()]:
        command.error(
            f"{', '.join(missing)} missing: run `python -m recipes.quickstart` first, or name its --quickstart"
        )
    run_or_exit(stages, args.output)
    return True
