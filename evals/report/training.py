"""What a training run's folder tells: its logs as one object, and the sections of a page about it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf

from evals.report.maps import heat_map, stacked_area
from mmagent.html.charts import line_chart, middle, series_of
from mmagent.html.pieces import Section, code, details, facts, grid, heading, join, number, paragraph, percent, table
from mmagent.models.peaks import peak_of
from mmagent.train.incidents import read_incidents
from mmagent.train.logs import read_jsonl
from mmagent.train.segments import DEVICE, OWN

Rows = list[dict[str, Any]]

_FILES = {
    "log.jsonl": "losses and figures",
    "log.time.jsonl": "times",
    "ranks.jsonl": "times and memory of every rank (watch.interval)",
    "environment.jsonl": "where it was started",
    "config.yaml": "its settings",
}


class TrainingRun:
    """Reads a run's ``folder``; whatever is not there is empty, and in :attr:`missing`."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.log = read_jsonl(folder / "log.jsonl")
        times = {row["step"]: row for row in read_jsonl(folder / "log.time.jsonl")}
        self.rows: Rows = [{**row, **times.get(row["step"], {})} for row in self.log]
        self.ranks = read_jsonl(folder / "ranks.jsonl")
        self.router = read_jsonl(folder / "router_load.jsonl")
        self.starts = read_jsonl(folder / "environment.jsonl")
        self.incidents = read_incidents(folder / "incidents.jsonl")
        config = folder / "config.yaml"
        self.config = config.read_text() if config.exists() else ""
        self.profiles = [json.loads(path.read_text()) for path in sorted((folder / "profile").glob("steps-*.json"))]

    @property
    def missing(self) -> list[str]:
        """What a run leaves and this folder does not have, for people."""
        gone = [f"{name} ({what})" for name, what in _FILES.items() if not (self.folder / name).exists()]
        empty = ["no step was logged"] if (self.folder / "log.jsonl").exists() and not self.log else []
        return gone + empty

    @property
    def gaps(self) -> list[str]:
        """Steps that a log lacks between its first and its last, for people: a run writes each of them once."""
        told = []
        for name in ("log.jsonl", "log.time.jsonl"):
            steps = {row["step"] for row in read_jsonl(self.folder / name)}
            gone = sorted(set(range(min(steps), max(steps))) - steps) if steps else []
            if gone:
                listed = ", ".join(map(str, gone[:12])) + (f" and {len(gone) - 12} more" if len(gone) > 12 else "")
                told.append(f"{name} has no rows for {len(gone)} of {max(steps)} steps: {listed}.")
        return told

    @cached_property
    def phases(self) -> dict[str, float]:
        """Where phases begin that follow another one, and where the run was started again, by name."""
        marks, end = {}, 0
        settings: Any = OmegaConf.to_container(OmegaConf.create(self.config))
        for phase in settings.get("phases") or []:
            if end:
                marks[f"phase {phase.get('name', '')}"] = end + 0.5
            end += int(phase.get("steps", 0))
        again = [start["step"] for start in self.starts if start["step"]]
        return marks | {"started again" + " " * n: step + 0.5 for n, step in enumerate(again)}

    @cached_property
    def keys(self) -> list[str]:
        """Every figure that some step has, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key != "step"))

    def median(self, key: str) -> float:
        """:func:`median` over all steps."""
        return median(self.rows, key)

    def under(self, prefix: str) -> list[str]:
        return [key for key in self.keys if key.startswith(prefix)]

    @property
    def unit(self) -> str:
        """What its throughput is counted in: encoders without text see patches."""
        return "tokens" if any(row.get("tokens") for row in self.rows) else "patches"

    def peak(self, given: float = 0.0) -> float:
        """Operations a second of all its devices, or 0 where unknown. ``given``: of one device, or of one machine where
        ranks compute on its processors."""
        if not self.starts:
            return 0.0
        start = self.starts[-1]
        if start["cuda"] == "":
            return given * len(set(start["hosts"]))
        return (given or peak_of(start["devices"][0]) or 0.0) * start["ranks"]


def compare(runs: Sequence[TrainingRun], pick: Callable[[TrainingRun], Iterable[str]], **how: Any) -> Markup:
    """One chart for each figure that any run has, a line a run. Validations are few, so that each is drawn as it is."""
    keys = list(dict.fromkeys(key for run in runs for key in pick(run)))
    charts = []
    for key in keys:
        lines: dict[str, Any] = {}
        for run in runs:
            lines |= series_of(run.rows, {key: run.name})
        if lines:
            charts.append(line_chart(lines, key, **how, exact=lines if key.startswith("validation/") else ()))
    return grid(charts)


def last_tenth(rows: Rows, key: str) -> float:
    """The mean of ``key`` over the last tenth of ``rows``, where it is finite; NaN where it nowhere is."""
    values = [row[key] for row in rows[-max(len(rows) // 10, 1) :] if math.isfinite(row.get(key, math.nan))]
    return sum(values) / len(values) if values else math.nan


def side_by_side(runs: Sequence[TrainingRun], keys: Iterable[str]) -> tuple[list[dict[str, float]], str]:
    """``keys`` of each of ``runs`` over the steps that all of them have, and in words what is told: of losses and
    rewards the mean over the last tenth of these steps, of validations that of the last step at which all made one, of
    all else medians without the first of these steps. Empty where there is nothing to tell."""
    began = [run for run in runs if run.rows]
    common = set.intersection(*({row["step"] for row in run.rows} for run in began)) if began else set()
    if not common:
        return [{} for _ in runs], "no step that all runs have: nothing to set side by side"
    rows = [[row for row in run.rows if row["step"] in common] for run in runs]
    told = f"over steps {min(common)} to {max(common)}, which all runs have: loss and reward, mean of the last tenth"
    figures: list[dict[str, float]] = [{} for _ in runs]
    for key in keys:
        if key.startswith("validation/"):
            steps = [{row["step"] for row in own if key in row} for own in rows]
            judged = set.intersection(*([own for own in steps if own] or [set()]))
            own_rows = [[row for row in own if row["step"] == max(judged, default=None)] for own in rows]
            told += f"; {key} at step {max(judged)}" if judged else f"; {key}: never at the same step"
        else:
            own_rows = rows
        for found, own in zip(figures, own_rows, strict=True):
            found[key] = last_tenth(own, key) if key in ("loss", "reward") or own_rows is not rows else median(own, key)
    return figures, told + "; all else medians"


def median(rows: Rows, key: str) -> float:
    """Over all ``rows`` but the first, which warms up; NaN where nothing is known."""
    found = [row[key] for row in rows[1:] or rows if isinstance(row.get(key), int | float)]
    return statistics.median(found) if found else math.nan


def chart_of(run: TrainingRun, keys: Iterable[str], title: str, cut: str = "", **how: Any) -> Markup:
    """``keys`` of one run as lines of one chart, named without ``cut``, with the run's phases and starts; nothing where
    none has a value."""
    lines = series_of(run.rows, {key: key.removeprefix(cut) or title.lower() for key in keys})
    return line_chart(lines, title, **how, phases=run.phases) if lines else Markup("")


REGULARISERS = ("balance", "kl", "entropy")
"""Loss terms that hold a model in place rather than tell what it learned."""


def by_scale(lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[list[str]]:
    """Names of lines that can share one chart: once settled they span together no more than six times what each of them
    does, so that none is drawn flat for the sake of another. Regularisers share none with what is learned: their units
    are others. The fullest chart first, regularisers last."""
    spans = {name: middle(points) for name, points in lines.items() if any(math.isfinite(y) for _, y in points)}
    groups: list[list[str]] = []
    for name in sorted(spans, key=lambda name: (name in REGULARISERS, spans[name])):
        together = [*(groups[-1] if groups else []), name]
        whole = max(spans[one][1] for one in together) - min(spans[one][0] for one in together)
        alike = (together[0] in REGULARISERS) == (name in REGULARISERS)
        if groups and alike and whole <= 6 * min(spans[one][1] - spans[one][0] for one in together):
            groups[-1].append(name)
        else:
            groups.append([name])
    order = list(lines)
    groups = [sorted(group, key=order.index) for group in groups]
    return sorted(groups, key=lambda group: (group[0] in REGULARISERS, -len(group), order.index(group[0])))


def scale_of(value: float) -> tuple[float, str]:
    """A power of a thousand that leaves up to three digits before the point, and its letter."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return size, letter
    return 1.0, ""


