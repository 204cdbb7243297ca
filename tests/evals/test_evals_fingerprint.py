"""Items of suites are signed so that a sample which gives one away is found, and what only looks like it is not."""

from __future__ import annotations

import pytest

from data_pipelines.record_texts import turns_of
from data_pipelines.worlds import record_of
from evals.__main__ import main
from evals.fingerprint import fingerprint
from evals.suites.worlds import worlds
from mmagent.contamination import Fingerprint, Signed
from mmagent.records import Record, decode_image
from mmagent.worlds.catalogue import choose_worlds

NAMES = ("counting", "spatial", "text")


def found(known: Fingerprint, record: Record) -> str:
    pictures = [Signed.of(decode_image(image.data, record.key)) for image in record.images]
    match = known.find(turns_of(record), pictures)
    return match.item if match else ""


def test_test_examples_are_found_in_training_records_and_train_examples_are_not():
    known = fingerprint([worlds(NAMES, per_task=6)], progress=False)
    chosen = choose_worlds(NAMES)
    assert len(known) == 6 * len(chosen)
    for world in chosen:
        leaks = [found(known, record_of(world, world.example("test", n), "leak")) for n in range(6)]
        assert leaks == [f"worlds-0/worlds/{world.name}/test-{n}" for n in range(6)]
        fresh = [found(known, record_of(world, world.example("train", n), "train")) for n in range(12)]
        assert fresh == [""] * 12


@pytest.mark.browser
def test_the_command_signs_screens(tmp_path, capsys, monkeypatch, browser_pool):
    import evals.fingerprint as module
    from evals.suites.pages import page_grounding

    monkeypatch.setattr(module, "SUITES", {"page_grounding": lambda: page_grounding((1,), per_task=3)})
    out = tmp_path / "in" / "judged.npz"
    assert main(["fingerprint", str(out), "page_grounding", "--seeds", "0", "1"]) == 0
    assert "6 items with 6 pictures of 2 suites" in capsys.readouterr().out
    assert {name.partition("/")[0] for name in Fingerprint.load(out).names} == {"page_grounding-0", "page_grounding-1"}
    assert main(["fingerprint", str(out), "nothing"]) == 2
