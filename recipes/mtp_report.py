"""What the ablation of multi-token prediction found: a table a size, dots with intervals, and curves of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, pstdev

from data_pipelines.held_out import HeldOut
from data_pipelines.stream import PackStream
from mmagent import dist
from mmagent.config import load_yaml
from mmagent.engine.build import build_engine
from mmagent.engine.optim import build_optimizer
from mmagent.files import write_text
from mmagent.interop.agent_folder import load_agent
from mmagent.models.context import mtp_traffic
from mmagent.models.mtp import MODES
from mmagent.objectives.language_modeling import LanguageModeling
from mmagent.train.hooks import evaluate, read_jsonl
from recipes.ablation_report import dot_plot, t_interval, with_interval
from recipes.language_stage import Config
from recipes.mtp_curves import curve_plot

REFERENCE = "shared"
"""What the other modes are compared with."""
BYTES_PER_VALUE = 2
"""What crosses between stages is bfloat16."""
PLOTTED = ("main loss", "MTP loss", "accepted, depth 1", "after image", "text only")

Found = dict[str, dict[str, list[float]]]


def write(output: Path, sizes: Sequence[str], seeds: int) -> str:
    """Judge all runs under ``output / size / mode-seed`` and read their logs; write the files; return the tables."""
    found = {size: {mode: _gather(output / size, mode, seeds) for mode in MODES} for size in sizes}
    curves = {size: {mode: _curve(output / size, mode, seeds) for mode in MODES} for size in sizes}
    table = "\n\n".join(f"**{size}**\n\n{_table(found[size])}" for size in sizes)
    write_text(output / "ablation.json", json.dumps({"runs": found, "curves": curves}, indent=1) + "\n")
    write_text(output / "ablation.md", table + "\n")
    rows = {f"{size}, {mode}": found[size][mode] for size in sizes for mode in MODES}
    write_text(output / "ablation.svg", dot_plot(rows, PLOTTED))
    write_text(output / "curves.svg", curve_plot(curves, REFERENCE))
    return table


def _gather(folder: Path, mode: str, seeds: int) -> dict[str, list[float]]:
    """Figures of every seed, by what people call them."""
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, value in figures(folder / f"{mode}-{seed}").items():
            rows.setdefault(name, []).append(value)
    return rows


def judged(run: Path) -> dict[str, float]:
    """Losses and metrics of the agent that ``run`` left, on its held-out samples, and ``stage_bytes``: what its MTP
    needs at the last pipeline stage beside hidden states and ids, a token in the forward. Found once, and kept."""
    kept = run / "judged.json"
    if not kept.is_file():
        config, agent, world = load_yaml(Config(), run / "config.yaml"), load_agent(run / "agent"), dist.init()
        objective = LanguageModeling(agent.model, config.objective)
        engine = build_engine(objective, build_optimizer(agent.model, config.optim), config.engine, world)
        with closing(PackStream(config.data, agent.vocab, agent.geometry, agent.chat, world)) as stream:
            batches = list(HeldOut(config.validation, stream)())
        found = evaluate(objective, batches, world, engine)
        whole = agent.model.config
        sizes = (whole.mtp, agent.model.encoder.merge_size, whole.decoder.width, BYTES_PER_VALUE)
        moved = sum(mtp_traffic(batch, *sizes).stage for batch in batches)
        found["stage_bytes"] = moved / sum(batch.num_tokens for batch in batches)
        write_text(kept, json.dumps(found, indent=1) + "\n")
    return json.loads(kept.read_text(encoding="utf-8"))


def figures(run: Path) -> dict[str, float]:
    """Of one pretraining: held-out figures after the last step, steadiness, time, and bytes.

    *unsteadiness* is the standard deviation of the change of the MTP training loss from one step to the next less the
    main loss's change, over the second half: what batches share cancels.
    """
    log, times, found = read_jsonl(run / "log.jsonl"), read_jsonl(run / "log.time.jsonl"), judged(run)
    config = load_yaml(Config(), run / "config.yaml").model
    depths = range(1, config.mtp.depths + 1)
    out = {"main loss": found["loss/lm"]}
    out["MTP loss"] = fmean(found[f"loss/mtp_{k}"] for k in depths)
    out |= {f"MTP loss, depth {k}": found[f"loss/mtp_{k}"] for k in depths}
    for where in ("after image", "text only"):
        out[f"MTP loss, depth 1, {where}"] = found[f"mtp_1/loss_{where.replace(' ', '_')}"]
    out |= {f"accepted, depth {k}": found[f"mtp_{k}/accept"] for k in depths}
    out["after image"] = found["mtp_1/accept_after_image"]
    out["text only"] = found["mtp_1/accept_text_only"]
    half = log[len(log) // 2 :]
    gaps = [mtp_loss(row) - row["loss/lm"] for row in half]
    out["unsteadiness"] = pstdev(b - a for a, b in pairwise(gaps))
    out["seconds a step"] = median(row["time/step"] for row in times[1:])
    out["bytes a token into the last stage"] = found["stage_bytes"]
    return out


def mtp_loss(row: Mapping[str, float]) -> float:
    """Mean over depths of a step's training loss."""
    return fmean(value for name, value in row.items() if name.startswith("loss/mtp_"))


def _curve(folder: Path, mode: str, seeds: int) -> list[tuple[int, float]]:
    """``(step, MTP training loss)``, mean over depths and seeds."""
    logs = [read_jsonl(folder / f"{mode}-{seed}" / "log.jsonl") for seed in range(seeds)]
    return [(rows[0]["step"], fmean(mtp_loss(row) for row in rows)) for rows in zip(*logs, strict=True)]


def _table(found: Found) -> str:
    """A row a figure, a column a mode; differences to the reference are taken within a seed."""
    others = [mode for mode in found if mode != REFERENCE]
    lines = [
        f"| | {' | '.join(found)} | {' | '.join(f'{mode} - {REFERENCE}' for mode in others)} |",
        f"| --- | {' | '.join('---' for _ in (*found, *others))} |",
    ]
    for name, base in found[REFERENCE].items():
        cells = [with_interval(t_interval(found[mode][name])) for mode in found]
        for mode in others:
            apart = [a - b for a, b in zip(found[mode][name], base, strict=True)]
            cells.append(with_interval(t_interval(apart), sign=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
