"""The page about a run: every log that is there is shown, whatever is not is said, and its arithmetic is honest."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from markupsafe import Markup

from evals.report.maps import heat_map, stacked_area
from evals.report.training import TrainingRun, by_scale, last_tenth, mfu, scale_of, side_by_side
from mmagent.train.hooks import RunConfig, WatchConfig, usual_hooks
from mmagent.train.incidents import Finding, Incident, append_incident
from mmagent.train.loop import fit
from tests.engine_kit import toy_run
from tools.report import main, measured_peak, report


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 12 toy steps with all that watches it."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    toy = toy_run(folder)
    toy.objective.flops = lambda batch: 1e6 * batch.num_tokens
    config = RunConfig(save_every=5, watch=WatchConfig(interval=4, profile=[3, 1]))
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=12,
        hooks=usual_hooks(toy.run, "toy", 12, config, engine=toy.engine))  # fmt: skip
    return folder


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_run_is_told_whole(trained):
    page = report([TrainingRun(trained)])
    assert titles(page) == [
        "At a glance", "Learning", "Metrics", "Throughput", "Ranks", "Memory", "Checkpoints and validation",
        "Operations", "Environment and settings",
    ]  # fmt: skip
    for text in ("Loss by term", "Gradient norm by role", "Seconds by segment", "waiting for data", "aten::", "experts",
                 "Step 1 was the first of its process", "useful MFLOP/s",
                 "No MFU: the peak of this device", "One rank: nothing to compare"):  # fmt: skip
        assert text in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    assert "nan" not in re.sub(r"<style.*?</style>|<script.*?</script>", "", page, flags=re.S).lower()


def test_useful_operations_are_those_of_the_step_over_all_the_time_it_took(trained):
    run = TrainingRun(trained)
    for (step, rate), row in zip(mfu(run), run.rows, strict=True):
        assert step == row["step"]
        assert row["flops"] == 1e6 * row["tokens"]
        assert row["time/flops_per_second"] == pytest.approx(row["flops"] / row["time/step"])
        wall = row["time/wall"] if step > 1 else row["time/step"]
        assert wall >= row["time/step"], "what lies between two steps counts, too"
        assert rate == pytest.approx(row["flops"] / wall)
    assert run.peak(5e12) == 5e12  # one machine, whatever ranks it has
    start = run.starts[-1]
    start |= {"cuda": "13.0", "ranks": 8, "hosts": ["a"] * 4 + ["b"] * 4, "devices": ["NVIDIA H100 80GB HBM3"] * 8}
    assert run.peak() == 8 * 989e12
    assert run.peak(1e12) == 8e12
    start |= {"devices": ["Something new"] * 8}
    assert run.peak() == 0
    assert run.peak(1e12) == 8e12
    start |= {"cuda": "", "devices": ["Some processor"] * 8}
    assert run.peak(1e12) == 2e12  # two machines


def test_lines_share_a_chart_where_none_is_drawn_flat():
    falls = [(1, 9.9), (2, 3.0)]
    assert by_scale({"lm": falls, "router": [(1, 4.6), (2, 4.7)], "mtp": falls}) == [["lm", "mtp"], ["router"]]
    assert by_scale({"balance": [(1, 3.0), (2, 9.0)], "lm": falls}) == [["lm"], ["balance"]], "another unit"
    steep = [(n, 7.0 + 2 / n**2) for n in range(1, 101)]  # the first steps would make room for all
    assert by_scale({"lm": steep, "z": [(n, 4.0 + n % 2 / 10) for n in range(1, 101)]}) == [["lm"], ["z"]]
    late = {"lm": [(1, 7.6), (2, 7.5)], "balance": [(1, 4.6), (2, 4.7)], "mtp": [(1, 7.61), (2, 7.52)]}
    assert by_scale(late) == [["lm", "mtp"], ["balance"]]
    assert by_scale({"a": [(1, math.nan)], "b": [(1, 2.0)]}) == [["b"]]
    assert [scale_of(value) for value in (989e12, -4.7e9, 12.0)] == [(1e12, "T"), (1e9, "G"), (1.0, "")]


def test_every_chart_over_steps_marks_where_the_run_was_started_again(trained, tmp_path):
    for path in trained.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    start = json.loads((tmp_path / "environment.jsonl").read_text().splitlines()[0])
    with (tmp_path / "environment.jsonl").open("a") as file:
        file.write(json.dumps(start | {"step": 7}) + "\n")
    figures = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", report([TrainingRun(tmp_path)]), flags=re.S)
    unmarked = [title for title, body in figures if ">started again</text>" not in body]
    assert len(figures) > 8
    assert unmarked == []


def test_phases_restarts_and_gaps_are_told(tmp_path):
    """Lines torn by hand and deleted leave a gap, and curves that look whole."""
    phases = "phases:\n- name: adapter\n  steps: 3\n- name: all\n  steps: 9\n"
    (tmp_path / "config.yaml").write_text(phases)
    starts = [{"step": step, "started": "now", "command": ["x"], "hosts": ["a"], "devices": ["b"], "cuda": ""}
              for step in (0, 4, 6)]  # fmt: skip
    (tmp_path / "environment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
    rows = [
        {"step": step, "loss": 3.0 / step, "health/spike": 0.0, "quiet": float(step)} for step in (1, 2, 3, 6, 7, 9)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = TrainingRun(tmp_path)
    assert run.phases == {"phase all": 3.5, "started again": 4.5, "started again ": 6.5}
    assert run.gaps == ["log.jsonl has no rows for 3 of 9 steps: 4, 5, 8."]
    page = report([run])
    assert "no rows for 3 of 9 steps" in page
    assert "phase all" in page
    assert "Zero at every step: health/spike." in page


def test_two_runs_are_compared(trained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0, "loss/lm": 3.0}) + "\n")
    assert main([str(trained), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert titles(page)[:2] == ["At a glance", "Compared"]
    assert "toy: Learning" in titles(page)
    assert "other: Learning" in titles(page)


def test_runs_are_compared_over_the_steps_that_all_have(tmp_path):
    """40 steps beside 20: the longer one's later, lower losses count for nothing; losses as in the tiles."""
    for name, steps in (("long", 40), ("short", 20)):
        (tmp_path / name).mkdir()
        rows = [
            {"step": n, "loss": 100.0 - n, "grad_norm": float(n)} | ({} if n % 8 else {"validation/loss": 50.0 - n})
            for n in range(1, steps + 1)
        ]  # fmt: skip
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [TrainingRun(tmp_path / name) for name in ("long", "short")]
    figures, told = side_by_side(runs, ("loss", "validation/loss", "grad_norm"))
    assert figures == [{"loss": 80.5, "validation/loss": 34.0, "grad_norm": 11.0}] * 2
    assert told.startswith("over steps 1 to 20, which all runs have: ")
    assert "validation/loss at step 16" in told
    assert last_tenth(runs[1].rows, "loss") == 80.5, "that of the tile"
    page = report(runs)
    assert told in page
    curve = re.search(r"<figcaption>validation/loss</figcaption>(.*?)</figure>", page, flags=re.S)[1]
    assert "long <b>10</b>" in curve
    assert "short <b>34</b>" in curve
    assert 'class="raw' not in curve, "validations are few: none is smoothed"
    (tmp_path / "short" / "log.jsonl").write_text('{"step": 17, "loss": 1.0}\n')
    apart, told = side_by_side([runs[0], TrainingRun(tmp_path / "short")], ("loss", "validation/loss"))
    assert [own["loss"] for own in apart] == [83.0, 1.0]
    assert "never at the same step" in told
    (tmp_path / "short" / "log.jsonl").write_text('{"step": 90, "loss": 1.0}\n')
    assert side_by_side([runs[0], TrainingRun(tmp_path / "short")], ("loss",))[0] == [{}, {}]


