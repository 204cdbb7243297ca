"""Released folders into models that are spread over ranks, and out of them again, bit for bit: FSDP2, expert
parallelism with and without it, meta device, ZeRO-3. Each rank reads its own part; no rank holds a model."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from mmagent.chat import ChatConfig
from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.geometry import GeometryConfig
from mmagent.interop import conversion, live_model
from mmagent.interop.agent_folder import Agent, read_agent_config, save_agent
from mmagent.interop.conversion import convert, export_model, load_into
from mmagent.interop.model_source import open_source
from mmagent.models.agent_model import AgentModel
from mmagent.models.presets import on_meta
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.ops import tensor_files
from mmagent.ops.tensor_files import WeightsError
from tests.conversion_kit import read, released, same, split_files, vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A released glm4v_moe with an MTP layer, in two files, and the same as ours in ``native``."""
    root = tmp_path_factory.mktemp("sharded")
    released(root / "theirs", "glm4v_moe")
    split_files(root / "theirs", 2)
    convert(root / "theirs", root / "native", "native")
    return root


def new_model(folder: str, meta: bool = False) -> AgentModel:
    config = read_agent_config(Path(folder) / "native")[0].model
    return on_meta(config) if meta else AgentModel(config)


def save_both(model: AgentModel, out: Path) -> None:
    """In every format, by all ranks; the parameters were float32 in training and are cast to what they came as."""
    agent = Agent(model, vocabulary(), GeometryConfig(), ChatConfig())
    export_model(out / "theirs", agent, "glm4v_moe", dtype=torch.bfloat16, shard_size=60_000)
    export_model(out / "hub", agent, "hub", dtype=torch.bfloat16, shard_size=60_000)
    save_agent(out / "native", *agent[:4], shard_size=90_000)


def through_engine(world: World, folder: str, source: str, parallel: str, experts: int) -> int:
    """A released or native folder into the model of an engine, and out of it; returns the bytes that were read."""
    model = new_model(folder)
    objective = LanguageModeling(model, LanguageModelingConfig())
    config = EngineConfig(parallel=parallel, expert_parallel=experts)
    build_engine(objective, build_optimizer(model, OptimConfig()), config, world)
    read_bytes: list[int] = []
    fill = tensor_files._fill
    tensor_files._fill = lambda d, out, at, f: (read_bytes.append(out.nbytes), fill(d, out, at, f))
    load_into(model, Path(folder) / source)
    tensor_files._fill = fill
    save_both(model, Path(folder) / f"{parallel}{experts}")
    return sum(read_bytes)


def on_meta_and_sharded(world: World, folder: str) -> list[str]:
    model = new_model(folder, meta=True)
    for block in (*model.decoder.blocks, model):
        fully_shard(block, mesh=world.mesh())
    load_into(model, Path(folder) / "native")
    save_both(model, Path(folder) / "meta")
    return sorted({p.device.type for p in model.parameters()})


