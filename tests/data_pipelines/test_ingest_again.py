"""The same command again: finished is only what was made of files that are still what they were."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from ingest_kit import encoded, records, run

from data_pipelines.ingest.__main__ import main
from data_pipelines.ingest.sources import SourceError
from data_pipelines.shards import ShardWriter


def rows(folder: Path, count: int = 4) -> Path:
    """Rows with a picture each, of which number 2 is missing."""
    folder.mkdir()
    lines = []
    for n in range(count):
        if n != 2:
            (folder / f"{n}.png").write_bytes(encoded(seed=n))
        lines.append(json.dumps({"image": f"{n}.png", "text": f"picture {n}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and ".lock" not in path.name}


def later(path: Path) -> None:
    """Let it have changed, however coarse the clock of the disk is."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def test_a_picture_that_was_missing_is_taken_when_it_is_there(tmp_path, capsys):
    source, to = rows(tmp_path / "data"), tmp_path / "to"
    command = [str(source), "--to", str(to), "--processes", "0", "--max-share", "0.5"]
    assert main(command) == 0
    assert len(records(to)) == 3
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out
    (tmp_path / "data/2.png").write_bytes(encoded(seed=2))
    assert main([*command[:-2], "--max-share", "0"]) == 0
    out = capsys.readouterr().out
    assert f"made anew, for {tmp_path}/data/2.png missing before and there now" in out
    assert "4 rows read: 4 records written" in out
    assert [len(one.images) for one in records(to)] == [1, 1, 1, 1]
    run([source], tmp_path / "fresh")
    assert contents(to) == contents(tmp_path / "fresh")
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("after", range(1, 4))
def test_an_ingestion_that_was_stopped_takes_it_as_well(tmp_path, after, monkeypatch):
    source, to = rows(tmp_path / "data"), tmp_path / "to"
    append, left = ShardWriter.append, [after]

    def stop(self, sample):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", stop)
        if after < 3:
            with pytest.raises(KeyboardInterrupt):
                run([source], to, shard_samples=1)
        else:
            run([source], to, shard_samples=1)
    (tmp_path / "data/2.png").write_bytes(encoded(seed=2))
    assert run([source], to, shard_samples=1)["records"] == 4
    run([source], tmp_path / "fresh", shard_samples=1)
    assert contents(to) == contents(tmp_path / "fresh")


def test_input_that_has_changed_is_told_and_nothing_is_lost(tmp_path):
    """A row edited without a change of size, a picture drawn anew: what was made stays until it is given up."""
    source, to = rows(tmp_path / "data"), tmp_path / "to"
    run([source], to)
    before = contents(to)
    source.write_text(source.read_text().replace("picture 3", "picture 9"))
    later(source)
    with pytest.raises(SourceError, match=r"was begun with other inputs: rows.jsonl changed; --anew"):
        run([source], to)
    run([source], to, anew=True)
    assert records(to)[-1].parts[1].text == "picture 9"
    (tmp_path / "data/0.png").write_bytes(encoded(seed=7))
    later(tmp_path / "data/0.png")
    with pytest.raises(SourceError, match=r"was made of other files: .*/0.png changed; --anew"):
        run([source], to)
    assert contents(to).keys() == before.keys()
    run([source], to, anew=True)
    assert records(to)[0].images[0].data == encoded(seed=7)


def test_a_picture_that_is_gone_takes_nothing_away(tmp_path):
    source, to = rows(tmp_path / "data"), tmp_path / "to"
    report = run([source], to)
    (tmp_path / "data/0.png").unlink()
    assert run([source], to) == report


@pytest.mark.parametrize("name", ["1.png", "1.txt", "3.png"])
def test_a_folder_of_images_is_all_of_its_files(tmp_path, name):
    folder, to = tmp_path / "data", tmp_path / "to"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(encoded(seed=n))
        (folder / f"{n}.txt").write_text(f"picture {n}")
    run([folder], to)
    (folder / name).write_bytes((folder / "0").with_suffix(Path(name).suffix).read_bytes())
    later(folder / name)
    with pytest.raises(SourceError, match=r"was begun with other inputs: .*data changed; --anew"):
        run([folder], to)
    assert run([folder], to, anew=True)["rows"] == (4 if name == "3.png" else 3)


def test_other_settings_are_taken_by_beginning_anew(tmp_path):
    source, to = rows(tmp_path / "data"), tmp_path / "to"
    run([source], to)
    with pytest.raises(SourceError, match="was begun with prompt"):
        run([source], to, prompt="What?")
    run([source], to, prompt="What?", anew=True)
    assert len(records(to)[0].messages) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other/shard-00000.tar").write_bytes(b"not ours")
    with pytest.raises(SourceError, match="was not written by this command"):
        run([source], tmp_path / "other", anew=True)


def test_a_stop_while_shards_are_deleted_leaves_no_half_of_them(tmp_path, monkeypatch):
    source, to = rows(tmp_path / "data"), tmp_path / "to"
    run([source], to, shard_samples=1)
    unlink = Path.unlink

    def stop(self, *args, **options):
        if self.name == "shard-00001.tar":
            raise KeyboardInterrupt
        unlink(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            run([source], to, shard_samples=1, anew=True)
    run([source], to, shard_samples=1)
    run([source], tmp_path / "fresh", shard_samples=1)
    assert contents(to) == contents(tmp_path / "fresh")


def test_nothing_is_deleted_under_another_process(tmp_path):
    source, to = rows(tmp_path / "data"), tmp_path / "to"
    run([source], to)
    before = contents(to)
    with (to / ".shard.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="another process is writing there"):
            run([source], to, anew=True)
    assert contents(to) == before
