"""What watches a run: which ranks are slow, profiles of operations, Weights & Biases, where it was started."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import random
import struct
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagent.dist import World
from mmagent.train import environment, launch
from mmagent.train.hooks import JsonlLog, RunConfig, WatchConfig, read_jsonl, usual_hooks
from mmagent.train.logs import WandbLog
from mmagent.train.loop import fit
from mmagent.train.profiling import OpTime, Profile, op_table, op_times
from mmagent.train.ranks import RankLog, SlowRanks, memory
from tests.engine_kit import toy_run

HOSTS = ["a", "b", "c", "d"]


def window(rng: random.Random, work: list[float], noise: float, steps: int = 10) -> list[list[dict[str, float]]]:
    """Forward and backward of every rank and step, each varying by ``noise`` (one sigma)."""
    return [
        [{name: share * seconds * (1 + rng.gauss(0, noise)) for name, share in (("forward", 0.3), ("backward", 0.7))}
         | {"reduce": 5.0, "optimizer": 1.0} for _ in range(steps)]
        for seconds in work
    ]  # fmt: skip


def test_a_rank_is_slow_when_it_stays_slow():
    rng, slow = random.Random(0), SlowRanks(over=0.1, patience=3)
    found = [slow(window(rng, [1.0, 1.0, 1.25, 1.0], 0.05), [1e-3] * 4, HOSTS) for _ in range(5)]
    assert found[:2] == [[], []]
    for (rank,) in found[2:]:
        assert (rank.rank, rank.host, rank.segment) == (2, "c", "backward")  # most of its time is there
        assert rank.excess == pytest.approx(0.25, abs=0.08)
        assert rank.seconds == pytest.approx(1.25, rel=0.08)
    assert slow.excess == found[-1][0].excess
    assert "rank 2 on c is slow: 1.2" in str(found[-1][0])
    assert slow(window(rng, [1.0] * 4, 0.05), [1e-3] * 4, HOSTS) == []  # mended


def test_of_two_ranks_one_can_be_slow_and_a_pause_is_not_slowness():
    rng, slow = random.Random(0), SlowRanks()
    for _ in range(3):
        found = slow(window(rng, [1.3, 1.0], 0.02), [1e-3] * 2, HOSTS)
    assert [rank.rank for rank in found] == [0]
    slow = SlowRanks()
    for _ in range(6):
        rows = window(rng, [1.0, 1.0], 0.02)
        for step in (1, 4, 7):
            rows[1][step]["forward"] += 30.0  # it saved something
        assert slow(rows, [1e-3] * 2, HOSTS) == []


def test_a_slow_device_is_seen_where_ranks_wait_for_each_other_everywhere():
    rng, slow = random.Random(0), SlowRanks()
    for n in range(6):
        found = slow(window(rng, [1.0] * 3, 0.0), [1e-3, 1.2e-3, 1e-3], HOSTS)
        assert bool(found) == (n == 5)  # a millisecond proves less than ten steps
    assert [(rank.rank, rank.segment) for rank in found] == [(1, "probe")]
    assert "1" in str(found[0])
    assert "a probe of its device" in str(found[0])


def named_in(runs: int, work: list[float], noise: float, probe: float) -> int:
    """How many of ``runs`` of 14 windows name anybody."""
    count = 0
    for seed in range(runs):
        rng, slow = random.Random(seed), SlowRanks()
        found = [
            slow(window(rng, work, noise), [1e-3 * (1 + abs(rng.gauss(0, probe))) for _ in work], ["h"] * len(work))
            for _ in range(14)
        ]
        count += any(found)
    return count


def test_noise_of_shared_processors_is_no_slow_rank():
    """Steps and probes that vary by 30 % and 20 %, as two ranks had on two cores that others used as well: of 400 runs
    one names a rank, and all of 100 in which one takes half as long again. Here are fewer, for time."""
    assert named_in(40, [1.0, 1.0], 0.3, 0.2) <= 1
    assert named_in(40, [1.0, 1.5], 0.3, 0.2) >= 38
    assert named_in(10, [1.0, 1.15, 1.0, 1.0], 0.03, 0.03) == 10  # where nothing disturbs, little is enough


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), ranks=st.integers(2, 16))
def test_ranks_that_vary_alike_are_not_named(seed, ranks):
    """Steps of a sigma of 10 %: the docstring says about one false name in a million windows of a rank; here are 2,500
    at most."""
    rng, slow = random.Random(seed), SlowRanks()
    hosts = ["h"] * ranks
    for _ in range(8):
        assert slow(window(rng, [1.0] * ranks, 0.1), [1e-3] * ranks, hosts) == []


def test_the_clock_of_the_device_counts_where_there_is_one():
    rng, slow = random.Random(0), SlowRanks()
    rows = window(rng, [1.0, 1.0], 0.0)
    for rank, seconds in enumerate((2.0, 3.0)):
        for row in rows[rank]:
            row |= {"device/forward": seconds, "device/data": 9.0}
    for _ in range(3):
        found = slow(rows, [1e-3] * 2, HOSTS)
    assert [(rank.rank, rank.segment) for rank in found] == [(1, "forward")]


def test_ranks_may_come_and_go():
    slow = SlowRanks()
    rng = random.Random(0)
    for ranks in (2, 2, 3, 3):
        assert slow(window(rng, [1.0] * (ranks - 1) + [2.0], 0.0), [1e-3] * ranks, HOSTS) == []
    assert slow(window(rng, [1.0, 1.0, 2.0], 0.0), [1e-3] * 3, HOSTS)
    for wrong in ({"over": 0.0}, {"patience": 0}):
        with pytest.raises(ValueError, match="over must be positive"):
            SlowRanks(**wrong)


def test_figures_of_the_machine_stay_out_of_the_log_that_resumes_bitwise(tmp_path):
    toy = toy_run(tmp_path)
    hooks = usual_hooks(toy.run, "toy", 12, RunConfig(save_every=5, watch=WatchConfig(4)), engine=toy.engine)
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=12, hooks=hooks)
    log, timing = read_jsonl(tmp_path / "log.jsonl"), read_jsonl(tmp_path / "log.time.jsonl")
    assert {"grad_norm/experts", "grad_norm/trunk"} <= set(log[0])
    for row in log:
        assert not [name for name in row if name.startswith(("time/", "memory/"))]
        assert math.hypot(row["grad_norm/experts"], row["grad_norm/trunk"]) == pytest.approx(row["grad_norm"])
    for row in timing:
        assert 0 < row["time/data_share"] < 1
        assert row["time/segment/forward"] > 0
    assert [row["step"] for row in timing if "memory/rss" in row] == [4, 8, 12]
    sizes = timing[3]
    parameters = {"experts": 3 * 6 * 3 * 4, "trunk": (9 * 6 + 9) * 4}
    for role, size in parameters.items():
        assert sizes[f"memory/parameters/{role}"] == sizes[f"memory/gradients/{role}"] == size
        assert sizes[f"memory/optimizer/{role}"] >= size
    assert sizes["memory/peak"] > 1e7
    (start,) = read_jsonl(tmp_path / "environment.jsonl")
    assert (start["step"], start["ranks"], start["torch"]) == (0, 1, torch.__version__)
    assert start["devices"][0]
    assert timing[0]["time/first_step"] > 0
    assert "time/first_step" not in timing[1]


def test_the_first_step_is_timed_from_the_process_and_from_the_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "process_start", lambda: 100.0)
    monkeypatch.setattr(launch, "launched", 104.0)
    monkeypatch.setattr(environment.time, "time", lambda: 109.0)
    record: dict[str, float] = {}
    environment.EnvironmentLog(toy_run(tmp_path).run)(1, record)
    assert record == {"time/first_step": 9.0, "time/first_step_after_imports": 5.0}


def test_the_process_began_before_now_and_after_the_machine():
    assert 0 < time.time() - environment.process_start() < 24 * 3600
    assert environment.device_name(torch.device("cpu"))


def test_memory_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    sizes = memory(torch.device("cuda"))
    assert (sizes["device"], sizes["device_peak"]) == (5, 7)


def test_watching_costs_few_collectives(tmp_path, monkeypatch):
    """Bounds on what ranks must wait for, which no busy machine blurs: beside saving, one gather a window."""
    toy = toy_run(tmp_path)
    calls: list[str] = []
    gather, total = World.gather_objects, World.sum
    monkeypatch.setattr(World, "gather_objects", lambda self, value: calls.append("gather") or gather(self, value))
    monkeypatch.setattr(World, "sum", lambda self, *a, **k: calls.append("sum") or total(self, *a, **k))
    hooks = usual_hooks(toy.run, "toy", 100, RunConfig(save_every=1000), engine=toy.engine)
    toy.run.saved_step = 0
    record = {"loss": 1.0, "time/step": 1.0, "time/tokens_per_second": 1.0}
    for step in range(1, 91):
        for hook in hooks:
            hook(step, dict(record))
    assert calls.count("gather") == 1 + 9  # where it was started, and nine windows
    assert calls.count("sum") == 90  # whether any rank was asked to stop


# ---------------------------------------------------------------------------------------------- profiles


def test_a_profile_of_chosen_steps(tmp_path):
    toy = toy_run(tmp_path)
    seen = []
    hooks = [Profile(toy.run, 3, 2), lambda step, record: seen.append(toy.run.segments.annotate)]
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=6, hooks=hooks)
    assert seen == [False, True, True, False, False, False]
    folder = tmp_path / "profile"
    trace = json.loads(gzip.decompress((folder / "steps-3-4.trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("segment/optimizer") >= 2
    table = (folder / "steps-3-4.txt").read_text()
    assert "aten::addmm" in table
    rows = json.loads((folder / "steps-3-4.json").read_text())
    ops = {(op["segment"], op["op"]): op for op in rows["ops"]}
    assert rows["steps"] == 2
    assert ops["forward", "aten::addmm"]["calls"] == 2 * 2  # steps, micro-batches
    assert ("backward", "aten::addmm") not in ops
    assert any(segment == "backward" and name == "aten::bmm" for segment, name in ops)
    assert not list(folder.glob("*.json.tmp")) + list(folder.glob("*.trace.json"))


def test_a_run_that_starts_amid_the_steps_profiles_the_rest(tmp_path):
    toy = toy_run(tmp_path)
    hook = Profile(toy.run, 3, 4)
    for step in (4, 5, 6, 7):
        hook(step, {})
    assert (tmp_path / "profile" / "steps-5-6.txt").exists()
    late = Profile(toy.run, 3, 4)
    late(6, {})
    assert not toy.run.segments.annotate
    for start, count in ((1, 1), (5, 0)):
        with pytest.raises(ValueError, match=r"watch\.profile"):
            Profile(toy.run, start, count)


class Event:
    """What a profiler says of one call."""

    def __init__(self, name, start, end, own=0.0):
        self.name, self.time_range = name, types.SimpleNamespace(start=start, end=end)
        self.self_cpu_time_total, self.self_device_time_total = own, 2 * own
        self.device_type = torch.autograd.DeviceType.CPU


def test_operations_belong_to_the_innermost_segment():
    events = [
        Event("segment/reduce", 0, 100),
        Event("segment/forward", 10, 20),
        Event("segment/forward", 20, 30),
        Event("a", 5, 6, 1e6),
        Event("a", 12, 13, 1e6),
        Event("a", 20, 21, 1e6),
        Event("b", 40, 41, 3e6),
        Event("b", 101, 102, 5e6),
    ]
    assert op_times(events) == [
        OpTime("other", "b", 1, 5.0, 10.0),
        OpTime("reduce", "b", 1, 3.0, 6.0),
        OpTime("forward", "a", 2, 2.0, 4.0),
        OpTime("reduce", "a", 1, 1.0, 2.0),
    ]
    table = op_table(op_times(events), steps=2, top=2)
    assert "self time on the device" in table
    assert len(table.splitlines()) == 3 + 3 + 2 + 2
    assert "other             5000.00   45.5%" in table


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"interval": -1}, "interval"),
        ({"slow": 0.0}, "slow"),
        ({"garbage": -1}, "garbage"),
        ({"profile": [3]}, "profile"),
    ],
)
def test_settings_are_checked(wrong, says):
    with pytest.raises(ValueError, match=says):
        WatchConfig(**wrong)


def test_watching_can_be_turned_off(tmp_path):
    toy = toy_run(tmp_path)
    hooks = usual_hooks(toy.run, "toy", 3, RunConfig(watch=WatchConfig(interval=0, garbage=0)))
    assert not [hook for hook in hooks if isinstance(hook, RankLog)]
    assert [hook for hook in hooks if isinstance(hook, JsonlLog)]


class FakeRun:
    """As the package's own: drops what is sent for an earlier step of its count, and says nothing."""

    def __init__(self):
        self.count, self.kept, self.axes, self.finished = 0, [], {}, 0

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, record, step=None):
        step = self.count if step is None else step
        if step >= self.count:
            self.count = step + 1
            self.kept.append((record["step"], record["loss"]))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_what_is_done_again(tmp_path, monkeypatch):
    """Also where a run went back, or was killed after steps that its checkpoint does not know."""
    run, asked = FakeRun(), []
    fake = types.ModuleType("wandb")
    fake.init = lambda **how: asked.append(how) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake)
    for steps in ((1, 2, 3, 2, 3), (3, 4)):
        log = WandbLog(tmp_path, "project", "rl", 4, "seed: 1")
        for step in steps:
            log(step, {"loss": float(step)})
    assert asked[0]["id"] == asked[1]["id"]
    assert all(how["project"] == "project" and how["resume"] == "allow" for how in asked)
    assert run.kept == [(step, float(step)) for step in (1, 2, 3, 2, 3, 3, 4)]
    assert run.axes == {"step": None, "*": "step"}
    assert run.finished == 1


def test_weights_and_biases_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .mmagent\[wandb\]"):
        WandbLog(tmp_path, "project", "rl", 4)


@pytest.mark.slow
def test_weights_and_biases_without_a_network(tmp_path, monkeypatch):
    """The package itself, offline: twenty seconds, most of them its own process starting and ending."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = WandbLog(tmp_path, "project", "rl", 3)
    for step in (1, 2, 1, 2, 3):
        log(step, {"loss": float(step)})
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] in file.name
    assert kept_by_wandb(file) == [1, 2, 1, 2, 3]


def kept_by_wandb(path) -> list[int]:
    """The figure ``step`` of every row in the package's own file."""
    from wandb.proto import wandb_internal_pb2

    data, at, records, steps = path.read_bytes(), 7, [], []
    while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB, pieces of a record with checksum, length and kind
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        piece = data[at + 7 : at + 7 + length]
        records = [*records, piece] if kind in (1, 2) else [*records[:-1], records[-1] + piece]
        at += 7 + length
    for one in records:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(one)
        for item in record.history.item:
            if (item.key or "/".join(item.nested_key)) == "step":
                steps.append(int(json.loads(item.value_json)))
    return steps
