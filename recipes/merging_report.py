"""What merging found: held-out losses of checkpoints, of their merges, and of the annealed run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import fmean

from data_pipelines.held_out import HeldOut
from data_pipelines.stream import PackStream
from mmagent import dist
from mmagent.config import load_yaml
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import open_weights, step_of, steps
from mmagent.engine.merging import KINDS, MergeConfig, merge
from mmagent.engine.optim import build_optimizer
from mmagent.files import write_text
from mmagent.interop.agent_folder import load_agent
from mmagent.interop.live_model import load_stored
from mmagent.objectives.language_modeling import LanguageModeling
from mmagent.ops.tensor_files import Stored
from mmagent.train.hooks import evaluate
from recipes.ablation_report import t_interval, with_interval
from recipes.language_stage import Config

COUNTS = (2, 3, 5, 10)
"""Newest checkpoints that are merged at the end of a run."""
TRACE = 5
"""Newest checkpoints whose mean is followed through the run."""


def judge(constant: Path, annealed: Path) -> dict[str, dict[str, float]]:
    """Held-out loss by what is judged: ``single`` and ``trace`` by step, ``merged`` by kind and count, and
    ``annealed``, ``constant`` at the end. Found once, and kept beside the run."""
    kept = constant / "merging.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    with ExitStack() as stack:
        loss = _judge_of(constant, stack)
        checkpoints = sorted(steps(constant / "checkpoints"), key=step_of)
        sources = [stack.enter_context(open_weights(path, "model")) for path in checkpoints]
        at = [step_of(path) for path in checkpoints]
        found: dict[str, dict[str, float]] = {"single": {}, "trace": {}, "merged": {}, "end": {}}
        for n, (step, source) in enumerate(zip(at, sources, strict=True)):
            print(f"\r{constant.name}: checkpoint {n + 1} of {len(at)}", end="", file=sys.stderr, flush=True)
            found["single"][str(step)] = loss(source)
            if n + 1 >= TRACE:
                newest = sources[n + 1 - TRACE : n + 1]
                found["trace"][str(step)] = loss(merge(newest, MergeConfig().coefficients(TRACE)))
        for kind in KINDS:
            for count in [count for count in COUNTS if count <= len(sources)]:
                merged = merge(sources[-count:], MergeConfig(kind).coefficients(count))
                found["merged"][f"{kind} {count}"] = loss(merged)
        print(file=sys.stderr)
        newest = stack.enter_context(open_weights(max(steps(annealed / "checkpoints"), key=step_of), "model"))
        found["end"] = {"annealed": loss(newest), "constant": found["single"][str(at[-1])]}
    write_text(kept, json.dumps(found, indent=1) + "\n")
    return found


def _judge_of(run: Path, stack: ExitStack) -> Callable[[Mapping[str, Stored]], float]:
    """The held-out loss on the next token of weights of the run's model."""
    config, agent, world = load_yaml(Config(), run / "config.yaml"), load_agent(run / "agent"), dist.init()
    objective = LanguageModeling(agent.model, config.objective)
    engine = build_engine(objective, build_optimizer(agent.model, config.optim), config.engine, world)
    stream = stack.enter_context(closing(PackStream(config.data, agent.vocab, agent.geometry, agent.chat, world)))
    batches = list(HeldOut(config.validation, stream)())

    def loss(tensors: Mapping[str, Stored]) -> float:
        load_stored(agent.model, tensors)
        return evaluate(objective, batches, world, engine)["loss/lm"]

    return loss


def write(output: Path, seeds: int) -> str:
    """Judge all runs; write the files; return the table."""
    found = [judge(output / f"constant-{seed}", output / f"annealed-{seed}") for seed in range(seeds)]
    table = _table(found)
    write_text(output / "merging.json", json.dumps(found, indent=1) + "\n")
    write_text(output / "merging.md", table + "\n")
    plot(found, output / "merging.png")
    return table


def _table(found: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Means over seeds with Student's 95 % intervals; differences are taken within a seed."""
    best = [min(one["single"].values()) for one in found]
    rows = {
        "annealed": [one["end"]["annealed"] for one in found],
        "constant, last checkpoint": [one["end"]["constant"] for one in found],
        "constant, best checkpoint": best,
    }
    rows |= {f"merged: {name}": [one["merged"][name] for one in found] for name in found[0]["merged"]}
    lines = ["| | held-out loss | less the best checkpoint | less the annealed |", "| --- | --- | --- | --- |"]
    for name, values in rows.items():
        cells = [with_interval(t_interval(values))]
        for other in (best, rows["annealed"]):
            cells.append(with_interval(t_interval([a - b for a, b in zip(values, other, strict=True)]), sign=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Sequence[Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Held-out loss by step: checkpoints, the mean of the newest few at each, and where annealing ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for seed, one in enumerate(found):
        styles = {"single": ("o-", "#8aa4c8", "a checkpoint"), "trace": ("-", "#1f4e8c", f"mean of the last {TRACE}")}
        for name, (style, colour, label) in styles.items():
            at = [int(step) for step in one[name]]
            axes.plot(at, list(one[name].values()), style, color=colour, markersize=3, label=None if seed else label)
        last = max(int(step) for step in one["single"])
        axes.plot(
            [last], [one["end"]["annealed"]], "*", color="#c2571a", markersize=13, label=None if seed else "annealed"
        )
    last = fmean(list(one["single"].values())[-1] for one in found)
    lowest = min(min(one["end"]["annealed"], *one["merged"].values()) for one in found)
    axes.set_ylim(lowest - 0.1 * (last - lowest), last + 1.5 * (last - lowest))
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.set_title(f"Constant learning rate, merged, against annealing ({len(found)} seeds)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
