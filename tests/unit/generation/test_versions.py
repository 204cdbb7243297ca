"""Versions on disk, full and as deltas: the very bits, whatever is damaged, killed or written again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmagent.generation.generator import Generator
from mmagent.generation.updates import VERSION, Buckets, WeightUpdate, buckets_of_files, buckets_of_state, write_version
from mmagent.generation.versions import DELTA, Damaged, Versions, VersionsConfig
from mmagent.ops.tensor_files import WEIGHTS
from tests.agent_kit import tiny_model, tiny_vocab

ROOT = Path(__file__).resolve().parents[3]
BYTES = 1 << 10
DELTAS = VersionsConfig(keep=8, deltas=3)


def state_of(version: int) -> dict[str, Tensor]:
    """``frozen`` stays, ``few`` changes here and there, ``all`` everywhere, NaN and -0.0 among it."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "frozen": torch.randn(700, generator=generator),
        "few": torch.randn(40, 30, generator=generator).bfloat16(),
        "all": torch.zeros(300),
        "count": torch.tensor(version),
    }
    for step in range(version):
        state["few"].view(-1)[step::97] += 1
        state["all"] = torch.randn(300, generator=generator)
        state["all"][step] = float("nan") if step % 2 else -0.0
    return state


def source_of(version: int) -> Buckets:
    return buckets_of_state(state_of(version), version, BYTES)


def bytes_of(source) -> list[tuple[bytes, bytes, bytes]]:
    return [(bucket.data.numpy().tobytes(), bucket.digest, bucket.seal) for bucket in source]


def written(root: Path, last: int, config: VersionsConfig = DELTAS) -> Versions:
    versions = Versions(root, config)
    for version in range(last + 1):
        versions.write(source_of(version))
    return versions


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_deltas_are_the_full_version_to_the_last_bit(tmp_path):
    versions = written(tmp_path / "some", 6)
    assert [len(versions.chain(n)) for n in versions.there()] == [1, 2, 3, 4, 1, 2, 3]
    for version in versions.there():
        write_version(tmp_path / "full", source_of(version))
        assert bytes_of(versions.read(version)) == bytes_of(buckets_of_files(tmp_path / "full"))
    whole = (versions.folder(0) / WEIGHTS).stat().st_size
    assert (versions.folder(1) / DELTA).stat().st_size < whole / 2  # "all" and no more


def test_what_did_not_change_takes_nothing(tmp_path):
    versions = Versions(tmp_path, DELTAS)
    for version in (4, 5):
        versions.write(buckets_of_state(state_of(4), version, BYTES))
    assert (versions.folder(5) / DELTA).stat().st_size == 0
    assert [data for data, _, _ in bytes_of(versions.read(5))] == [data for data, _, _ in bytes_of(source_of(4))]


def test_other_shapes_begin_with_a_full_version(tmp_path):
    versions = written(tmp_path, 1)
    versions.write(buckets_of_state(state_of(2) | {"new": torch.ones(3)}, 2, BYTES))
    assert len(versions.chain(2)) == 1


@pytest.mark.parametrize(("version", "file", "at"), [(0, WEIGHTS, -5), (1, DELTA, 40), (2, DELTA, 7)])
def test_a_damaged_link_is_named_and_the_newest_sound_version_is_found(tmp_path, version, file, at):
    versions = written(tmp_path, 3)
    damage(versions.folder(version) / file, at)
    with pytest.raises(Damaged, match=rf"{version:06d}"):
        versions.read(3).check()
    sound = versions.newest_sound()
    if version == 0:
        assert sound is None
    else:
        assert sound.manifest.version == version - 1
        assert bytes_of(sound) == bytes_of(source_of(version - 1))


def test_nothing_of_a_damaged_version_is_handed_out(tmp_path):
    versions = written(tmp_path, 2)
    good = {data for data, _, _ in bytes_of(versions.read(2))}
    damage(versions.folder(1) / DELTA, 40)
    told = []
    with pytest.raises(Damaged):
        told.extend(bucket.data.numpy().tobytes() for bucket in versions.read(2))
    assert set(told) <= good


