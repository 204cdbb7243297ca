"""What does each pattern of sparsity cost an agent and an encoder, by density (arXiv 2008.13006)?

    python -m recipes.quickstart
    python -m recipes.ablate_sparsity --quickstart runs/quickstart --output runs/ablation-sparsity --seeds 3

From the quickstart's pretrained agent and its distilled encoder each pattern prunes in stages (``--levels``), on the
same batches, and `dense` trains as long without. Judged is the end of every stage: the agent by the loss on held-out
data, the encoder by the loss of its last steps, whose pictures are drawn anew. Kill it at any moment; the same command
goes on. It leaves ``sparsity.md`` and ``sparsity.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.ablation_command import carry_out, parse, parser
from recipes.lineage import Stage
from recipes.quickstart_mix import SHARES
from recipes.quickstart_plan import file
from recipes.sparsify import LEVELS
from recipes.sparsity_report import DENSE, write

PATTERNS = (DENSE, "tile-2d", "tile-element", "block", "element")
PARTS = ("agent", "encoder")
TOKENS = 4096
"""Of a step of the agent, as in its pretraining."""


def plan(
    root: Path,
    quickstart: Path,
    seeds: int,
    steps: int,
    processes: int,
    levels: Sequence[float] = LEVELS,
    tokens: int = TOKENS,
) -> list[Stage]:
    """Seeds outermost, so that a stopped ablation holds whole comparisons."""
    each = steps // (len(levels) + 1)
    stages = []
    for seed in range(seeds):
        for part in PARTS:
            for pattern in PATTERNS:
                output = root / f"{part}-{pattern}-{seed}"
                pruning = _pruning(pattern, each, levels)
                own = _agent(quickstart, pattern, steps, each, tokens)
                arguments = own if part == "agent" else _encoder(quickstart, steps)
                arguments = (*arguments, *pruning, f"seed={seed}", f"data.seed={seed}", f"output={output}")
                about = f"{part}: {pattern}, seed {seed}"
                check = file(f"{part}/model.safetensors")
                stages.append(Stage(output.name, about, arguments, output, check, steps, processes))
    return stages


def _pruning(pattern: str, each: int, levels: Sequence[float]) -> tuple[str, ...]:
    """Tiles of 32 outputs and blocks of 16 by 16: the matrices here have some hundred, the paper's some thousand."""
    if pattern == DENSE:
        return ()
    sizes = ("sparsity.pattern.granularity=32", "sparsity.pattern.block=16")
    times = (f"sparsity.levels=[{','.join(map(str, levels))}]", f"sparsity.score={each}", f"sparsity.steps={each}")
    return (f"sparsity.pattern.pattern={pattern}", *sizes, *times)


def _agent(quickstart: Path, pattern: str, steps: int, each: int, tokens: int) -> tuple[str, ...]:
    data = quickstart / "data"
    most = min(tokens, TOKENS // 2)
    return (
        *("recipes.sft" if pattern == DENSE else "recipes.sparsify", "--preset", "laptop"),
        *(f"init={quickstart}/pretrain/agent", f"data.folder={data}/pretrain", "data.split_long=true"),
        *(f"data.tokens_per_step={tokens}", f"data.tokens_per_microbatch={most}"),
        *(f"data.sources.{name}.weight={weight}" for name, weight in SHARES["pretrain"].items()),
        *(f"validation.folder={data}/validation", "validation.steps=6", f"validate_every={each}"),
        *(f"phases.0.steps={steps}", "phases.0.lr=0.25", "phases.0.schedule.kind=constant"),
    )


def _encoder(quickstart: Path, steps: int) -> tuple[str, ...]:
    teachers = (f"teachers.{kind}.source={quickstart}/teachers/{kind}/teacher" for kind in ("siglip2", "dinov3"))
    return (
        *("recipes.distill_encoder", "--preset", "laptop", f"encoder={quickstart}/distill/encoder", *teachers),
        *(f"steps={steps}", "optim.lr=1e-3", "schedule.kind=constant"),
    )


def main() -> int:
    """Returns the exit status."""
    default = 20 * (len(LEVELS) + 1)
    command = parser("recipes.ablate_sparsity", __doc__, "runs/ablation-sparsity", seeds=3, steps=default)
    command.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="sparsities (default: %(default)s)")
    command.add_argument("--tokens", type=int, default=TOKENS, help="of an agent's step (default: %(default)s)")
    args = parse(command)
    stages = len(args.levels) + 1
    if args.steps % stages:
        command.error(f"--steps must be a multiple of {stages}: one part to score by, then one for every level")
    sizes = (args.seeds, args.steps, args.processes, args.levels, args.tokens)
    planned = plan(args.output, args.quickstart, *sizes)
    if not carry_out(command, args, planned):
        return 0
    print(write(args.output, PARTS, PATTERNS, args.levels, args.seeds, args.steps // stages))
    print(f"look at {args.output / 'sparsity.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
