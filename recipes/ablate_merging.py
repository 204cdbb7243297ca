"""Does the average of checkpoints on a constant learning rate reach what annealing reaches (PMA, arXiv 2505.12082)?

    python -m recipes.quickstart
    python -m recipes.ablate_merging --quickstart runs/quickstart --output runs/ablation-merging --seeds 2

Two pretrainings a seed from the quickstart's encoder, equal but for the schedule: one stays at its learning rate and
keeps a checkpoint every few steps, one falls to zero over its last part. On held-out data: every checkpoint, merges of
the newest ones by kind and number, and the annealed end. Kill it at any moment; the same command goes on. It leaves
``merging.json``, ``merging.md`` and ``merging.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from recipes.ablation_command import carry_out, parse, parser, pretraining
from recipes.lineage import Stage
from recipes.merging_report import write
from recipes.quickstart_mix import SHARES
from recipes.quickstart_plan import file


def plan(root: Path, quickstart: Path, seeds: int, steps: int, every: int, decay: float, processes: int) -> list[Stage]:
    """Seeds outermost, so that a stopped ablation holds whole comparisons."""
    shared = pretraining(quickstart, SHARES["pretrain"], steps, validate_every=steps)
    kinds = {
        "constant": ("phases.1.schedule.kind=constant", f"save_every={every}", f"keep={steps // every}"),
        "annealed": (
            *("phases.1.schedule.kind=wsd", "phases.1.schedule.floor=0.01"),
            *(f"phases.1.schedule.decay={decay}", f"save_every={steps}", "keep=1"),
        ),
    }
    stages = []
    for seed in range(seeds):
        for kind, told in kinds.items():
            output = root / f"{kind}-{seed}"
            arguments = (*shared, *told, f"seed={seed}", f"data.seed={seed}", f"output={output}")
            about = f"pretrain on a learning rate that {'stays' if kind == 'constant' else 'falls'}, seed {seed}"
            check = file("agent/model.safetensors")
            stages.append(Stage(f"{kind}-{seed}", about, arguments, output, check, steps, processes))
    return stages


def main() -> int:
    """Returns the exit status."""
    command = parser("recipes.ablate_merging", __doc__, "runs/ablation-merging", seeds=2, steps=160)
    command.add_argument("--every", type=int, default=5, help="steps between checkpoints (default: %(default)s)")
    command.add_argument("--decay", type=float, default=0.33, help="share of steps that anneal (default: %(default)s)")
    args = parse(command)
    if args.every < 1 or args.steps % args.every or not 0 < args.decay < 1:
        command.error(f"--steps must be a multiple of --every, {args.every}, and --decay lie between 0 and 1")
    told = (args.seeds, args.steps, args.every, args.decay, args.processes)
    if not carry_out(command, args, plan(args.output, args.quickstart, *told)):
        return 0
    print(write(args.output, args.seeds))
    print(f"look at {args.output / 'merging.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
