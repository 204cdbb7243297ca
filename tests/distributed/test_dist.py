"""Collectives on gloo, and the launcher that every distributed test stands on."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmagent import dist
from mmagent.dist import World, run_ranks


def named_sum(world: World) -> list[dict[str, float]]:
    mine = {"both": 1.0 + world.rank, f"only_{world.rank}": torch.tensor(2.0)}
    return [world.sum(mine), world.sum({"both": 1.0}), world.sum({f"n{i}": 1.0 for i in range(400)})]


def test_sum_agrees_on_names_that_only_some_ranks_bring():
    for ragged, even, many in run_ranks(named_sum, 3):
        assert ragged == {"both": 6.0, "only_0": 2.0, "only_1": 2.0, "only_2": 2.0}
        assert even["both"] == 3.0  # names once known stay in the layout
        assert even["only_0"] == 0.0
        assert all(many[f"n{i}"] == 3.0 for i in range(400))


def count_collectives(world: World) -> list[int]:
    calls = 0
    reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    torch.distributed.all_reduce, torch.distributed.all_gather = counted(reduce), counted(gather)
    seen = []
    for names in (("a", "b"), ("a", "b"), ("a", f"only_{world.rank}"), ("a", f"only_{world.rank}")):
        calls = 0
        world.sum(dict.fromkeys(names, 1.0))
        seen.append(calls)
    return seen


def test_sum_is_one_collective_once_the_names_are_known():
    assert run_ranks(count_collectives, 2) == [[1, 1, 4, 1]] * 2


def objects(world: World) -> list[object]:
    return world.gather_objects({"rank": world.rank, "text": "x" * (10 ** (world.rank + 1))})


def test_gather_objects_keeps_rank_order_and_uneven_sizes():
    (first, second) = run_ranks(objects, 2)
    assert first == second == [{"rank": 0, "text": "x" * 10}, {"rank": 1, "text": "x" * 100}]


def laid_out(world: World) -> list[object]:
    mesh = world.mesh({"replicas": 2, "ep": 2})
    own = world.mesh({"replicas": 2, "ep": 2})["ep"]
    sums = []
    for name in ("replicas", "ep"):
        total = torch.tensor(10.0**world.rank)
        torch.distributed.all_reduce(total, group=mesh.get_group(name))
        sums.append(total.item())
    shared = world.with_context(2)
    return [sums, mesh["ep"] == own, shared.data_rank, shared.data_size, shared.mesh({"replicas": 2, "ep": 2}) is mesh]


def test_a_mesh_has_groups_of_neighbours_along_its_last_dimension():
    outcomes = run_ranks(laid_out, 4)
    assert [sums for sums, *_ in outcomes] == [[101.0, 11.0], [1010.0, 11.0], [101.0, 1100.0], [1010.0, 1100.0]]
    assert [rest for _, *rest in outcomes] == [[True, rank // 2, 2, True] for rank in range(4)]


def test_sizes_that_do_not_make_up_the_world_are_refused():
    world = World(0, 6, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="6 ranks cannot be laid out as 2 replicas x 4 ep"):
        world.mesh({"replicas": 2, "ep": 4})
    with pytest.raises(ValueError, match="6 ranks cannot form contexts of 4"):
        world.with_context(4)


def loses_a_peer(world: World) -> str:
    groups = replace(world, timeout=2.0).mesh({"replicas": 1, "ep": 2})
    if world.rank == 1:
        time.sleep(6)
        return "never came"
    try:
        torch.distributed.all_reduce(torch.ones(1), group=groups.get_group("ep"))
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_a_group_does_not_wait_for_ever():
    """Groups of a mesh keep the world's timeout; torch would give them its own, of half an hour."""
    assert "2000ms" in run_ranks(loses_a_peer, 2)[0]


def fails_on_one(world: World) -> None:
    if world.rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_run_ranks_raises_the_childs_error_and_stops_its_peers():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2(.|\n)*fails_on_one(.|\n)*the reason"):
        run_ranks(fails_on_one, 2, timeout=60)
    assert time.monotonic() - started < 50


def dies(world: World) -> None:
    if world.rank == 0:
        os._exit(9)
    dist.barrier()


def test_run_ranks_notices_a_killed_child():
    with pytest.raises(RuntimeError, match="rank"):
        run_ranks(dies, 2, timeout=60)


def hangs(world: World) -> None:
    time.sleep(60)


