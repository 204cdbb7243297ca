"""Weights from trainers' ranks to generators' ranks: whole and sharded, and what dies on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mmagent.agent.weight_sync import buckets_of, push
from mmagent.dist import World, run_ranks
from mmagent.generation.generator import Generator
from mmagent.generation.updates import Bucket, Buckets, WeightUpdate, buckets_of_state, receive, send, write_version
from mmagent.generation.weights import HalfWritten
from mmagent.models.agent_model import AgentModel
from mmagent.ops.tensor_files import WeightsError
from mmagent.trajectories import Limits
from tests.agent_kit import prompt, tiny_model, tiny_vocab

ROOT = Path(__file__).parents[2]
ASKED = prompt("click the word"), Limits(5, 1.0, seed=3)


def said(seed: int) -> tuple[int, ...]:
    return Generator(tiny_model(seed), tiny_vocab()).generate([ASKED])[0].ids


def sharded(seed: int, mesh: DeviceMesh) -> AgentModel:
    model = tiny_model(seed)
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def equals(model: AgentModel, seed: int) -> bool:
    state = tiny_model(seed).state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def trainers_and_generators(world: World, size: int) -> tuple[int, ...]:
    """Ranks 0 and 1 train, sharded; 2 and 3 generate. Twice, for a group is used for ever."""
    trainers = DeviceMesh("cpu", [0, 1])
    group = torch_dist.new_group([0, 2, 3])
    if world.rank < 2:
        model = sharded(1, trainers)
        push(model, 1, group, bucket_bytes=size)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        push(model, 2, group, bucket_bytes=size)
        return ()
    generator, out = Generator(tiny_model(0), tiny_vocab()), []
    for version in (1, 2):
        source = receive(0, group)
        with WeightUpdate(generator, source.manifest) as update:
            update.write_all(source)
        assert generator.version == version
        if version == 1:
            assert equals(generator.model, 1)
        out += generator.generate([ASKED])[0].ids
    return tuple(out)


@pytest.mark.parametrize("size", [1 << 14, 1 << 26])
def test_sharded_trainers_and_ranks_that_generate(size):
    _, _, one, other = run_ranks(trainers_and_generators, 4, size)
    assert one == other
    assert one[:5] == said(1)
    assert one[5:] != said(1)


def both_on_every_rank(world: World) -> tuple[int, ...]:
    model = sharded(1, world.mesh())
    generator = Generator(tiny_model(0), tiny_vocab())
    buckets = buckets_of(model, 1, 1 << 14)
    with WeightUpdate(generator, buckets.manifest) as update:
        update.write_all(buckets)
    assert equals(generator.model, 1)
    return generator.generate([ASKED])[0].ids


def test_every_rank_trains_a_part_and_generates_with_all():
    assert run_ranks(both_on_every_rank, 2) == [said(1)] * 2


class Unreadable(Buckets):
    def __iter__(self) -> Iterator[Bucket]:
        for bucket in super().__iter__():
            if bucket.index == 3:
                raise OSError("the disk is gone")
            yield bucket


def a_sender_that_cannot_read(world: World) -> str:
    if world.rank == 0:
        source = Unreadable(buckets_of(tiny_model(1), 1)._tensors.values(), 1, 1 << 12)
        with pytest.raises(OSError, match="the disk is gone"):
            send(source)
        send(buckets_of(tiny_model(2), 2))
        return ""
    generator, source = Generator(tiny_model(0), tiny_vocab()), receive(0)
    with (
        pytest.raises(WeightsError, match=r"rank 0 could not read version 1: it ended after 3 of \d+ buckets"),
        WeightUpdate(generator, source.manifest) as update,
    ):
        update.write_all(source)
    with pytest.raises(HalfWritten) as raised:
        generator.generate([ASKED])
    source = receive(0)
    with WeightUpdate(generator, source.manifest) as update:
        update.write_all(source)
    assert equals(generator.model, 2)
    return str(raised.value)


def test_a_sender_that_cannot_read_on_says_so_and_may_send_again():
    _, *others = run_ranks(a_sender_that_cannot_read, 3)
    assert all("version 1 is half-written: a version has to come whole (3 of" in text for text in others)


def a_receiver_that_cannot_use_it(world: World) -> bool:
    """Its peers must not wait for it, nor get each other's buckets."""
    if world.rank == 0:
        for seed in (1, 2):
            send(buckets_of(tiny_model(seed), seed, 1 << 12))
        return True
    generator = Generator(tiny_model(0), tiny_vocab())
    for version in (1, 2):
        source = receive(0)
        update = WeightUpdate(generator, source.manifest)
        update.begin()
        if (version, world.rank) == (1, 1):
            with torch.inference_mode():  # a weight that cannot be written
                update._targets["decoder.norm.weight"] = torch.zeros(3)
            with pytest.raises(RuntimeError):
                update.write_all(source)
            update.give_up()
        else:
            update.write_all(source)
            update.commit()
            assert equals(generator.model, version)
    return generator.writer is None


def test_a_receiver_that_fails_still_takes_part_to_the_end():
    assert run_ranks(a_receiver_that_cannot_use_it, 3) == [True] * 3


def test_a_sender_that_is_killed_leaves_a_closed_generator_at_once(tmp_path):
    write_version(tmp_path / "whole", buckets_of_state(tiny_model(2).state_dict(), 2))
    command = [sys.executable, "-m", "tests.distributed.send_me"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(tmp_path / "whole")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        out, err = ranks[1].communicate(timeout=90)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == -9
    told = json.loads(out.splitlines()[-1]) if out else pytest.fail(err)
    assert told["error"], "the update must have failed"
    assert told["waited"] < 30, "the group's timeout is 60 s, which is not what ended it"
    assert "version 1 is half-written: a version has to come whole" in told["closed"]
    assert tuple(told["ids"]) == said(2)
    assert told["versions"] == [2]