def losses(run: TrainingRun) -> Section:
    """Terms and validation, rates, gradient norms, acceptance of drafts, and all other figures by their first word."""
    terms = run.under("loss/") or ["loss"]
    held_out = {f"validation/{key}": f"{key.removeprefix('loss/')}, held out" for key in terms}
    lines = series_of(run.rows, {key: key.removeprefix("loss/") for key in terms})
    exact = series_of(run.rows, held_out)
    charts = []
    for group in by_scale(lines):
        own = {name: lines[name] for name in group}
        like = {name: name.removesuffix(", held out") for name in exact if name.removesuffix(", held out") in group}
        own |= {name: exact[name] for name in like}
        title = "Loss by term" if not charts else f"Loss: {', '.join(group)}"
        charts.append(line_chart(own, title, smooth=0.8, exact=exact, like=like, phases=run.phases, settled=True))
    by_source = chart_of(
        run, run.under("loss_by_source/"), "Loss by source", "loss_by_source/", smooth=0.8, settled=True
    )
    norms = chart_of(
        run, ["grad_norm", *run.under("grad_norm/")], "Gradient norm by role", "grad_norm/", log_y=True, smooth=0.5,
    )  # fmt: skip
    rates = chart_of(
        run, ["lr_scale", *run.under("lr_scale/")], "Learning rate over its setting", "lr_scale/", from_zero=True,
    )  # fmt: skip
    accept = [key for key in run.keys if "/accept" in key and not key.startswith("validation/")]
    drafts = chart_of(run, accept, "Share of MTP drafts accepted", smooth=0.8, from_zero=True)
    return Section("Learning", grid(chart for chart in [*charts, by_source, norms, rates, drafts] if chart))