@pytest.mark.parametrize("spoil", ["cut", "gone", "json", "swapped", "digests"])
def test_spoilt_folders_are_found_before_anything_is_read(tmp_path, spoil):
    versions = written(tmp_path, 3)
    told = versions.folder(2) / VERSION
    match spoil:
        case "cut":
            (versions.folder(2) / DELTA).write_bytes((versions.folder(2) / DELTA).read_bytes()[:-1])
        case "gone":
            told.unlink()
        case "json":
            told.write_text(told.read_text()[:-9])
        case "swapped":  # a sound version of another run
            Versions(tmp_path / "other", DELTAS).write(buckets_of_state(state_of(5), 2, BYTES))
            (versions.folder(2)).rename(tmp_path / "away")
            (tmp_path / "other" / "000002").rename(versions.folder(2))
        case "digests":
            body = json.loads(told.read_text())
            body["digests"][0] = "00000000"
            told.write_text(json.dumps(body))
    with pytest.raises(Damaged, match="000002"):
        versions.read(3).check()


def test_who_finds_its_base_damaged_writes_in_full(tmp_path):
    versions = written(tmp_path, 2)
    damage(versions.folder(1) / DELTA, 40)
    versions.write(source_of(3))
    assert len(versions.chain(3)) == 1
    assert bytes_of(versions.read(3)) == bytes_of(source_of(3))


def test_a_bounded_number_is_kept_with_what_they_are_told_from(tmp_path):
    versions = written(tmp_path, 12, VersionsConfig(keep=2, deltas=3))
    assert versions.there() == [8, 9, 10, 11, 12]
    versions.write(source_of(13))
    assert versions.there() == [12, 13]


def test_a_run_that_begins_again_earlier_replaces_what_was_newer(tmp_path):
    versions = written(tmp_path, 3)
    other = buckets_of_state(state_of(7), 2, BYTES)
    versions.write(other)
    assert versions.there() == [0, 1, 2]
    assert bytes_of(versions.read(2)) == bytes_of(other)


def test_weights_at_hand_spare_the_chain_and_wrong_ones_do_no_harm(tmp_path):
    versions = written(tmp_path, 2)
    wanted, seal = bytes_of(source_of(2)), versions.chain(1)[0].seal
    two, one = versions.chain(2)[:2]
    index = next(n for n, (kind, _) in enumerate(two.parts) if kind == 1)  # told as what differs
    damage(versions.folder(1) / DELTA, sum(size for _, size in one.parts[:index]) + one.parts[index][1] // 2)
    assert bytes_of(versions.read(2, (seal, source_of(1)))) == wanted  # version 1 on disk is worth nothing now
    with pytest.raises(Damaged):
        versions.read(2, (seal, source_of(0))).check()  # they are not what they were said to be
    with pytest.raises(Damaged):
        versions.read(2, (b"other", source_of(1))).check()


def test_a_generator_takes_deltas_onto_its_own_weights(tmp_path):
    vocab, models = tiny_vocab(), [tiny_model(seed) for seed in range(3)]
    versions = Versions(tmp_path, DELTAS)
    for version, model in enumerate(models):
        versions.write(buckets_of_state(model.state_dict(), version, 1 << 14))
    generator = Generator(tiny_model(9), vocab)
    seal = b""
    for version in range(3):
        held = (seal, buckets_of_state(generator.model.state_dict(), 0, 1 << 14)) if seal else None
        source = versions.read(version, held)
        source.check()
        with WeightUpdate(generator, source.manifest) as update:
            update.write_all(source)
        seal = source.seal
        said, wanted = generator.model.state_dict(), models[version].state_dict()
        assert all(torch.equal(said[name], wanted[name]) for name in wanted)
    assert generator.version == 2


@pytest.mark.parametrize("deltas", [0, 3])
def test_a_writer_that_is_killed_leaves_what_was_there_and_the_next_goes_on(tmp_path, deltas):
    written(tmp_path, 1, VersionsConfig(keep=8, deltas=deltas))
    program = (
        "import os, signal, sys\n"
        "from mmagent.generation.updates import Buckets\n"
        "from mmagent.generation.versions import Versions, VersionsConfig\n"
        "from tests.unit.generation.test_versions import source_of\n"
        "class Dies(Buckets):\n"
        "    def __init__(self, source): self.__dict__.update(source.__dict__)\n"
        "    def __iter__(self):\n"
        "        for bucket in super().__iter__():\n"
        "            if bucket.index == bucket.of // 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "            yield bucket\n"
        f"Versions(sys.argv[1], VersionsConfig(8, {deltas})).write(Dies(source_of(2)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    versions = Versions(tmp_path, VersionsConfig(keep=8, deltas=deltas))
    assert versions.there() == [0, 1]
    assert bytes_of(versions.newest_sound()) == bytes_of(source_of(1))
    versions.write(source_of(2))
    assert bytes_of(versions.read(2)) == bytes_of(source_of(2))
    assert not list(tmp_path.glob(".*"))