def test_an_empty_folder_and_a_run_cut_short(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    page = report([TrainingRun(tmp_path / "empty")])
    assert "no step was logged yet" in page
    assert "log.jsonl (losses and figures)" in page
    short = tmp_path / "short"
    short.mkdir()
    rows = ({"step": step, "loss": loss, "loss/lm": loss, "patches": 9.0} for step, loss in ((1, 2.0), (2, math.nan)))
    (short / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    (short / "log.time.jsonl").write_text('{"step": 1, "time/step": 0.5, "time/patches_per_second": 18.0}\n')
    run = TrainingRun(short)
    assert run.unit == "patches"
    assert "not finite" in report([run])
    for wrong in ([str(tmp_path / "none")], [str(short), "--peak", "much"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "--peak much" in capsys.readouterr().err


def test_what_documents_are_called_cannot_change_the_page(trained):
    run = TrainingRun(trained)
    finding = Finding(0, 1, "lm is nan", ("<script>alert(1)</script>",))
    append_incident(trained / "incidents.jsonl", Incident(0, 6, 0, "spike", "<b>loss</b>", "skip", findings=(finding,)))
    run = TrainingRun(trained)
    page = report([run])
    assert "Incidents" in titles(page)
    assert "<script>alert" not in page
    assert "&lt;b&gt;loss" in page
    (trained / "incidents.jsonl").unlink()


def window(first: int, seconds: list[list[list[float]]], slow: list[dict]) -> dict:
    ranks, steps = len(seconds), [first + n for n in range(len(seconds[0]))]
    return {
        "step": steps[-1], "steps": steps, "names": ["backward", "device/forward", "forward", "reduce"],
        "hosts": ["a", "b", "c"][:ranks], "seconds": seconds, "probe": [1e-3] * ranks, "memory": [{"rss": 1e9}] * ranks,
        "slow": slow,
    }  # fmt: skip


def test_ranks_are_shown_over_the_median(tmp_path):
    """Rank 2 takes 30 ms where the others take 20: half as much again, full red in every cell of its line."""
    rows = [[0.010, 0.010, 9.0, 0.05], [0.010, 0.010, 9.0, 0.05]]
    late = [[0.010, 0.020, 9.0, 0.01], [0.010, 0.020, 9.0, 0.01]]
    slow = [{"rank": 2, "host": "c", "segment": "forward", "seconds": 0.03, "excess": 0.5}]
    with (tmp_path / "ranks.jsonl").open("w") as file:
        file.writelines(json.dumps(window(1 + 2 * n, [rows, rows, late], slow)) + "\n" for n in range(3))
    page = report([TrainingRun(tmp_path)])
    own = page[page.index("Own work: all") : page.index(">Forward<")]
    cells = re.findall(r'class="f(\d)" opacity="([\d.]+)".*?<title>(.*?)</title>', own)
    assert len(cells) == 3 * 6
    assert [depth for _, depth, _ in cells] == ["0.00"] * 12 + ["1.00"] * 6
    assert cells[-1] == ("4", "1.00", "rank 2 (c), step 6: 50.0 %")
    assert "who waits least" in page
    assert re.search(r"<td[^>]*>c</td>", page)


def test_a_map_is_averaged_where_steps_are_many_and_leaves_holes_open():
    rows = {"rank 0": [math.nan] * 500 + [0.2] * 500, "rank 1": [-0.1] * 1000}
    chart = heat_map(rows, list(range(1, 1001)), "t", full=0.4)
    cells = re.findall(r'class="f(\d)" opacity="([\d.]+)"', chart)
    assert 120 < len(cells) < 200
    assert cells.count(("4", "0.50")) == 56 + 1  # 500 steps in columns of 9, the first of them half empty
    assert cells.count(("0", "0.25")) == 112
    assert "no data" in heat_map({}, [], "t", full=1.0)


def test_areas_stand_on_each_other():
    chart = stacked_area({"a": [1.0, 1.0], "b": [3.0, 3.0], "none": [0.0, 0.0]}, [1, 2], "t", y_label="s")
    paths = re.findall(r'class="f(\d)" d="M([\d.]+) ([\d.]+)L[\d.]+ [\d.]+L[\d.]+ ([\d.]+)', chart)
    assert [int(colour) for colour, *_ in paths] == [0, 1]
    (_, _, top_a, bottom_a), (_, _, top_b, bottom_b) = paths
    assert float(bottom_b) == float(top_a)
    assert float(bottom_a) - float(top_a) == pytest.approx((float(bottom_b) - float(top_b)) / 3, abs=0.2)
    assert "75.0 %" in chart
    many = stacked_area({f"s{n}": [float(n), float(n)] for n in range(1, 12)}, [1, 2], "t")
    assert sorted(re.findall(r'<path class="f(\d)"', many)) == [str(n) for n in range(8)]  # one colour each
    assert "s1, s2, s3, s4" in many
    assert isinstance(stacked_area({"a": [1.0]}, [1], "t"), Markup)
    assert "no data" in stacked_area({}, [], "t")


def test_no_grid_line_crosses_an_area():
    chart = stacked_area({"a": [1.0, 1.0], "b": [3.0, 3.0]}, [1, 2], "t", phases={"again": 1.5})
    assert chart.rindex('class="grid"') < chart.index("<path")
    assert "opacity" not in chart
    assert ">again</text>" in chart


def test_memory_and_saving_fill_their_rows(trained):
    page = report([TrainingRun(trained)])
    for title in ("memory", "checkpoints-and-validation"):
        block = re.search(rf'<section id="{title}">(.*?)</section>', page, flags=re.S)[1]
        assert re.search(r'<div class="charts"><div.*?<table.*?<figure', block, flags=re.S)
        assert re.search(r'(</p>|</h2>)<div class="charts">', block), "nothing but the grid"
    assert "auto-fill" in page


def test_a_peak_can_be_measured():
    assert measured_peak(side=64, seconds=0.05) > 1e6
