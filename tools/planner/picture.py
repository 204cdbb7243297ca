"""MFU and memory against the number of GPUs, for a few meshes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tools.planner.calibration import CALIBRATED
from tools.planner.hardware import GIB
from tools.planner.inventory import inventory
from tools.planner.mesh import Mesh
from tools.planner.plan import Job, Plan, plan
from tools.planner.steptime import Efficiency


def sizes(gpus: int, host: int) -> list[int]:
    """From one host to eight times as many GPUs as asked for, doubling."""
    found, size = [], host
    while size <= 8 * max(gpus, host):
        found.append(size)
        size *= 2
    return found


def curves(job: Job, efficiency: Efficiency = CALIBRATED) -> dict[str, list[Plan]]:
    """Plans by mesh: the job's own way, and others that our engines run, where they run at all."""
    host, experts = job.gpu.host, job.config.decoder.moe_layers > 0
    ways: list[tuple[str, Mesh]] = [("as asked", job.mesh)]
    for parallel, expert, shards in (("ddp", 1, 0), ("fsdp2", 1, 0), ("fsdp2", host, 0), ("hsdp", 1, 8 * host)):
        same = (parallel, expert, shards) == (job.mesh.parallel, job.mesh.expert, job.mesh.shards)
        if not same and (expert == 1 or experts):
            mesh = Mesh(8 * 8 * host, parallel, expert, job.mesh.context, shards)
            words = parallel + (f", ep {expert}" if expert > 1 else "") + (f", {shards} shards" if shards else "")
            ways.append((words, mesh))
    weights = inventory(job.config)
    found: dict[str, list[Plan]] = {}
    for words, mesh in ways:
        for gpus in sizes(job.mesh.gpus, host):
            try:
                one = plan(replace(job, mesh=replace(mesh, gpus=gpus)), efficiency, weights)
            except ValueError:
                continue  # too few ranks to share experts, or too few tokens a step
            found.setdefault(words, []).append(one)
    return found


def draw(job: Job, file: Path, efficiency: Efficiency = CALIBRATED) -> dict[str, list[Plan]]:
    """Writes the picture and returns what it shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    found = curves(job, efficiency)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for n, (words, plans) in enumerate(found.items()):
        style = {"color": f"C{n}", "linewidth": 2.4 if words == "as asked" else 1.4}
        label = f"{words}: {job.mesh.name().replace(f' x{job.mesh.gpus}', '')}" if words == "as asked" else words
        gpus = [one.job.mesh.gpus for one in plans]
        above.plot(gpus, [100 * one.step.mfu for one in plans], label=label, **style)
        below.plot(gpus, [one.memory.peak / GIB for one in plans], label=label, **style)
        _mark(above, [(one.job.mesh.gpus, 100 * one.step.mfu, one.fits) for one in plans], f"C{n}")
        _mark(below, [(one.job.mesh.gpus, one.memory.peak / GIB, one.fits) for one in plans], f"C{n}")
    below.axhline(job.gpu.memory / GIB, color="black", linestyle=":", linewidth=1)
    below.annotate(f"{job.gpu.name}: {job.gpu.memory / GIB:.0f} GiB", (0.01, job.gpu.memory / GIB),
                   xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=9)  # fmt: skip
    below.set_yscale("log", base=2)
    below.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    below.set_xscale("log", base=2)
    below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    above.set_ylim(bottom=0)
    above.set_ylabel("MFU (%)")
    below.set_ylabel("memory of the fullest rank (GiB)")
    below.set_xlabel("GPUs")
    batch = f"{job.tokens_per_step:,} tokens a step" if job.tokens_per_step else "one micro-batch a rank and step"
    again = ", ".join(sorted(job.settings.recompute)) or "nothing"
    above.set_title(
        f"{job.preset}: {job.load.tokens:,} tokens a micro-batch, {batch}\nrecomputed: {again}", fontsize=10
    )
    above.legend(fontsize=9, title="filled: fits", title_fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return found


def _mark(axes: object, points: Sequence[tuple[int, float, bool]], color: str) -> None:
    for x, y, fits in points:
        axes.plot([x], [y], "o", color=color, markersize=5, fillstyle="full" if fits else "none")  # type: ignore[attr-defined]
