"""Predict memory a rank, step time and MFU of a preset on a cluster that is not here, and say what limits it.

    python tools/plan.py --preset glm45 --gpus 512 --gpu h100 --expert-parallel 8 --tokens 32768 --recompute all
    python tools/plan.py --preset glm45_air --gpus 128 --gpu h200 --compare
    python tools/plan.py --preset glm45 --gpu h100 --gpus 512 --plot plan.png
    python tools/plan.py --published
    python tools/plan.py --preset glm45v --gpus 1024 --simulate
    python tools/plan.py --preset glm45_air --long-context --chunk 8192

Nothing is allocated: parameters are counted on the meta device, what autograd keeps by what our operations save, and
time by a roofline with nine constants that were fitted to published rows (``--published`` prints them, and the error on
systems they were not fitted to: expect a plan to be wrong by as much).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

from mmagent.models.agent_model import ROLES  # noqa: E402
from mmagent.models.memory import RECOMPUTABLE, MemoryConfig  # noqa: E402
from tools.planner import report  # noqa: E402
from tools.planner.calibration import CALIBRATED, LEFT_OUT, compare, fit, groups  # noqa: E402
from tools.planner.hardware import GPUS, gpu_named  # noqa: E402
from tools.planner.memory import Settings  # noqa: E402
from tools.planner.mesh import PARALLEL, Mesh  # noqa: E402
from tools.planner.picture import draw  # noqa: E402
from tools.planner.plan import PRESETS, Job, Plan, plan, search, suggestions  # noqa: E402
from tools.planner.simulate import Simulated  # noqa: E402
from tools.planner.work import Load  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """All options, by group."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = top.add_argument_group("what to do (default: one report)")
    what.add_argument("--compare", action="store_true", help="search all meshes that our engines run, best first")
    what.add_argument(
        "--published", action="store_true", help="published systems: what they measured, what is predicted"
    )
    what.add_argument("--refit", action="store_true", help="with --published: fit the constants again and print them")
    what.add_argument(
        "--simulate", action="store_true", help="fill of packs and balance of ranks, packs drawn at random"
    )
    what.add_argument(
        "--long-context", action="store_true", help="prefill by ranks that divide keys and values by layer, or do not"
    )
    what.add_argument("--plot", type=Path, metavar="FILE", help="draw MFU and memory against the number of GPUs, or "
                      "with --long-context memory and time against ranks")  # fmt: skip
    what.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    what.add_argument("--ranks", metavar="LIST", help="with --simulate: sizes of worlds (default: 64,1024,4096,12288); "
                      "with --long-context: that share a prompt (default: 1,2,4,8)")  # fmt: skip
    what.add_argument("--lengths", default="40960,81920,122880", metavar="LIST", help="with --long-context: of prompts")
    what.add_argument("--chunk", type=int, default=8192, help="with --long-context: tokens at one time (default: 8192)")
    what.add_argument("--link", type=float, default=0.0, help="with --long-context: GB/s between ranks")
    what.add_argument("--micro-batches", type=int, default=4, help="with --simulate: a step and rank (default: 4)")
    where = top.add_argument_group("model and cluster")
    where.add_argument("--preset", choices=sorted(PRESETS), default="glm45", help="a size (default: %(default)s)")
    where.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default: %(default)s)")
    where.add_argument("--gpus", type=int, default=512, help="in all (default: %(default)s)")
    where.add_argument("--parallel", choices=PARALLEL, help="(default: fsdp2)")
    where.add_argument("--shard-ranks", dest="shards", type=int, help="ranks of a replica (hsdp; default: a host's)")
    where.add_argument("--expert-parallel", type=int, metavar="N", help="ranks that share experts (default: 1)")
    where.add_argument("--context-parallel", type=int, metavar="N", help="ranks that share every pack (default: 1)")
    work = top.add_argument_group("work")
    work.add_argument("--tokens", "--tokens-per-microbatch", type=int, default=16384, dest="tokens", metavar="N",
                      help="of a micro-batch (default: %(default)s)")  # fmt: skip
    work.add_argument(
        "--tokens-per-step", type=int, default=0, metavar="N", help="of all ranks (default: one micro-batch each)"
    )
    work.add_argument("--document", type=int, default=4096, metavar="N", help="mean length (default: %(default)s)")
    work.add_argument(
        "--spread", type=float, default=1.0, help="deviation of log lengths; 0: equal (default: %(default)s)"
    )
    work.add_argument("--patches", type=int, default=0, metavar="N", help="of a micro-batch (default: text only)")
    work.add_argument("--frame", type=int, default=1024, metavar="N", help="patches of an image (default: %(default)s)")
    work.add_argument("--supervised", type=float, default=1.0, metavar="SHARE", help="of the tokens with a target")
    work.add_argument(
        "--train-tokens", type=float, default=0.0, metavar="N", help="e.g. 15e12: how many days that takes"
    )
    how = top.add_argument_group("training")
    how.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    how.add_argument("--recompute", metavar="ROLES", help=f"of {','.join(RECOMPUTABLE)}; or all (default: nothing)")
    how.add_argument("--freeze", default="", metavar="ROLES", help="e.g. encoder")
    how.add_argument("--adamw", action="store_true", help="for matrices, too, in place of Muon")
    how.add_argument("--offload", default="", metavar="ROLES", help="of encoder,projector: kept in the host's memory")
    how.add_argument(
        "--chunk-patches", type=int, default=0, metavar="N", help="images pass the encoder so many at a time"
    )
    how.add_argument(
        "--imbalance", type=float, default=1.02, help="work of the heaviest rank over the mean; see --simulate"
    )
    how.add_argument("--hot-experts", type=float, default=1.1, help="rows of the busiest experts' rank over the mean")
    return top


