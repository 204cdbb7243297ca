"""What the quickstart tells of pretraining: means of the last training steps, and the last held-out losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.quickstart_page import write
from recipes.quickstart_report import TAIL, shown, summarise

STEPS = 30


def log(folder: Path, validate_every: int) -> None:
    folder.mkdir(parents=True)
    rows, timing = [], []
    for step in range(1, STEPS + 1):
        row = {"step": step, "loss": 9.0, "loss/lm": float(step), "loss/mtp_1": 2.0 * step, "loss/balance": 1.0}
        if validate_every and step % validate_every == 0:
            row |= {f"validation/{name}": row[name] + 0.5 for name in ("loss", "loss/lm", "loss/mtp_1", "loss/balance")}
        rows.append(row)
        timing.append({"step": step, "time/tokens_per_second": 100.0})
    for name, lines in (("log.jsonl", rows), ("log.time.jsonl", timing)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_held_out_losses_stand_beside_those_of_training(tmp_path):
    log(tmp_path / "pretrain", validate_every=4)  # the last at step 28
    summary = summarise(tmp_path, {"pretrain": 1.0})
    figures = json.loads((tmp_path / "summary.json").read_text())["pretrain"]
    last = range(STEPS - TAIL + 1, STEPS + 1)
    assert figures["loss/lm"] == pytest.approx(sum(last) / TAIL)
    assert (figures["validation/loss/lm"], figures["validation/loss/mtp_1"]) == (28.5, 56.5)
    assert set(figures) == {
        *("loss/lm", "loss/mtp_1", "validation/loss/lm", "validation/loss/mtp_1", "tokens_per_second", "steps"),
    }
    assert "validation/loss/lm 28.5" in shown(summary)
    page = write(tmp_path, summary).read_text()
    assert "lm, held out <b>28.5</b>" in page
    assert "mtp_1, held out" in page
    assert "balance, held out" not in page


def test_without_validation_the_old_figures_stand_alone(tmp_path):
    log(tmp_path / "pretrain", validate_every=0)
    summary = summarise(tmp_path, {"pretrain": 1.0})
    assert set(summary["pretrain"]) == {"loss/lm", "loss/mtp_1", "tokens_per_second", "steps"}
    assert "held out" not in write(tmp_path, summary).read_text()