def broken_on_one_rank(world: World, folder: str) -> list[str]:
    """Rank 1 alone meets a NaN in its rows of the head; then the main rank cannot write."""
    model = new_model(folder)
    fully_shard(model, mesh=world.mesh())
    said = []
    with open_source(Path(folder) / "native") as source:
        head = source.tensors["head.weight"]
        spoilt = head.whole().clone()
        spoilt[head.shape[0] // 2 + 5 :] = float("nan")
        source.tensors["head.weight"] = tensor_files.stored("head.weight", spoilt, "spoilt.safetensors")
        try:
            live_model.load_stored(model, source.tensors)
        except WeightsError as error:
            said.append(str(error))
    load_into(model, Path(folder) / "native")
    with torch.no_grad():
        model.decoder.norm.weight.to_local().fill_(float("nan"))
    try:
        save_both(model, Path(folder) / "broken")
    except WeightsError as error:
        said.append(str(error))
    torch.distributed.barrier()  # nobody is left behind in a collective
    return said


def faults_of_the_main_rank(world: World, folder: str) -> list[list[str]]:
    """What goes wrong there alone: before the first read (its folder lies below a file), behind the last one with an
    error of no kind of ours, and in closing a file on a full disk."""
    model = new_model(folder)
    fully_shard(model, mesh=world.mesh())
    agent = Agent(model, vocabulary(), GeometryConfig(), ChatConfig())
    file, out = Path(folder) / "a file", Path(folder) / "faults"
    if world.rank == 0:
        file.write_text("")
        conversion.write_hub = broken_hub
        conversion.write_processor = broken_hub
    said: list[list[str]] = []

    def attempt(write: Callable[[], object]) -> None:
        try:
            write()
            said.append(["nothing"])
        except Exception as error:
            said.append([type(error).__name__, str(error)])

    attempt(lambda: export_model(file / "out", agent, "glm4v_moe"))
    attempt(lambda: save_agent(file / "out", *agent[:4]))
    attempt(lambda: export_model(out, agent, "hub"))
    attempt(lambda: export_model(out, agent, "glm4v_moe"))
    if world.rank == 0:
        tensor_files.open = full_disk
    attempt(lambda: save_agent(out, *agent[:4], shard_size=90_000))
    if world.rank == 0:
        del tensor_files.open
    torch.distributed.barrier()
    return said


def broken_hub(*_: object) -> None:
    raise KeyError("no kind of ours")


def full_disk(path: Path, mode: str) -> BinaryIO:
    """A file whose buffer is larger than what it gets: only closing writes it, and finds no room."""
    return builtins.open("/dev/full", mode, buffering=1 << 24) if mode == "wb" else builtins.open(path, mode)


def two_ranks(world: World, folder: str) -> dict[str, Any]:
    """All that two ranks are asked for: starting them takes longer than any of it."""
    return {
        "fsdp2": through_engine(world, folder, "native", "fsdp2", 1),
        "experts": through_engine(world, folder, "native", "ddp", 2),
        "meta": on_meta_and_sharded(world, folder),
        "broken": broken_on_one_rank(world, folder),
    }


@pytest.fixture(scope="module")
def faults(folder) -> list[list[list[str]]]:
    return run_ranks(faults_of_the_main_rank, 2, str(folder), timeout=60.0)


@pytest.mark.parametrize(
    "number, kind, words",
    [
        (0, "NotADirectoryError", "make"), (1, "NotADirectoryError", "make"), (2, "KeyError", "write the weights"),
        (3, "KeyError", "write the weights"), (4, "OSError", "write the weights"),
    ],
)  # fmt: skip
def test_an_ordinary_fault_of_the_main_rank_hangs_nobody(folder, faults, number, kind, words):
    first, second = (said[number] for said in faults)
    assert first[0] == kind, first
    assert second[0] == "WeightsError"
    assert f"another rank could not {words}" in second[1]
    assert not (folder / "faults").exists()
    assert not (folder / ".writing-faults").exists()


@pytest.fixture(scope="module")
def results(folder) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, str(folder), timeout=280.0)


def check_saved(folder: Path, name: str) -> None:
    same(read(folder / "theirs"), read(folder / name / "theirs"))
    hub = read(folder / name / "hub")
    same(read(folder / "native"), hub)
    assert all(any(part in key for key in hub) for part in ("mtp.", ".experts.gate_up", ".experts.down"))
    biases = [tensor for key, tensor in hub.items() if key.endswith("router.bias")]
    assert len(biases) == 3, "two layers with experts, and the MTP layer"
    assert all(bias.any() for bias in biases)
    native = {n: t.float() for n, t in read(folder / "native").items()}
    same(native, read(folder / name / "native"))
    assert len(list((folder / name / "native").glob("model-*"))) > 2


def nbytes(folder: Path) -> int:
    return sum(t.nbytes for t in read(folder).values())