def _names(listed: str) -> list[str]:
    return [name for name in listed.split(",") if name]


def _numbers(listed: str) -> list[int]:
    try:
        return [int(n) for n in listed.split(",")]
    except ValueError as error:
        raise ValueError(f"{listed!r} is no list of whole numbers") from error


def job_of(args: argparse.Namespace) -> Job:
    """Raises ``ValueError`` for what does not divide or is not known."""
    again = list(RECOMPUTABLE) if args.recompute == "all" else _names(args.recompute or "")
    memory = MemoryConfig(again, _names(args.offload), args.chunk_patches)
    frozen = _names(args.freeze)
    if unknown := set(frozen) - set(ROLES):
        raise ValueError(f"cannot freeze {', '.join(sorted(unknown))}; roles are {', '.join(ROLES)}")
    if not 0 <= args.supervised <= 1:
        raise ValueError(f"supervised {args.supervised} is no share")
    settings = Settings(
        args.dtype,
        frozenset(memory.recompute),
        frozenset(frozen),
        not args.adamw,
        offload=frozenset(memory.offload),
        chunk_patches=memory.chunk_patches,
    )
    gpu = gpu_named(args.gpu)
    parallel = args.parallel or "fsdp2"
    shards = args.shards or (gpu.host if parallel == "hsdp" else 0)
    return Job(
        args.preset,
        PRESETS[args.preset](),
        gpu,
        Mesh(args.gpus, parallel, args.expert_parallel or 1, args.context_parallel or 1, shards),
        Load.of(args.tokens, args.document, args.spread, args.patches, args.frame, args.supervised),
        args.tokens_per_step,
        settings,
        args.imbalance,
        args.hot_experts,
    )


def chosen(args: argparse.Namespace, job: Job) -> tuple[Plan, str]:
    """The plan of ``job``, and a sentence on how it came about where no mesh was asked for: then, if the plainest one
    does not fit, it is the fastest that does."""
    one = plan(job)
    asked = [args.parallel, args.shards, args.expert_parallel, args.context_parallel, args.recompute]
    if one.fits or any(value is not None for value in asked):
        return one, ""
    print("no mesh was asked for, and plain fsdp2 does not fit: looking at all that run ...", file=sys.stderr)
    plans = search(job)
    fitting = sum(found.fits for found in plans)
    if not fitting:
        return one, f"No mesh was asked for. None of the {len(plans)} plans that run fits; this is the plainest."
    return plans[0], (
        f"No mesh was asked for: of {len(plans)} plans that run {fitting} fit, and this is the fastest of them. "
        "--compare lists all; --parallel, --expert-parallel, --context-parallel and --recompute ask for one."
    )


