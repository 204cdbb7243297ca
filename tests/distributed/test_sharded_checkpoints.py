"""What ranks write together: every element once, readable under any sharding, and failures that all of them hear of."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from mmagent import dist
from mmagent.dist import World, run_ranks
from mmagent.engine import checkpoint, saving
from mmagent.engine.checkpoint import CheckpointError
from mmagent.engine.pieces import PieceFiles, put_tensors, shard_of
from mmagent.engine.saving import Contents, Saver, SavingConfig
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.train.run import Run
from mmagent.train.step import train_step
from tests.engine_kit import ALONE, toy_run
from tests.expert_kit import FOUR, Case, build_model, engine_of

# uneven, more ranks than rows, a scalar, and one large enough to be read by one replica and handed to the others
SHAPES = ((7, 5), (4, 6, 3), (3,), (), (6, 2, 50_000))
LAYOUTS = ("plain", "rows", "columns", "replicas", "both", "twice", "groups")


def whole(n: int) -> Tensor:
    shape = SHAPES[n]
    dtype = (torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.bfloat16)[n]
    values = torch.arange(torch.Size(shape).numel())
    return (values % 251 if dtype == torch.bfloat16 else values).view(shape).to(dtype)


def laid_out(world: World, layout: str) -> dict[str, Tensor]:
    """The same tensors, distributed over four ranks in one of seven ways."""
    line, grid = world.mesh({"dp": 4}), world.mesh({"replicas": 2, "shards": 2})
    mesh, placements = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(-1)]),
        "replicas": (grid, [Replicate(), Shard(0)]),
        "both": (grid, [Shard(-1), Shard(0)]),
        "twice": (grid, [Shard(0), Shard(0)]),
        "groups": (grid["shards"], [Shard(0)]),  # as experts under DDP: the mesh does not hold all ranks
    }.get(layout, (None, []))
    tensors = {str(n): whole(n) for n in range(len(SHAPES))}
    if mesh is None:
        return tensors
    return {name: _distribute(tensor, mesh, placements) for name, tensor in tensors.items()}


def _distribute(tensor: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    if not tensor.ndim:
        return tensor
    placements = [Shard(p.dim % tensor.ndim) if isinstance(p, Shard) else p for p in placements]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def save_and_load(world: World, folder: str) -> list[str]:
    """Save in every layout, and read each in every layout; what went wrong."""
    wrong = []
    for saved in LAYOUTS:
        root = Path(folder) / saved
        if world.is_main:
            root.mkdir()
        dist.barrier()
        saver = Saver(root, world)
        saver.save(1, Contents({}, {"part": laid_out(world, saved)}, {"own": {"rank": world.rank}}, {}))
        assert saver.settle()
        path, _ = checkpoint.latest(root, world)
        assert path is not None
        manifest = checkpoint.verify(path)
        stored = checkpoint.tensors_of(path, manifest, "part")
        state = checkpoint.read_state(path / "shared.pt")["part"]
        for asked in LAYOUTS:
            for name, like in laid_out(world, asked).items():
                found = shard_of(put_tensors(state, stored)[name], like)
                if type(found) is not type(like) or found.dtype != like.dtype or found.shape != like.shape:
                    wrong.append(f"{saved} to {asked}: {name} is {found}")
                elif not torch.equal(_local(found), _local(like)):
                    wrong.append(f"{saved} to {asked}: {name} differs")
        written = sum(_elements(path / name) for name in manifest["parts"]["part"])
        wanted = sum(whole(n).numel() for n in range(len(SHAPES)))
        if written != wanted:
            wrong.append(f"{saved}: {written} elements were written, not {wanted}")
    return wrong


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _elements(file: Path) -> int:
    return sum(torch.Size(piece.shape).numel() for tensor in PieceFiles([file]).values() for piece in tensor.lying)


def test_every_layout_is_read_in_every_layout_and_written_once(tmp_path):
    """Seven ways to distribute five tensors over four ranks, saved in each and loaded in each, to the bit."""
    assert run_ranks(save_and_load, 4, str(tmp_path)) == [[]] * 4
    files = sorted(path.name for path in (tmp_path / "replicas" / "step-00000001").iterdir())
    parts = [name for name in files if name.startswith("part")]
    assert parts == ["part-00000.safetensors", "part-00001.safetensors"]  # the second replica writes nothing
    assert (tmp_path / "plain" / "step-00000001" / "part.safetensors").is_file()
    alone = checkpoint.read_weights(tmp_path / "both" / "step-00000001" / "part.safetensors")  # pieces, by one name
    assert all(torch.equal(alone[str(n)], whole(n)) for n in range(len(SHAPES)))


# ---------------------------------------------------------------------------------------------- runs


def model_run(folder: str, world: World, parallel: str) -> Run:
    """A run without a stream, whose model and optimizer have moved away from where they start."""
    toy = toy_run(Path(folder), world, parallel, dropout=0.0)
    batches = [next(toy.stream) for _ in range(2)]
    for micro_batches in batches:
        for n, batch in enumerate(micro_batches):
            with toy.engine.micro_step(last=n == 1):
                toy.engine.backward(sum(toy.engine.forward(batch).sums.values()))
        toy.engine.step()
    return Run(folder, world, {"model": toy.objective, "engine": toy.engine})


@dataclass
class Held:
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]


def held(run: Run) -> Held:
    """In full tensors, on rank 0."""
    engine = run.parts["engine"]
    weights = checkpoint.gather_weights(run.parts["model"])
    return Held({n: t.clone() for n, t in weights.items()}, engine.state_dict()["optimizer"])


def save_runs(world: World, folder: str, engines: list[str]) -> list[Held]:
    found = []
    for parallel in engines:
        run = model_run(f"{folder}/{world.size}-{parallel}", world, parallel)
        run.finish(2)
        found.append(held(run))
    return found


def load_runs(world: World, folder: str, engines: list[str]) -> dict[str, list[Held]]:
    """All saved runs under each of the engines."""
    found: dict[str, list[Held]] = {}
    for name in sorted(path.name for path in Path(folder).iterdir()):
        for parallel in engines:
            run = model_run(f"{folder}/{name}", world, parallel)
            with torch.no_grad():
                for parameter in run.parts["model"].parameters():
                    parameter.add_(0.5)  # nothing that was not loaded can look as if it had been
            assert run.resume() == 2
            found.setdefault(name, []).append(held(run))
    return found


def test_model_and_optimizer_go_to_any_number_of_ranks_and_any_engine(tmp_path):
    """The same tensors, not tensors alike."""
    folder, both = str(tmp_path), ["ddp", "fsdp2"]
    saved = dict(zip(("2-ddp", "2-fsdp2"), run_ranks(save_runs, 2, folder, both)[0], strict=True))
    saved["4-fsdp2"] = run_ranks(save_runs, 4, folder, ["fsdp2"])[0][0]
    saved["1-none"] = save_runs(ALONE, folder, ["none"])[0]
    for others in (
        load_runs(ALONE, folder, ["none"]),
        run_ranks(load_runs, 2, folder, both)[0],
        run_ranks(load_runs, 4, folder, ["fsdp2"])[0],
    ):
        assert others.keys() == saved.keys()
        for name, mine in saved.items():
            for other in others[name]:
                same(mine, other)


EXPERTS = {
    "ddp": Case("ddp", split=FOUR, optimizer="muon"),  # replicas of experts lie outside of their mesh
    "fsdp2": Case("fsdp2", split=FOUR, optimizer="muon"),
    "few": Case("fsdp2", total=6, split=FOUR, optimizer="muon"),  # three experts for two replicas: cut through
}


def expert_run(world: World, folder: str, name: str) -> Run:
    case = EXPERTS[name] if world.size > 1 else replace(EXPERTS[name], parallel="none", experts=1)
    objective = LanguageModeling(build_model(case), LanguageModelingConfig(bias_rate=0.01))
    engine = engine_of(case, objective, objective.model, world)
    return Run(f"{folder}/{name}", world, {"model": objective, "engine": engine})


def save_and_load_experts(world: World, folder: str) -> dict[str, Held]:
    """A step, saved, and loaded into weights that have moved away; what ranks then hold."""
    found = {}
    for name, case in EXPERTS.items():
        run = expert_run(world, folder, name)
        model, engine = run.parts["model"], run.parts["engine"]
        train_step(model, engine, case.packs(world.rank), world)
        run.finish(1)
        found[name] = held(run)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        assert run.rollback() == 1
        same(held(run), found[name])
    return found


def same(mine: Held, other: Held) -> None:
    assert mine.weights.keys() == other.weights.keys()
    assert all(torch.equal(other.weights[name], tensor) for name, tensor in mine.weights.items())
    assert mine.moments.keys() == other.moments.keys()
    for name, entries in mine.moments.items():
        assert all(torch.equal(other.moments[name][key], value) for key, value in entries.items()), name


def test_experts_of_four_ranks_are_those_of_one(tmp_path):
    """Two ranks share the experts, twice: as plain replicas, sharded over them, and cut through."""
    folder = str(tmp_path)
    for name, saved in run_ranks(save_and_load_experts, 4, folder, timeout=300)[0].items():
        run = expert_run(ALONE, folder, name)
        assert run.resume() == 1
        same(saved, held(run))


# ---------------------------------------------------------------------------------------------- failures


class Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def fail_on_one_rank(world: World, folder: str) -> list[Any]:
    """The disk of rank 1 is full three times, in between the write goes well once."""
    notes = Notes()
    logging.getLogger("mmagent.engine.saving").addHandler(notes)
    run, real, seen = model_run(folder, world, "fsdp2"), saving.write_pieces, []

    def full(*args: Any) -> dict[str, Any]:
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    run.finish(1)
    saving.write_pieces = full
    run.save(2)
    seen.append(run.settle())
    saving.write_pieces = real
    run.finish(2)
    saving.write_pieces = full
    try:
        run.finish(3)
    except CheckpointError as error:
        seen.append(str(error))
    return [*seen, notes.said]


def test_all_ranks_hear_of_the_full_disk_of_one(tmp_path):
    first, second = run_ranks(fail_on_one_rank, 2, str(tmp_path))
    for seen in (first, second):
        assert seen[0] is False
        assert "step 3 could not be written" in seen[1]
        assert "rank 1: OSError: [Errno 28] No space left on device" in seen[1]
        assert "that of step 2; that was failure 3 in a row" in seen[1]
    assert len(first[2]) == 3  # one warning a failure that is survived, by one rank
    assert not second[2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def lose_a_rank(world: World, folder: str) -> bool:
    """Rank 1 never writes its part."""
    saver = Saver(Path(folder), world, config=SavingConfig(patience=0.3))
    if world.rank == 1:
        saver._write_own = lambda *args: {}  # type: ignore[method-assign]
    saver.save(1, Contents({}, {"part": {"a": torch.ones(2)}}, {}, {}))
    return saver.settle()


def test_a_rank_that_never_writes_is_not_waited_for_for_ever(tmp_path):
    assert run_ranks(lose_a_rank, 2, str(tmp_path)) == [False, False]
    assert not list(tmp_path.iterdir())


def verify_together(world: World, folder: str) -> tuple[str, list[str], int]:
    """The step that is found, what is refused, and how many files this rank has read."""
    read, real = [], checkpoint.hashlib.file_digest

    def noted(file: Any, name: str) -> Any:
        read.append(file.name)
        return real(file, name)

    checkpoint.hashlib.file_digest = noted
    try:
        path, refused = checkpoint.latest(Path(folder), world)
    finally:
        checkpoint.hashlib.file_digest = real
    assert path is not None
    return path.name, list(refused.values()), len(read)


def test_ranks_verify_together_and_share_the_verdict(tmp_path):
    """Every file is read by one rank; a file that one of them finds changed is refused by all."""
    run = model_run(str(tmp_path), ALONE, "none")
    run.finish(1)
    run.finish(2)
    root = run.checkpoints
    found = run_ranks(verify_together, 2, str(root))
    assert [name for name, _, _ in found] == ["step-00000002"] * 2
    assert sum(count for _, _, count in found) == 5
    assert max(count for _, _, count in found) == 3
    for file in ("model.safetensors", "shared.pt", "manifest.json"):
        whole_file = (root / "step-00000002" / file).read_bytes()
        (root / "step-00000002" / file).write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
        for name, refused, _ in run_ranks(verify_together, 2, str(root)):
            assert name == "step-00000001"
            assert len(refused) == 1
            assert file in refused[0]
        (root / "step-00000002" / file).write_bytes(whole_file)


def look_from_elsewhere(world: World, folder: str) -> str:
    try:
        checkpoint.latest(Path(folder) if world.rank == 0 else Path(folder) / "of another machine", world)
    except CheckpointError as error:
        return str(error)
    return ""


def test_storage_that_only_one_rank_sees_is_not_taken_for_torn_checkpoints(tmp_path):
    toy = toy_run(tmp_path)
    toy.run.finish(1)
    for told in run_ranks(look_from_elsewhere, 2, str(toy.run.checkpoints)):
        assert told.startswith("rank 1 does not see ")
    assert checkpoint.latest(toy.run.checkpoints)[0] is not None
