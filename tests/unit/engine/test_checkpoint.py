"""Checkpoints are whole or refused, and what they hold fits or is named."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mmagent import files
from mmagent.engine import checkpoint, saving
from mmagent.engine.checkpoint import CheckpointError
from mmagent.engine.saving import Contents, Saver, SavingConfig
from tests.engine_kit import ALONE


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(3)
        self.register_buffer("router_bias", torch.arange(4.0))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def save(root: Path, step: int, model: nn.Module | None = None, keep: int = 2) -> Path:
    contents = Contents({"model": model or Tied()}, {"engine": {"a": torch.ones(2)}}, {"stream": {"at": step}}, {})
    return put(root, step, contents, keep)


def put(root: Path, step: int, contents: Contents, keep: int = 2) -> Path:
    root.mkdir(exist_ok=True)
    saver = Saver(root, ALONE, keep, SavingConfig(failures=1))
    saver.save(step, contents)
    saver.settle()
    return root / f"step-{step:08d}"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_round_trips_bitwise_with_tied_weights_and_buffers(tmp_path):
    model, other = Tied(), Tied()
    model.router_bias.add_(0.5)
    path = save(tmp_path, 7, model)
    assert names(path) == ["engine.safetensors", "manifest.json", "model.safetensors", "rank-00000.pt", "shared.pt"]
    assert checkpoint.verify(path)["step"] == 7
    tensors = checkpoint.read_weights(path / "model.safetensors")
    checkpoint.load_weights(other, tensors)
    assert set(tensors) == set(model.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert other.head.weight is other.embedding.weight
    with safe_open(path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 5  # the tied weight is stored once
    assert checkpoint.read_state(path / "rank-00000.pt") == {"stream": {"at": 7}}


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert checkpoint.latest(tmp_path)[0].name == "step-00000010"
    assert checkpoint.latest(tmp_path / "nowhere") == (None, {})


def test_a_step_may_be_written_again(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["step"] += 1
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("model.safetensors", cut, r"model.safetensors is torn: \d+ bytes, not \d+"),
        ("model.safetensors", flip, r"model.safetensors was changed: its checksum does not match"),
        ("rank-00000.pt", flip, r"rank-00000.pt was changed"),
        ("shared.pt", Path.unlink, r"shared.pt is missing"),
        ("manifest.json", Path.unlink, r"step-00000002 is torn: it has no manifest.json"),
        ("manifest.json", cut, r"manifest.json is torn or was changed"),
        ("manifest.json", edit_manifest, r"manifest.json was changed: its checksum does not match"),
        ("manifest.json", lambda path: path.write_text("[]"), r"manifest.json is torn or was changed"),
    ],
)
def test_torn_and_tampered_checkpoints_are_refused_and_an_older_whole_one_is_found(tmp_path, file, harm, message):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    harm(new / file)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(new)
    path, refused = checkpoint.latest(tmp_path)
    assert path == old
    assert list(refused) == [new]
    (old / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole:\n(.|\n)*step-00000001"):
        checkpoint.latest(tmp_path)


def failing(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "fatal", ["write_pieces", "_write_bytes", "HashingFile", "write_manifest", "sync", "put_folder"]
)
def test_a_failed_save_leaves_the_older_one_and_nothing_of_itself(tmp_path, monkeypatch, fatal):
    save(tmp_path, 1)
    monkeypatch.setattr(saving, fatal, failing)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written \(OSError: \[Errno 28\].*that of step 1"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.latest(tmp_path)[0].name == "step-00000001"


class Death(BaseException):
    """Nothing is mended after it: what it is raised from fails ever after, as a thread does that is killed."""


def dying(monkeypatch, module: ModuleType, name: str, after: int) -> None:
    """``module.name`` works ``after`` times and then never again."""
    calls, real = count(), getattr(module, name)

    def call(*args, **kwargs):
        if next(calls) >= after:
            raise Death
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


def die_saving(root: Path, step: int, keep: int = 2) -> None:
    """The write at hand, in this thread, which a :class:`Death` ends."""
    saver = Saver(root, ALONE, keep)
    with pytest.raises(Death):
        saver._write(step, root / f".writing-{step:08d}-0", saver._copy(CONTENTS), Future())


CONTENTS = Contents({"model": Tied()}, {}, {}, {})


def test_a_death_while_a_checkpoint_is_written_leaves_the_older_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    for name in ("write_pieces", "_write_bytes", "write_manifest", "sync", "put_folder"):
        with monkeypatch.context() as patched:
            dying(patched, saving, name, after=0)
            die_saving(tmp_path, 2)
        assert names(tmp_path) == [".writing-00000002-0", "step-00000001"]
        assert checkpoint.latest(tmp_path)[0].name == "step-00000001"
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_a_death_while_an_old_folder_is_set_aside_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patched:
        dying(patched, os, "replace", after=1)  # the old step 2 is aside, the new one not yet in its place
        die_saving(tmp_path, 2)
    assert names(tmp_path) == [".removing-step-00000002", ".writing-00000002-0", "step-00000001"]
    path, refused = checkpoint.latest(tmp_path)
    assert (path.name, refused) == ("step-00000001", {})
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_death_while_an_old_checkpoint_is_removed_leaves_the_newest(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        dying(patched, files, "_remove", after=2)  # the third is of the old one, set aside
        die_saving(tmp_path, 2, keep=1)
    assert names(tmp_path) == [".removing-step-00000001", "step-00000002"]
    path, refused = checkpoint.latest(tmp_path)
    assert (path.name, refused) == ("step-00000002", {})
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path):
    model = Tied()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = dict(model.state_dict())
    del tensors["norm.bias"]
    tensors["norm.weight"] = torch.zeros(4)
    tensors["surplus"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_weights(model, tensors, "here.safetensors")
    told = str(error.value)
    assert told.startswith("here.safetensors does not fit Tied")
    for part in ("missing: norm.bias", "unexpected: surplus", "misshapen: norm.weight (4,), expected (3,)"):
        assert part in told
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    tensors = {**before, "norm.bias": torch.tensor([0.0, float("nan"), 0.0])}
    with pytest.raises(CheckpointError, match=r"left NaN in norm\.bias"):
        checkpoint.load_weights(model, tensors)


def test_a_module_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(CheckpointError, match="no module 'modle', but model"),
        checkpoint.open_weights(save(tmp_path, 1), "modle"),
    ):
        pass


def test_only_plain_values_are_state(tmp_path):
    checkpoint.require_plain({"a": [1, (2.0, None, b"x")], 3: torch.ones(1)}, "stream")
    with pytest.raises(ValueError, match=r"state at stream.buffer\[1\].box is a pathlib\.\w+"):
        checkpoint.require_plain({"buffer": [0, {"box": Path("x")}]}, "stream")
    with pytest.raises(ValueError, match=r"state at rank-00000.stream is a builtins.set"):
        put(tmp_path, 1, Contents({}, {}, {"stream": {1, 2}}, {}))


def test_foreign_pickles_are_refused(tmp_path):
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        checkpoint.read_state(tmp_path / "evil.pt")