def published(args: argparse.Namespace) -> int:
    """The table of errors; with ``--refit`` constants are fitted anew first."""
    from tools.planner.published import rows

    table = rows()
    everywhere, left_out = CALIBRATED, dict(LEFT_OUT)
    if args.refit:
        start = time.monotonic()
        everywhere, parts = fit(table), groups(table)
        for n, group in enumerate(parts, start=1):
            left = (time.monotonic() - start) / n * (len(parts) + 1 - n)
            print(
                f"fitting without {', '.join(sorted(group))} ({n} of {len(parts)}, {left:.0f} s left)", file=sys.stderr
            )
            constants = fit([row for row in table if row.system not in group])
            left_out |= dict.fromkeys(sorted(group), constants)
    inside = compare(table, everywhere)
    outside = [compare([row], left_out[row.system])[0] for row in table]
    print(report.published_table(inside, outside))
    print()
    print(report.errors_table(inside, outside))
    print(f"\nconstants, for all systems alike: {everywhere}")
    if args.refit:
        for system, constants in left_out.items():
            print(f"without {system}: {constants}")
    print(f"\nsources\n{report.sources_list(inside)}")
    if args.json:
        lines = [
            {"system": a.row.system, "model": a.row.model.name, "mesh": a.row.run.mesh.name(),
             "gpu": a.row.run.gpu.name, "published": a.row.tokens, "predicted": a.tokens, "error": a.error,
             "left_out": b.error, "fit": a.row.fit}
            for a, b in zip(inside, outside, strict=True)
        ]  # fmt: skip
        args.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return 0


def simulated(args: argparse.Namespace, job: Job) -> Simulated:
    """The job's packs dealt to 64 to 12,288 ranks, or to ``--ranks``."""
    from mmagent.models.flops import cost_weights
    from mmagent.packing import Size
    from tools.planner.simulate import Mix, simulate

    worlds = tuple(_numbers(args.ranks or "64,1024,4096,12288"))
    budget = Size(args.tokens, max(round(1.5 * args.patches), 0))
    mix = Mix(args.document, args.spread, args.patches, args.frame, job.config.vision.merge_size**2)

    def progress(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    weights = cost_weights(job.config, job.settings.frozen, job.settings.recompute)
    return simulate(weights, budget, mix, worlds, micro_batches=args.micro_batches, progress=progress)


def long_context(args: argparse.Namespace) -> list[dict[str, object]]:
    """Prints a table of prompts by ranks, and draws it where asked to."""
    from tools.planner.long_context import draw as draw_long
    from tools.planner.long_context import linked, rows, table

    config, gpu = PRESETS[args.preset](), linked(gpu_named(args.gpu), 1e9 * args.link)
    found = rows(config.decoder, _numbers(args.lengths), _numbers(args.ranks or "1,2,4,8"), args.chunk, gpu)
    print(table(args.preset, config, found, args.chunk, gpu))
    if args.plot:
        draw_long(args.preset, found, args.chunk, gpu, args.plot)
    return [asdict(row) for row in found]


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if args.published:
        return published(args)
    try:
        if args.imbalance < 1:
            raise ValueError(f"--imbalance {args.imbalance}: the heaviest rank does at least the mean, which is 1")
        job = job_of(args)
        result: object
        if args.long_context:
            result = long_context(args)
        elif args.simulate:
            found = simulated(args, job)
            print(report.simulated_table(found, job))
            result = asdict(found)
        elif args.plot:
            found_plans = draw(job, args.plot)
            result = {words: [one.as_json() for one in plans] for words, plans in found_plans.items()}
            print(f"{args.plot}: {', '.join(found_plans)}")
        elif args.compare:
            plans = search(job)
            print(report.headline(plans[0]) if plans else "no mesh runs")
            print()
            print(report.meshes_table(plans, 20))
            result = [one.as_json() for one in plans]
        else:
            one, why = chosen(args, job)
            print("\n\n".join(filter(None, [why, report.full(one, suggestions(one), args.train_tokens)])))
            result = one.as_json()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
