"""Episodes that ended before a kill: taken bit for bit, never played again, never from another policy."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
import torch

from mmagent.agent import inflight
from mmagent.agent.codec import Codec
from mmagent.agent.collector import Collected, Collector, CollectorConfig
from mmagent.agent.inflight import InFlight, _records
from mmagent.agent.rollout import RolloutConfig
from mmagent.chat import Tool
from mmagent.dist import World
from mmagent.trajectories import Trajectory
from mmagent.vocab import Vocab
from tests.agent_kit import GEOMETRY, tiny_vocab
from tests.toy_tasks import EchoTask, ScriptedPolicy, last_request
from tests.unit.agent.test_batching import group

ABOUT = {"collection": 3, "seed": 7}
ALONE = World(0, 1, 0, torch.device("cpu"))


class Somebody:
    """A policy that says who it is."""

    def __init__(self, name: str = "a", steady: bool = True):
        self.name, self.steady = name, steady

    def identity(self) -> str:
        return self.name


def rows() -> list[Trajectory]:
    groups = [group("a", (1.0, 0.0), routed=True), group("b", (0.25, 0.0, 1.0), image_seed=2)]
    return [row for g in groups for row in g.trajectories]


def fill(folder: Path, what: list[Trajectory], world: World = ALONE, version: int = 3) -> list[int]:
    """Keep them; the file's length before the first, and after each."""
    kept = InFlight(folder, world, Somebody())
    kept.begin(version, ABOUT)
    (file,) = folder.glob(f"{version:08d}/rank-{world.rank:05d}-of-{world.size:05d}.episodes")
    lengths = []
    for row in what:
        asyncio.run(kept.keep(row))
        lengths.append(file.stat().st_size)
    kept.end()
    return [next(end for _, _, end in _records(file)), *lengths]


def known(folder: Path, name: str = "a", world: World = ALONE, **other) -> dict[str, Trajectory]:
    kept = InFlight(folder, world, Somebody(name))
    found = kept.begin(3, {**ABOUT, **other})
    kept.end()
    return found


def equal(one: Trajectory, other: Trajectory) -> bool:
    names = ("key", "source", "group", "policy_version", "input_ids", "trainable", "logprobs", "reward", "parts")
    names += ("status", "note")
    alike = all(getattr(one, name) == getattr(other, name) for name in names)
    images = zip(one.images, other.images, strict=True)
    experts = zip(one.routed_experts, other.routed_experts, strict=True)
    return (
        alike
        and all(a.grid == b.grid and a.view == b.view and torch.equal(a.patches, b.patches) for a, b in images)
        and all(torch.equal(a, b) for a, b in experts)
    )


def test_what_was_kept_comes_back_with_images_shared_by_content(tmp_path):
    played = rows()
    lengths = fill(tmp_path, played)
    back = known(tmp_path)
    assert list(back) == [row.key for row in played]
    assert all(equal(row, back[row.key]) for row in played)
    assert back[played[0].key].images[0] is back[played[1].key].images[0]
    first, second = lengths[1] - lengths[0], lengths[2] - lengths[1]
    assert second < first - played[0].images[0].patches.nbytes / 2  # an image lies in the file once