@pytest.mark.parametrize("what, name", [("fsdp2", "fsdp21"), ("experts", "ddp2")])
def test_sharded_models_take_and_give_folders(folder, results, what, name):
    check_saved(folder, name)
    experts = sum(t.nbytes for n, t in read(folder / "native").items() if ".experts." in n)
    whole = nbytes(folder / "native")
    held = whole / 2 if what == "fsdp2" else whole - experts / 2  # DDP shares the experts alone
    for result in results:
        assert result[what] < held * 1.05, "a rank reads what it holds (and the router's bias)"


@pytest.mark.slow
@pytest.mark.timeout(900)  # the module's fixtures are counted in
def test_experts_and_the_rest_sharded_over_four_ranks_from_a_released_folder(folder):
    """Shares of shares: two replicas of two groups of experts, each share sharded once more."""
    for count in run_ranks(through_engine, 4, str(folder), "theirs", "fsdp2", 2, timeout=280.0):
        assert count < nbytes(folder / "theirs")  # a quarter, and what repeats others read twice
    check_saved(folder, "fsdp22")


def test_a_sharded_model_on_the_meta_device_gets_memory_for_its_share(folder, results):
    assert [result["meta"] for result in results] == [["cpu"]] * 2
    check_saved(folder, "meta")


def test_no_rank_waits_for_one_that_failed(folder, results):
    first, second = (result["broken"] for result in results)
    assert first[0] == "another rank could not read the weights; its error says why"
    assert second[0] == "head.weight in spoilt.safetensors is not finite: a NaN or an infinity"
    assert "norm.weight in the model is not finite" in first[1]
    # who gathers a tensor sees what is in it, unless the main rank's word is there first
    assert "another rank could not write" in second[1] or "norm.weight in the model is not finite" in second[1]
    assert not (folder / "broken" / "theirs").exists()


# ---------------------------------------------------------------------------------------------- ZeRO-3


def partition(world: World, model: nn.Module) -> nn.Module:
    """``model`` in the partitions of DeepSpeed's ZeRO-3, with an optimizer that holds float32 copies."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    os.environ["LOCAL_RANK"] = str(world.rank)
    import deepspeed
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 64},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine.module


def zero(world: World, folder: str) -> list[str]:
    from deepspeed.utils import safe_get_full_fp32_param

    odd = partition(world, nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)))  # nothing divides by two
    wanted = {n: torch.randn(p.ds_shape, generator=torch.Generator().manual_seed(3)) for n, p in odd.named_parameters()}
    live_model.load_stored(odd, {n: tensor_files.stored(n, t) for n, t in wanted.items()})
    got = live_model.live_tensors(odd)
    same(wanted, {name: got[name].whole() for name in wanted})
    same(wanted, {name: safe_get_full_fp32_param(p) for name, p in odd.named_parameters()})
    assert all(p.numel() == 0 for p in odd.parameters()), "gathered, and not given back"

    model = partition(world, new_model(folder))
    load_into(model, Path(folder) / "native")
    save_both(model, Path(folder) / "zero")
    state = {name: tensor.whole().clone() for name, tensor in live_model.live_tensors(model).items()}
    state["head.weight"][3, 4] = float("nan")
    spoilt = {name: tensor_files.stored(name, tensor, "spoilt") for name, tensor in state.items()}
    try:
        live_model.load_stored(model, spoilt)
    except WeightsError as error:
        return [str(error)]
    return []


def test_partitions_of_zero_3_take_and_give_folders(folder):
    """And the optimizer's own copies are written as well: its next step would bring the old weights back."""
    pytest.importorskip("deepspeed")
    first, second = run_ranks(zero, 2, str(folder), timeout=280.0)
    check_saved(folder, "zero")
    assert first == ["head.weight in spoilt is not finite: a NaN or an infinity"]
    assert second == ["another rank could not read the weights; its error says why"]
