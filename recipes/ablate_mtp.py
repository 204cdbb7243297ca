"""What should multi-token prediction be fed where the next token is an image: its embedding, nothing, or one shared
learned embedding?

    python -m recipes.quickstart
    python -m recipes.ablate_mtp --quickstart runs/quickstart --output runs/ablation-mtp --seeds 3 --steps 120

Pretrains one agent a mode, size and seed from the quickstart's encoder: equal data in equal order, so the tokens are
equal too; three depths that share one module. Kill it at any moment; the same command goes on. It leaves
``ablation.json``, ``ablation.md``, ``ablation.svg`` and ``curves.svg``: held-out losses and acceptance by depth and by
context, means over seeds with Student's 95 % intervals, differences to ``shared`` seed by seed, step time, and what a
mode would have to carry to the pipeline stage of the last layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmagent.models.mtp import MODES
from recipes.ablation_command import carry_out, parse, parser, pretraining
from recipes.lineage import Stage
from recipes.mtp_report import write
from recipes.quickstart_mix import SHARES
from recipes.quickstart_plan import file

SIZES: dict[str, tuple[str, ...]] = {
    "laptop": (),
    "wide": (
        *("model.decoder.width=256", "model.decoder.layers=6", "model.decoder.heads=4", "model.decoder.kv_heads=2"),
        *("model.decoder.ffn=704", "model.decoder.moe.experts=8", "model.decoder.moe.ffn=256"),
    ),
}
"""The quickstart's decoder, and one with about three times its products a token."""
DEPTHS = 3
MIX = {**SHARES["pretrain"], "text": 1.0, "captions": 0.5}
"""The quickstart's, with more text that no image precedes: acceptance is asked for there, too."""


def plan(root: Path, quickstart: Path, seeds: int, steps: int, processes: int, sizes: tuple[str, ...]) -> list[Stage]:
    """Seeds outermost, so that a stopped ablation holds whole comparisons."""
    shared = (
        *pretraining(quickstart, MIX, steps, validate_every=max(steps // 4, 1)),
        *(f"model.mtp.depths={DEPTHS}", "model.mtp.tied=true", "keep=1", f"save_every={max(steps // 2, 1)}"),
    )
    stages = []
    for seed in range(seeds):
        for size in sizes:
            for mode in MODES:
                output = root / size / f"{mode}-{seed}"
                told = (*shared, *SIZES[size], f"model.mtp.mode={mode}", f"seed={seed}", f"data.seed={seed}")
                name, share = f"{size}-{mode}-{seed}", steps * (1.0 if size == "laptop" else 2.5)
                about = f"pretrain the {size} agent, MTP {mode}, seed {seed}"
                check = file("agent/model.safetensors")
                stages.append(Stage(name, about, (*told, f"output={output}"), output, check, share, processes))
    return stages


def main() -> int:
    """Returns the exit status."""
    command = parser("recipes.ablate_mtp", __doc__, "runs/ablation-mtp", seeds=3, steps=120)
    command.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="default: all")
    args = parse(command)
    sizes = tuple(dict.fromkeys(args.sizes))
    stages = plan(args.output, args.quickstart, args.seeds, args.steps, args.processes, sizes)
    if not carry_out(command, args, stages):
        return 0
    print(write(args.output, sizes, args.seeds))
    print(f"look at {args.output / 'ablation.svg'} and {args.output / 'curves.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