_SHOWN = ("loss", "grad_norm", "lr_scale", "data", "time", "memory", "validation", "router", "loss_by_source")
_PLAIN = ("tokens", "patches", "documents", "flops")


def others(run: TrainingRun) -> Section | None:
    """Every figure that no other section shows: rewards, entropy and drift of RL, cosines of distillation and so on."""
    groups: dict[str, list[str]] = {}
    zeros = []
    for key in run.keys:
        head = key.split("/")[0]
        if head not in _SHOWN and key not in _PLAIN and "/accept" not in key:
            if any(row.get(key) for row in run.rows):
                groups.setdefault(head, []).append(key)
            else:
                zeros.append(key)
    singles = {head: keys for head, keys in groups.items() if len(keys) == 1}
    charts = [chart_of(run, keys[:12], head, f"{head}/", smooth=0.6) for head, keys in groups.items() if len(keys) > 1]
    charts += [chart_of(run, keys, head, smooth=0.6) for head, keys in singles.items()]
    told = paragraph(f"Zero at every step: {', '.join(zeros)}.", quiet=True) if zeros else Markup("")
    body = grid(chart for chart in charts if chart) + told
    return Section("Metrics", body, "What this stage's objective and data say beside the loss.") if body else None


def packing(run: TrainingRun) -> Section | None:
    """How full packs are, of tokens and of patches, and what they hold."""
    fill = {
        key: name for key, name in {"data/fill": "tokens", "data/fill_patches": "patches"}.items() if key in run.keys
    }
    if not fill:
        return None
    lines = series_of(run.rows, fill)
    charts = [line_chart(lines, "Fill of packs", smooth=0.6, from_zero=True, phases=run.phases)]
    charts.append(chart_of(run, ["documents", "data/images"], "Documents a step", smooth=0.6, from_zero=True))
    charts.append(chart_of(run, ["tokens", "patches"], "Tokens and patches a step", smooth=0.6, from_zero=True))
    charts.append(chart_of(run, run.under("data/epoch/"), "Epochs of each source", "data/epoch/", from_zero=True))
    told = {f"mean fill of {name}": percent(_mean(run, key)) for key, name in fill.items()}
    told |= {f"waste of {name}": percent(1 - _mean(run, key)) for key, name in fill.items()}
    rest = [
        key
        for key in run.under("data/")
        if key not in (*fill, "data/images", "data/documents") and not key.startswith("data/epoch/")
    ]
    told |= {key.removeprefix("data/").replace("_", " "): sum(row.get(key, 0) for row in run.rows) for key in rest}
    return Section("Packing", facts(told) + grid(chart for chart in charts if chart))