def test_run_ranks_never_hangs():
    with pytest.raises(TimeoutError, match=r"\[0, 1\]"):
        run_ranks(hangs, 2, timeout=3)


def order(world: World) -> list[float]:
    marks = []
    with dist.main_first():
        marks.append(time.monotonic())
        time.sleep(0.05)
    return marks


def test_main_first():
    (first,), (second,) = run_ranks(order, 2)
    assert second >= first + 0.05


def _leave(world: World, folder: str) -> list[str]:
    if world.rank:
        time.sleep(1.0)
        Path(folder, "last").touch()
    dist.shutdown()
    return [path.name for path in Path(folder).iterdir()] + [str(torch.distributed.is_initialized())]


def test_nobody_leaves_a_finished_run_before_the_last_is_there(tmp_path):
    assert run_ranks(_leave, 2, str(tmp_path)) == [["last", "False"]] * 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_who_leaves_waits_for_threads_that_have_something_to_do(monkeypatch):
    """Hashing, which needs the interpreter again only when it is done."""
    done: list[bytes] = []
    data = bytes(100_000_000)
    threading.Thread(target=lambda: done.append(hashlib.sha256(data).digest()), daemon=True).start()
    dist._let_threads_rest(limit=60.0)
    assert done
    monkeypatch.setattr(dist, "_busy_threads", lambda: 1)
    start = time.monotonic()
    dist._let_threads_rest(limit=0.05)
    assert 0.05 <= time.monotonic() - start < 30.0, "one that never rests keeps nobody"


def test_a_lone_process_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = dist.init(threads=torch.get_num_threads())
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.sum({"x": torch.tensor(2.0)}) == {"x": 2.0}
    assert world.gather_objects({"a": [1]}) == [{"a": [1]}]
    tensor = torch.ones(2)
    assert dist.all_reduce(tensor) is tensor
    assert dist.is_main()


def test_default_threads_share_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert dist.default_threads(2) == 4
    assert dist.default_threads(100) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert dist.default_threads(2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert dist.default_threads(2) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun's own default, not the user's word
    assert dist.default_threads(2) == 4
    assert dist.default_threads(1) == 1  # torchrun leaves one rank alone, so somebody said so


def test_seeds_repeat_and_differ_between_ranks():
    def draw(rank: int) -> tuple[float, float, float]:
        dist.seed_everything(7, rank)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(0) == draw(0)
    assert draw(1) == draw(1)
    assert len({draw(r) for r in range(4)}) == 4
    assert dist.rank_seed(7, 0) == 7


def test_stable_seeds_are_pinned():
    """Recorded runs played the episodes that these seeds drew."""
    assert dist.stable_seed(1, "item") == 1314686312930864011
    assert dist.stable_seed(1, "item") != dist.stable_seed("1", "item")
    assert 0 <= dist.stable_seed("x") < 2**63


ROWS = ((2, 0, 1), (0, 0, 3), (1, 0, 0))
"""What each rank sends to each; rank 1 gets nothing, and one rank gives another nothing."""


def traded(world: World, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    sends, receives = ROWS[world.rank], [row[world.rank] for row in ROWS]
    mine = (10.0 * world.rank + torch.arange(sum(sends), dtype=dtype))[:, None].expand(-1, 2).requires_grad_()
    got = dist.all_to_all(mine, sends, receives, torch.distributed.group.WORLD)
    (gradient,) = torch.autograd.grad((got * (1.0 + world.rank)).sum(), mine)
    return got.detach()[:, 1], gradient[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_to_their_ranks_and_gradients_come_back(dtype):
    """A row's gradient is what its receiver multiplies it by: 1 + that receiver's rank."""
    (one, one_gradient), (two, two_gradient), (three, three_gradient) = run_ranks(traded, 3, dtype)
    assert (one.tolist(), two.tolist(), three.tolist()) == ([0.0, 1.0, 20.0], [], [2.0, 10.0, 11.0, 12.0])
    assert one_gradient.tolist() == [1.0, 1.0, 3.0]
    assert two_gradient.tolist() == [3.0, 3.0, 3.0]
    assert three_gradient.tolist() == [1.0]


def missent(world: World) -> None:
    dist.all_to_all(torch.zeros(3, 1), (1, 1), (1, 1), torch.distributed.group.WORLD)


def test_rows_that_nobody_is_sent_are_an_error():
    with pytest.raises(RuntimeError, match="3 rows, but 2 to send"):
        run_ranks(missent, 2)