def test_a_torn_end_is_dropped_wherever_it_is_torn_and_written_anew(tmp_path):
    played = rows()
    lengths = fill(tmp_path, played)
    (file,) = tmp_path.glob("*/*.episodes")
    whole = file.read_bytes()
    for count, start, end in zip(range(len(played)), lengths, lengths[1:], strict=False):
        for cut in {start + 1, start + 8, start + 20, (start + end) // 2, end - 1}:
            file.write_bytes(whole[:cut])
            assert list(known(tmp_path)) == [row.key for row in played[:count]], cut
            assert file.stat().st_size == start
    file.write_bytes(whole[: lengths[3] - 1])
    kept = InFlight(tmp_path, ALONE, Somebody())
    kept.begin(3, ABOUT)
    for row in played[2:]:
        asyncio.run(kept.keep(row))
    back = known(tmp_path)
    assert list(back) == [row.key for row in played]
    assert all(equal(row, back[row.key]) for row in played)


def test_a_changed_byte_ends_what_is_believed(tmp_path):
    played = rows()
    lengths = fill(tmp_path, played)
    (file,) = tmp_path.glob("*/*.episodes")
    raw = bytearray(file.read_bytes())
    raw[(lengths[1] + lengths[2]) // 2] ^= 1
    file.write_bytes(raw)
    assert list(known(tmp_path)) == [played[0].key]


def test_nothing_is_taken_from_other_weights_seeds_or_limits(tmp_path, caplog):
    for strange in ({"name": "b"}, {"seed": 8}, {"collection": 4}, {"limits": 9}):
        fill(tmp_path, rows())
        assert known(tmp_path, **strange) == {}
        assert "other settings: not taken" in caplog.text
        assert known(tmp_path) == {}  # it was begun anew
        caplog.clear()


def test_another_number_of_ranks_finds_what_all_had_played(tmp_path):
    played = rows()
    two = [World(rank, 2, rank, torch.device("cpu")) for rank in range(2)]
    fill(tmp_path, played[:2], two[0])
    fill(tmp_path, played[2:], two[1])
    assert set(known(tmp_path)) == {row.key for row in played}
    assert list(known(tmp_path, world=two[1])) == [row.key for row in played[2:]]


def test_what_a_checkpoint_holds_is_removed(tmp_path):
    for version in (1, 2, 3):
        fill(tmp_path, rows()[:1], version=version)
    kept = InFlight(tmp_path, ALONE, Somebody())
    kept.drop(3)
    kept.drop(3)
    assert [folder.name for folder in tmp_path.iterdir()] == ["00000003"]


def test_what_lies_behind_where_a_run_went_back_to_is_removed(tmp_path):
    for version in (1, 2, 3):
        fill(tmp_path, rows()[:1], version=version)
    InFlight(tmp_path, ALONE, Somebody()).drop_after(2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_room_is_made_from_the_oldest_on_and_all_of_it_before_the_last_try(tmp_path):
    for version in (1, 2, 3):
        fill(tmp_path, rows()[:1], version=version)
    kept = InFlight(tmp_path, ALONE, Somebody())
    kept.make_room(tries=2)
    assert [folder.name for folder in tmp_path.iterdir()] == ["00000003"]
    kept.make_room(tries=1)
    assert not list(tmp_path.iterdir())


def test_every_folder_that_got_a_name_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(inflight, "sync", synced.append)
    InFlight(tmp_path / "rollouts", ALONE, Somebody()).begin(3, ABOUT)
    assert {tmp_path, tmp_path / "rollouts", tmp_path / "rollouts" / "00000003"} <= set(synced)


def test_the_event_loop_goes_on_while_a_record_is_written_and_nothing_is_closed_under_it(tmp_path, monkeypatch):
    """A collection is left while a record is synced: that must end on the file it began with."""
    syncing, free, real, problems = threading.Event(), threading.Event(), os.fsync, []

    def slow(descriptor: int) -> None:
        syncing.set()
        assert free.wait(10)
        try:
            real(descriptor)
        except OSError as error:
            problems.append(error)

    async def leave(kept: InFlight) -> None:
        keeping = [asyncio.create_task(kept.keep(row)) for row in rows()[:2]]
        while not syncing.is_set():  # for ever if the loop stood
            await asyncio.sleep(0.001)
        for task in keeping:
            task.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
        threading.Timer(0.05, free.set).start()
        kept.end()

    kept = InFlight(tmp_path, ALONE, Somebody())
    kept.begin(3, ABOUT)
    monkeypatch.setattr(os, "fsync", slow)
    asyncio.run(leave(kept))
    assert free.is_set()  # it was waited for
    assert not problems
    monkeypatch.undo()
    assert list(known(tmp_path)) == [rows()[0].key]


def test_a_full_disk_and_a_limit_are_told_and_cost_nothing_but_a_replay(tmp_path, caplog, monkeypatch):
    played = rows()
    kept = InFlight(tmp_path / "limit", ALONE, Somebody(), limit=5e4)
    kept.begin(3, ABOUT)
    for row in played:
        asyncio.run(kept.keep(row))
    assert "fill the 5e-05 GB of kept_gb" in caplog.text
    assert len(known(tmp_path / "limit")) < len(played)
    kept = InFlight(tmp_path / "disk", ALONE, Somebody())
    kept.begin(3, ABOUT)
    asyncio.run(kept.keep(played[0]))

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(bytes(data)[:10])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(kept, "_file", Full(kept._file))
    for row in played[1:]:
        asyncio.run(kept.keep(row))
    assert caplog.text.count("No space left") == 1
    assert list(known(tmp_path / "disk")) == [played[0].key]


def test_who_plays_is_found_out_while_episodes_are_played(tmp_path):
    """All weights are read for it: only where there may be something to take does the collection wait."""
    free = threading.Event()

    class Large(Somebody):
        def identity(self) -> str:
            assert free.wait(10)
            return super().identity()

    kept = InFlight(tmp_path, ALONE, Large())
    assert kept.begin(3, ABOUT) == {}  # at once
    threading.Timer(0.05, free.set).start()
    asyncio.run(keep_all(kept, rows()))
    kept.end()
    assert list(known(tmp_path)) == [row.key for row in rows()]


async def keep_all(kept: InFlight, what: list[Trajectory]) -> None:
    await asyncio.gather(*map(kept.keep, what))


def test_the_limit_is_that_of_all_ranks_and_collections_and_is_told_once(tmp_path, caplog):
    played = rows()
    whole = fill(tmp_path / "free", played)[-1]
    limit = 3.5 * whole
    ranks = [InFlight(tmp_path / "run", World(n, 2, n, torch.device("cpu")), Somebody(), limit) for n in range(2)]

    def collect(version: int) -> None:
        for rank in ranks:
            rank.begin(version, ABOUT)
        for row in played:
            for rank in ranks:
                asyncio.run(rank.keep(row))
        for rank in ranks:
            rank.end()

    def used() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "run").glob("*/*"))

    collect(1)
    assert used() == 2 * whole
    assert not caplog.text
    for version in (2, 3, 4):
        collect(version)
        assert 2 * whole < used() <= limit
    assert caplog.text.count("kept_gb") == 2  # of two ranks
    for rank in ranks:
        rank.drop(5)  # a checkpoint has landed
    collect(5)
    assert used() == 2 * whole


class Scripted(ScriptedPolicy):
    """Right for half of a group, by key alone; dies, or is asked to leave, when it has spoken ``lives`` times."""

    def __init__(self, lives: int = 1 << 30, steady: bool = True, dies: bool = True):
        super().__init__(tiny_vocab(), None)
        self.lives, self.steady, self.dies, self.spoken = lives, steady, dies, []

    def identity(self) -> str:
        return "scripted"

    async def complete(self, prompt, limits):
        if self.dies and len(self.spoken) >= self.lives:
            raise KeyboardInterrupt
        self.spoken.append(prompt.key)
        while len(self.spoken) > self.lives:
            await asyncio.sleep(0.01)
        good = int(prompt.key.rsplit("#", 1)[1]) % 2
        self.script = lambda text, turn: last_request(text) if good else "zz"
        return await super().complete(prompt, limits)


def collector(policy: Scripted, folder: Path, lockstep: bool = False) -> Collector:
    rollout = RolloutConfig(group_size=4, lockstep=lockstep, concurrency=3)
    config = CollectorConfig(prompts=3, rollout=rollout)
    codec = Codec(tiny_vocab(), GEOMETRY)
    return Collector([EchoTask(steps=1)], policy, codec, config, ALONE, 5, folder)


def told(got: Collected) -> list[tuple]:
    return [(t.key, t.input_ids, t.logprobs, t.reward) for t in got.trajectories]


def test_a_collection_that_dies_goes_on_with_what_is_missing(tmp_path):
    whole = Scripted()
    expected = told(asyncio.run(collector(whole, tmp_path / "whole").collect()))
    spoken: list[str] = []
    for lives in (4, 3):
        policy = Scripted(lives)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(collector(policy, tmp_path / "parts").collect())
        spoken += policy.spoken
    last = Scripted()
    assert told(asyncio.run(collector(last, tmp_path / "parts").collect())) == expected
    assert len(whole.spoken) == 12
    # at most the three that were open at each death are played again
    assert len(whole.spoken) <= len(spoken) + len(last.spoken) <= len(whole.spoken) + 2 * 3
    assert len(last.spoken) < len(whole.spoken)


def test_asked_to_leave_it_stops_at_once_and_stands_where_it_stood(tmp_path):
    expected = told(asyncio.run(collector(Scripted(), tmp_path / "whole").collect()))
    policy = Scripted(lives=5, dies=False)
    target = collector(policy, tmp_path / "parts")
    before = target.state_dict()
    got = asyncio.run(target.collect(asked=lambda: len(policy.spoken) > 5))
    assert got.left
    assert got.trajectories == got.groups == ()
    assert target.state_dict() == before
    target.policy = last = Scripted()
    assert told(asyncio.run(target.collect())) == expected
    assert 12 - 5 <= len(last.spoken) < 12


def test_nothing_is_taken_that_was_said_in_another_vocabulary_or_with_other_tools(tmp_path):
    def spoken(codec: Codec) -> int:
        target = collector(policy := Scripted(), tmp_path)
        target.codec = codec
        asyncio.run(target.collect())
        return len(policy.spoken)

    one, other = tiny_vocab(), Vocab(tiny_vocab().definition + " ")
    tools = [Tool('{"name": "look"}')]
    assert spoken(Codec(one, GEOMETRY)) == 12
    assert spoken(Codec(one, GEOMETRY)) == 0
    assert spoken(Codec(one, GEOMETRY, tools=tools)) == 12
    assert spoken(Codec(other, GEOMETRY, tools=tools)) == 12


def test_lockstep_keeps_nothing_where_company_changes_numbers(tmp_path):
    asyncio.run(collector(Scripted(steady=False), tmp_path / "a", lockstep=True).collect())
    assert not (tmp_path / "a").exists()
    for n, (lockstep, steady) in enumerate([(False, False), (False, True), (True, True)]):
        asyncio.run(collector(Scripted(steady=steady), tmp_path / str(n), lockstep).collect())
        assert (tmp_path / str(n)).exists()