def _mean(run: TrainingRun, key: str) -> float:
    found = [row[key] for row in run.rows if key in row]
    return sum(found) / len(found) if found else math.nan


def throughput(run: TrainingRun, peak: float) -> Section | None:
    """Units a second, where the time goes, how much is waiting for data, useful operations a second."""
    if "time/step" not in run.keys:
        return None
    steps = [row["step"] for row in run.rows]
    names = [key for key in run.under("time/segment/") if DEVICE not in key]
    titled = {key.removeprefix("time/segment/"): [row.get(key, 0.0) for row in run.rows] for key in names}
    area = stacked_area(titled, steps, "Seconds by segment, main rank", y_label="seconds a step", phases=run.phases)
    rates = [key for key in run.under("time/") if key.endswith("_per_second") and key != "time/flops_per_second"]
    charts = [
        chart_of(run, [key], f"{key[5:-11].capitalize()} a second", key, smooth=0.6, from_zero=True) for key in rates
    ]
    shares = ["time/data_share", "time/rollout_share"]
    charts.append(chart_of(run, shares, "Share of the step that waits for data", "time/", smooth=0.6, from_zero=True))
    told = [COUNTED]
    if useful := mfu(run):
        size, unit = scale_of(max(rate for _, rate in useful))
        lines = {f"{unit}FLOP/s": [(step, rate / size) for step, rate in useful]}
        how = {"smooth": 0.6, "from_zero": True, "phases": run.phases}
        charts.append(line_chart(lines, f"Useful {unit}FLOP/s of all ranks", **how))
        if peak:
            share = {"MFU": [(step, 100 * rate / peak) for step, rate in useful]}
            charts.append(line_chart(share, "MFU, per cent", **how))
        else:
            told.append("No MFU: the peak of this device is not known. --peak FLOPS says it, --peak measure finds it.")
    body = grid(c for c in charts if c) + join(paragraph(text, quiet=True) for text in told)
    return Section("Throughput", (area if names else Markup("")) + body)


COUNTED = (
    "Useful operations: forward and backward of what the model computes for these very documents: matrix products of "
    "active parameters, attention by true document lengths, vision by true patch counts, the head on supervised "
    "tokens. A backward counts twice its forward, once where nothing below learns, not at all where all is frozen. "
    "Padding, activations computed again, norms, the optimizer, frozen teachers and sampling in RL are no useful work, "
    "but their time is in the denominator: MFU is useful operations over wall time and peak."
)


def mfu(run: TrainingRun) -> list[tuple[float, float]]:
    """Useful operations a second of every step, over the time from one row of the log to the next: validation, saving
    and all hooks count. Logs of before that was written have the step alone."""
    walls = [(row, row.get("time/wall", row.get("time/step"))) for row in run.rows]
    return [(float(row["step"]), row["flops"] / wall) for row, wall in walls if row.get("flops") and wall]


