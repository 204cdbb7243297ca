"""Files and folders are replaced whole: an error, or a death at any moment, leaves the old one or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from mmagent import files

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    with files.new_folder(folder) as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "a").write_text(text)


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    for text in ("first", "zweites ä"):
        files.write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_and_nothing_else_stays(tmp_path):
    for text in ("first", "second"):
        fill(tmp_path / "deep" / "out", text)
        assert (tmp_path / "deep" / "out" / "inner" / "a").read_text() == text
    assert names(tmp_path / "deep") == ["out"]
    files.discard_folder(tmp_path / "deep" / "out")
    files.discard_folder(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == []


def test_an_error_leaves_the_old(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), files.new_file(tmp_path / "a.txt") as beside:
        beside.write_text(f"half {1 / 0}")
    fill(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "out") as beside:
        (beside / "half").write_text(f"half {1 / 0}")
    assert names(tmp_path) == ["a.txt", "out"]
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path / "out") == ["inner"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize(("call", "moved"), [(1, False), (1, True), (2, False), (2, True)])
def test_an_interrupt_at_a_rename_leaves_a_whole_folder(tmp_path, monkeypatch, error, call, moved):
    """Just before or after the ``call``-th rename, of the old folder aside and of the new one to its place."""
    fill(tmp_path / "out", "old")
    calls, replace = count(1), os.replace

    def interrupted(a, b):
        ours = next(calls) == call
        if moved or not ours:
            replace(a, b)
        if ours:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(error):
            fill(tmp_path / "out", "new")
    stands = "new" if (call, moved) == (2, True) else "old"
    assert (tmp_path / "out" / "inner" / "a").read_text() == stands
    assert names(tmp_path) == ([".removing-out", "out"] if stands == "new" else ["out"])
    fill(tmp_path / "out", "newer")
    assert (tmp_path / "out" / "inner" / "a").read_text() == "newer"
    assert names(tmp_path) == ["out"]


def test_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """Else a loss of power could leave the new name with nothing in it."""
    done: list[tuple[str, str]] = []
    sync, replace = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (done.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", Path(b).name)), replace(a, b)))
    files.write_text(tmp_path / "a.txt", "x")
    assert done == [("sync", ".writing-a.txt"), ("replace", "a.txt"), ("sync", tmp_path.name)]
    done.clear()
    fill(tmp_path / "out", "x")
    assert sorted(done[:2]) == [("sync", "a"), ("sync", "inner")]
    assert done[2:] == [("sync", ".writing-out"), ("replace", "out"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("fatal", range(7))
def test_killed_before_any_call_of_the_system_a_folder_is_whole(tmp_path, fatal):
    """Dies before the ``fatal``-th sync or rename; the next writer then finds nothing in its way."""
    fill(tmp_path / "out", "old")
    script = (
        "import os, sys; from pathlib import Path; from mmagent import files; calls = iter(range(100))\n"
        "def dying(call): return lambda *a: os._exit(9) if next(calls) == int(sys.argv[2]) else call(*a)\n"
        "os.fsync, os.replace = dying(os.fsync), dying(os.replace)\n"
        "with files.new_folder(Path(sys.argv[1])) as beside: (beside / 'a').write_text('new')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(fatal)]
    died = subprocess.run(command, cwd=ROOT, check=False).returncode
    assert died == (9 if fatal < 5 else 0)  # sync a file, sync the folder, two renames, sync the parent
    stands = [tmp_path / name / "inner" / "a" for name in ("out", ".removing-out")]
    new = (tmp_path / "out" / "a").is_file()
    assert new or [path.read_text() for path in stands if path.is_file()] == ["old"]
    assert new == (fatal >= 4)
    fill(tmp_path / "out", "newer")
    assert (tmp_path / "out" / "inner" / "a").read_text() == "newer"
    assert names(tmp_path) == ["out"]
