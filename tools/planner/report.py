"""Plans and comparisons as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_pipelines.stream import StreamConfig
from tools.planner.calibration import Compared, mean_error, spread
from tools.planner.hardware import GIB
from tools.planner.plan import Change, Job, Plan
from tools.planner.simulate import Simulated

BAR = 30


def columns(head: Sequence[str], body: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """An aligned table; columns in ``left`` are text."""
    widths = [max(len(line[n]) for line in (head, *body)) for n in range(len(head))]
    text = set(left)

    def line(cells: Sequence[str]) -> str:
        parts = (c.ljust(w) if n in text else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(parts).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, body)])


def bar(share: float, width: int = BAR) -> str:
    """``share`` of a bar, at least a dot where there is anything."""
    cells = min(round(share * width), width)
    return "#" * cells or ("." if share > 0 else "")


def count(number: float) -> str:
    """``355.2 B``"""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def duration(seconds: float) -> str:
    """In the unit that people would say it in."""
    if seconds < 1:
        return f"{1000 * seconds:,.1f} ms"
    return f"{seconds:,.2f} s"


def headline(plan: Plan) -> str:
    """Model, mesh and batch in two lines."""
    job = plan.job
    lengths = job.load.lengths
    mean = job.load.tokens // len(lengths)
    again = ", ".join(sorted(job.settings.recompute)) or "nothing"
    lines = [
        f"{job.preset}: {count(plan.parameters)} parameters, {count(plan.active)} active a token; "
        f"{job.mesh.name()} on {job.gpu.name} ({job.gpu.host} a host), {job.settings.dtype}",
        f"{job.load.tokens:,} tokens a micro-batch in {len(lengths)} documents of {mean:,} (longest {max(lengths):,}), "
        f"{job.load.patches:,} patches; {job.micro_batches} x {job.mesh.data:,} = {count(plan.step.tokens)} tokens "
        f"a step; recomputed: {again}",
    ]
    if job.settings.frozen:
        lines.append(f"frozen: {', '.join(sorted(job.settings.frozen))}")
    return "\n".join(lines)


def memory_table(plan: Plan) -> str:
    """Kinds with bars of what the accelerator has, then roles, then the verdict."""
    memory, have = plan.memory, plan.job.gpu.memory
    body = [(kind, gib(size), f"{size / have:.1%}", bar(size / have)) for kind, size in memory.kinds().items()]
    body.append(("together", gib(memory.peak), f"{memory.peak / have:.1%}", bar(memory.peak / have)))
    kinds = columns(
        (f"memory of the fullest rank, {memory.fullest}", "GiB", "share", f"of {have / GIB:.1f} GiB"), body, left=(0, 3)
    )
    roles = [(role, gib(size), bar(size / have)) for role, size in sorted(memory.roles.items(), key=lambda x: -x[1])]
    split = columns(("state and what the backward keeps, by role", "GiB", ""), roles, left=(0, 2))
    verdict = f"fits, {gib(have - memory.peak)} GiB to spare"
    if not plan.fits:
        verdict = f"DOES NOT FIT: {gib(memory.peak - have)} GiB too much"
    return f"{kinds}\n\n{split}\n\n{verdict}"


def time_table(plan: Plan) -> str:
    """Components of a step, and of communication also what is hidden."""
    step = plan.step
    body = []
    for part, seconds in sorted(step.parts.items(), key=lambda item: -item[1]):
        whole = step.whole.get(part, 0.0)
        hidden = f"{1 - seconds / whole:.0%} of {duration(whole)}" if whole > 1.001 * seconds else ""
        share = seconds / step.seconds
        body.append((part, duration(seconds), f"{share:.1%}", hidden, bar(share)))
    body.append(("together", duration(step.seconds), "100.0%", "", ""))
    return columns(("time of a step", "", "share", "hidden", ""), body, left=(0, 4))


def full(plan: Plan, changes: Sequence[Change], tokens: float) -> str:
    """The whole report. ``tokens``: of a training whose days are asked for, or 0."""
    step, gpus = plan.step, plan.job.mesh.gpus
    lines = [headline(plan), "", memory_table(plan), "", time_table(plan), ""]
    lines.append(
        f"MFU {step.mfu:.1%} ({count(step.useful)} useful operations a step); limited by {step.limit}; "
        f"{step.tokens_per_gpu:,.0f} tokens/s a GPU, {count(step.tokens_per_gpu * gpus)} tokens/s"
    )
    if tokens:
        lines.append(f"{count(tokens)} tokens take {plan.days(tokens):,.1f} days without interruptions")
    if changes:
        lines += ["", "what would help" if plan.fits else "what would fit"]
        body = []
        for change in changes[:8]:
            other = change.plan
            gain = other.step.tokens_per_gpu / step.tokens_per_gpu
            body.append(
                (change.words, gib(other.memory.peak), f"{other.step.mfu:.1%}", f"{gain:.2f}x", other.step.limit)
            )
        head = ("change", "GiB", "MFU", "tokens/s a GPU", "limited by")
        lines.append(columns(head, body, left=(0, 4)))
    elif not plan.fits:
        lines += ["", "no single change makes it fit: try --compare, more GPUs, or several of these together"]
    return "\n".join(lines)


def meshes_table(plans: Sequence[Plan], limit: int) -> str:
    """The best of a search, and how many there were."""
    body = []
    for plan in plans[:limit]:
        step, again = plan.step, ", ".join(sorted(plan.job.settings.recompute))
        body.append(
            (
                plan.job.mesh.name(),
                again or "-",
                str(plan.job.micro_batches),
                gib(plan.memory.peak),
                "yes" if plan.fits else "no",
                duration(step.seconds),
                f"{step.mfu:.1%}",
                f"{step.tokens_per_gpu:,.0f}",
                step.limit,
            )
        )
    head = ("mesh", "recompute", "micro-batches", "GiB", "fits", "step", "MFU", "tokens/s/GPU", "limited by")
    fitting = sum(plan.fits for plan in plans)
    return f"{columns(head, body, left=(0, 1, 8))}\n{len(plans)} meshes tried, {fitting} fit"


def published_table(compared: Sequence[Compared], outside: Sequence[Compared]) -> str:
    """Every row with its two errors: by constants fitted to all, and to other systems only."""
    body = []
    for inside, left in zip(compared, outside, strict=True):
        row, run = inside.row, inside.row.run
        sequence = f"{len(run.load.lengths)} x {run.load.lengths[0]:,}"
        body.append(
            (
                row.system,
                row.model.name,
                f"{run.gpu.name}, {run.mesh.name()}",
                sequence,
                f"{row.mfu:.1f}" if row.mfu else "",
                f"{row.tokens:,.0f}",
                f"{inside.tokens:,.0f}",
                f"{100 * inside.error:+.0f}%" if row.fit else "-",
                f"{100 * left.error:+.0f}%",
                f"{100 * inside.mfu:.1f}",
                inside.limit,
            )
        )
    head = ("system", "model", "on", "micro-batch", "their MFU", "tokens/s/GPU", "predicted", "error", "left out",
            "our MFU", "limited by")  # fmt: skip
    return columns(head, body, left=(0, 1, 2, 10))


def errors_table(compared: Sequence[Compared], outside: Sequence[Compared]) -> str:
    """Mean absolute errors by system, and over all systems alike."""
    systems = list(dict.fromkeys(one.row.system for one in compared))
    body, means = [], []
    for system in systems:
        sides = [[one for one in side if one.row.system == system and one.row.fit] for side in (compared, outside)]
        errors = [mean_error(side) for side in sides]
        means.append(errors)
        bias = sum(one.error for one in sides[1]) / len(sides[1])
        body.append((system, str(len(sides[0])), *(f"{100 * e:.1f}%" for e in errors), f"{100 * bias:+.1f}%"))
    mean = [sum(each) / len(means) for each in zip(*means, strict=True)]
    body.append(("all systems alike", str(sum(int(line[1]) for line in body)), *(f"{100 * e:.1f}%" for e in mean), ""))
    table = columns(("mean absolute error", "rows", "fitted to all", "left out", "left out, signed"), body)
    factor = spread([one for one in outside if one.row.fit])
    apart = [f"{one.row.system}, {one.row.model.name}: {100 * one.error:+.0f}%" for one in outside if not one.row.fit]
    if apart:
        table += f"\nnot fitted, and in none of these means: {'; '.join(apart)}"
    return f"{table}\na system that nothing was fitted to is met within a factor of {1 + factor:.2f} (one deviation)"


def simulated_table(found: Simulated, job: Job) -> str:
    """Fill of packs, and the heaviest rank's work by way of dealing."""
    body = []
    for one in found.dealt:
        way = "as they come" if one.group == 1 else f"by cost, {one.group:,} ranks at a time"
        traded = "" if one.moved is None else f"{one.moved:.3f}"
        body.append((f"{one.ranks:,}", way, f"{one.together:.3f}", f"{one.apart:.3f}", traded))
    head = ("ranks", "packs dealt", "meeting once a step", "after every micro-batch", "with images traded by 8")
    lines = [
        f"packs of {job.load.tokens:,} tokens hold {found.documents:.1f} documents and are {found.fill:.2%} full",
        "",
        "work of the heaviest rank over the mean",
        columns(head, body, left=(1,)),
    ]
    if found.vision:
        shares = ", ".join(f"{share:.2f} at {ranks:,}" for ranks, share in found.vision.items())
        lines += ["", f"patches of the heaviest rank over the mean, as packs come: {shares} ranks"]
    most = max(one.ranks for one in found.dealt)
    usual = [one for one in found.dealt if one.ranks == most and one.group in (1, StreamConfig().balance_ranks)][-1]
    apart = min(usual.apart, usual.moved or usual.apart)  # images are traded where that helps
    ratio = apart if job.mesh.sharded else usual.together
    lines += ["", f"for a plan on {most:,} ranks of this data, as the stream deals by default: --imbalance {ratio:.3f}"]
    return "\n".join(lines)


def sources_list(compared: Sequence[Compared]) -> str:
    """Where rows come from and what is assumed."""
    seen = dict.fromkeys((one.row.system, one.row.source, one.row.assumed) for one in compared)
    return "\n".join(f"{system}: {source}" + (f"; assumed: {more}" if more else "") for system, source, more in seen)