def ranks(run: TrainingRun) -> Section | None:
    """Heat maps over ranks and steps by segment, and which ranks were slow."""
    if not run.ranks:
        return None
    size = len(run.ranks[-1]["seconds"])
    windows = [row for row in run.ranks if len(row["seconds"]) == size]
    steps = [step for row in windows for step in row["steps"]]
    hosts = windows[-1]["hosts"]
    maps = []
    if size > 1:
        maps = _own_work(windows, steps, hosts)
        waits = {f"rank {r}": [s for row in windows for s in _spent(row, r, ("count", "reduce"))] for r in range(size)}
        most = max((s for values in waits.values() for s in values), default=0.0) or 1.0
        about = f"in full at {number(most)} s; who waits least keeps the others waiting"
        maps.append(
            heat_map(
                waits, steps, "Waiting for others (count, reduce)", full=most, show=lambda s: f"{s:.3g} s", about=about
            )
        )
    slow = [{"up to step": row["step"], **entry} for row in windows for entry in row["slow"]]
    told = (
        table(slow[-50:])
        if slow
        else paragraph("No rank stayed slow." if size > 1 else "One rank: nothing to compare.")
    )
    return Section("Ranks", told + join(maps), f"Ranks: {size}. Hosts: {len(set(hosts))}.")


def _own_work(windows: Sequence[Mapping[str, Any]], steps: Sequence[float], hosts: Sequence[str]) -> list[Markup]:
    """A map of all own work, and one of each segment that matters, over the median rank; all as shares of its own work,
    so that their colours add up."""
    spent = {
        name: [[s for row in windows for s in _spent(row, rank, (name,))] for rank in range(len(hosts))] for name in OWN
    }
    whole = [
        [sum(parts) for parts in zip(*(spent[name][rank] for name in OWN), strict=True)] for rank in range(len(hosts))
    ]
    usual = [statistics.median_low(column) for column in zip(*whole, strict=True)]
    total = sum(usual)
    maps = []
    for title, seconds in [("Own work: all segments in which a rank waits for nobody", whole), *spent.items()]:
        median = [statistics.median_low(column) for column in zip(*seconds, strict=True)]
        if total <= 0 or max(sum(row) for row in seconds) < 0.005 * total:
            continue
        over = {
            f"rank {rank}" + (f" ({hosts[rank]})" if len(set(hosts)) > 1 else ""): [
                (s - m) / u if u > 0 else math.nan for s, m, u in zip(seconds[rank], median, usual, strict=True)
            ]
            for rank in range(len(hosts))
        }
        about = (
            f"red: over the median rank ({number(sum(median) / len(median))} s a step), full at half of all own work"
        )
        maps.append(
            heat_map(over, steps, title[0].upper() + title[1:], full=0.5, about=f"{about}; at the right the mean")
        )
    return maps


def _spent(row: Mapping[str, Any], rank: int, names: Sequence[str]) -> list[float]:
    """Seconds of every step of a window in ``names``; the device's clock where there is one, but for data."""
    at = {name: n for n, name in enumerate(row["names"])}
    columns = [at.get(DEVICE + name if name != "data" and DEVICE + name in at else name) for name in names]
    return [sum(step[c] for c in columns if c is not None) for step in row["seconds"][rank]]


def memory(run: TrainingRun) -> Section | None:
    """Of the rank that holds most: by kind and role, and what processes and devices hold through the run."""
    rows = [row for row in run.ranks if row.get("memory")]
    if not rows:
        return None
    last = rows[-1]["memory"]
    kinds = [kind for kind in ("parameters", "gradients", "optimizer") if any(kind in one for one in last)]
    roles = list(dict.fromkeys(role for one in last for kind in kinds for role in one.get(kind, {})))
    most = {k: {r: max(one.get(k, {}).get(r, 0) for one in last) / 1e6 for r in roles} for k in kinds}
    body = [{"role": role, **{kind: most[kind][role] for kind in kinds}} for role in roles]
    total = {"role": "all", **{kind: sum(most[kind].values()) for kind in kinds}}
    names = {
        "rss": "resident",
        "peak": "resident at most",
        "device": "on the device",
        "device_peak": "on the device at most",
    }
    lines = {
        name: [(float(row["step"]), max(one[key] for one in row["memory"]) / 1e9) for row in rows]
        for key, name in names.items()
        if all(key in one for row in rows for one in row["memory"])
    }
    chart = line_chart(lines, "Gigabytes of the rank that holds most", from_zero=True, phases=run.phases)
    parts = [table(body, totals=[total])] if body else []
    intro = "Megabytes of the rank that holds most, by role; activations are what the device's peak has beyond these."
    return Section("Memory", grid([*parts, chart]), intro)


def checkpoints(run: TrainingRun) -> Section | None:
    """What saving and validating cost."""
    keys = [
        key
        for key in ("time/checkpoint", "time/checkpoint_wait", "time/checkpoint_write", "time/validation")
        if key in run.keys
    ]
    if not keys:
        return None
    lines = series_of(run.rows, {key: key.removeprefix("time/").replace("_", " ") for key in keys})
    seconds = {name: [s for _, s in points] for name, points in lines.items()}
    rows = [
        {"what": name, "times": len(own), "median, s": statistics.median(own), "all, s": sum(own)}
        for name, own in seconds.items()
    ]
    stalled = sum(row.get("time/checkpoint", 0.0) + row.get("time/checkpoint_wait", 0.0) for row in run.rows)
    whole = sum(sum(v for k, v in row.items() if k.startswith("time/segment/") and DEVICE not in k) for row in run.rows)
    told = {
        "training waited for saving": f"{stalled:.3g} s" + (f", {percent(stalled / whole)} of the run" if whole else "")
    }
    chart = line_chart(lines, "Seconds each", exact=lines, from_zero=True, phases=run.phases)
    return Section(
        "Checkpoints and validation",
        grid([Markup("<div>{}{}</div>").format(table(rows), facts(told)), chart]),
    )


def incidents(run: TrainingRun) -> Section | None:
    """Steps that were not taken as planned."""
    if not run.incidents:
        return None
    rows = [
        {
            "step": incident.step + 1,
            "what": incident.kind,
            "action": incident.action,
            "reason": incident.reason,
            "documents": ", ".join(name for finding in incident.findings[:4] for name in finding.documents[:4]),
        }
        for incident in run.incidents
    ]
    return Section("Incidents", table(rows))


def profiles(run: TrainingRun) -> Section | None:
    """The operations that took longest in the profiled steps."""
    parts = []
    for profile in run.profiles:
        steps, ops = profile["steps"], profile["ops"]
        kind = "device" if any(op["device"] for op in ops) else "host"
        total = sum(op[kind] for op in ops) or 1.0
        rows = [
            {"segment": op["segment"], "operation": op["op"], "ms a step": 1e3 * op[kind] / steps,
             "share, %": 100 * op[kind] / total, "calls a step": op["calls"] / steps}
            for op in sorted(ops, key=lambda op: -op[kind])[:20]
        ]  # fmt: skip
        parts += [heading(f"{steps} steps from step {profile['first']}: self time on the {kind}"), table(rows)]
    return Section("Operations", join(parts)) if parts else None


def origin(run: TrainingRun) -> Section:
    """Where it ran, with which settings, and what its folder lacks."""
    parts = []
    for start in run.starts:
        told = {
            k: ", ".join(dict.fromkeys(v)) if k in ("hosts", "devices") else v
            for k, v in start.items()
            if k not in ("command", "step", "started") and v != ""
        }
        told["command"] = " ".join(start["command"])
        parts += [heading(f"Started {start['started']}, going on from step {start['step']}"), facts(told)]
    first = [
        (row["step"], row["time/first_step"], row.get("time/first_step_after_imports"))
        for row in run.rows
        if "time/first_step" in row
    ]
    for step, seconds, after in first:
        more = "" if after is None else f", {after:.1f} s after imports"
        parts.append(paragraph(f"Step {step} was the first of its process: done {seconds:.1f} s after it began{more}."))
    if run.missing:
        parts.append(paragraph("Not in this folder: " + "; ".join(run.missing) + "."))
    parts += [details("Settings", code(run.config))] if run.config else []
    return Section("Environment and settings", join(parts))
