"""The recipe that curates by the suites and by image-text towers: both are wired, and what they find is left out."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import recipes.curate as recipe
from data_pipelines.making import BuildError
from data_pipelines.scanning import ScanRules
from data_pipelines.shards import ShardSet, ShardWriter
from data_pipelines.workers import LimitsConfig
from data_pipelines.worlds import record_of
from evals.fingerprint import fingerprint
from evals.suite import Suite
from evals.suites.worlds import worlds
from mmagent.chat import Image, Text, assistant, user
from mmagent.geometry import GeometryConfig
from mmagent.interop.image_text import load_image_text, save_image_text
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.models.text_tower import TextTower, text_debug
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.records import Record, encode_image, from_sample
from mmagent.vocab import Vocab
from mmagent.worlds.catalogue import choose_worlds
from recipes.curate import Config, TowerScorer, clean, digest_of, main

GEOMETRY = GeometryConfig()


def keys(folder: Path) -> list[str]:
    shards = ShardSet(folder)
    return [from_sample(shards.read(n)).key for n in range(len(shards))]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones: what they say is arbitrary, but always the same."""
    torch.manual_seed(0)
    vocab = Vocab.train(["all red", "all green", "all blue"] * 3, 300)
    both = Alignment(CogViT(cogvit_debug()), TextTower(text_debug(vocab.size)), AlignmentConfig(width=16))
    folder = tmp_path_factory.mktemp("towers") / "image_text"
    save_image_text(folder, both, GEOMETRY, vocab, max_text=16)
    return folder


def test_items_of_suites_are_left_out(tmp_path, monkeypatch):
    world = choose_worlds(("counting",))[0]
    monkeypatch.setattr(recipe, "SUITES", {"worlds": lambda: worlds((world.name,), per_task=3)})
    with ShardWriter(tmp_path / "raw") as writer:
        for split, n in (("train", 0), ("test", 1), ("train", 1), ("test", 2), ("test", 40)):
            writer.write(record_of(world, world.example(split, n), "leaks"))
    config = Config(folders=[str(tmp_path / "raw")], to=str(tmp_path / "to"), suites=["all"])
    config.limits = LimitsConfig(processes=0)
    result = clean(config)
    assert result.left_out == {"evaluation": 2}  # the suite judges by its first three items
    assert [key.rpartition("/")[2].partition("-")[0] for key in keys(tmp_path / "to/raw")] == ["train", "train", "test"]
    log = [json.loads(line) for line in (tmp_path / "to/left_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["problem"].partition(",")[0] for line in log] == [
        f"worlds-0/worlds/{world.name}/test-{n}" for n in (1, 2)
    ]
    monkeypatch.setattr(recipe, "fingerprint", lambda suites: pytest.fail("they are signed already"))
    assert clean(config) == result


def test_another_choice_of_suites_is_not_taken_for_the_one_before(tmp_path, monkeypatch):
    one, two = choose_worlds(("counting",))[0], choose_worlds(("spatial",))[0]
    suites = {"a": lambda: replace(worlds((one.name,), per_task=2), name="a")}
    suites["b"] = lambda: replace(worlds((two.name,), per_task=2), name="b")
    monkeypatch.setattr(recipe, "SUITES", suites)
    with ShardWriter(tmp_path / "raw") as writer:
        for split, n in (("train", 0), ("test", 1)):
            writer.write(record_of(two, two.example(split, n), "leaks"))
    here = LimitsConfig(processes=0)
    config = Config(folders=[str(tmp_path / "raw")], to=str(tmp_path / "to"), suites=["a"], limits=here)
    assert clean(config).left_out == {}
    with pytest.raises(BuildError, match=r"was begun with other sets or settings: read.*judged\.npz was"):
        clean(replace(config, suites=["a", "b"]))
    assert clean(replace(config, suites=["a", "b"], to=str(tmp_path / "anew"))).left_out == {"evaluation": 1}


def test_nothing_is_signed_into_a_folder_of_somebody(tmp_path):
    with ShardWriter(tmp_path / "raw") as writer:
        writer.write(Record("a", "s", parts=(Text("x"),)))
    (tmp_path / "to").mkdir()
    (tmp_path / "to/thesis.txt").touch()
    with pytest.raises(BuildError, match=r"holds what was not written by this command \(thesis\.txt\)"):
        clean(Config(folders=[str(tmp_path / "raw")], to=str(tmp_path / "to"), suites=["worlds"]))
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["thesis.txt"]


def test_more_items_of_the_same_suite_are_signed_anew(tmp_path, monkeypatch):
    world = choose_worlds(("counting",))[0]
    suite = worlds((world.name,), per_task=2)
    monkeypatch.setattr(recipe, "SUITES", {"worlds": lambda: suite})
    with ShardWriter(tmp_path / "raw") as writer:
        for split, n in (("train", 0), ("test", 4)):
            writer.write(record_of(world, world.example(split, n), "leaks"))
    here = LimitsConfig(processes=0)
    config = Config(folders=[str(tmp_path / "raw")], to=str(tmp_path / "to"), suites=["worlds"], limits=here)
    assert clean(config).left_out == {}
    signed: list[Sequence[Suite]] = []
    monkeypatch.setattr(recipe, "fingerprint", lambda suites: signed.append(suites) or fingerprint(suites))
    changes = ({"per_task": 5}, {"version": suite.version + 1}, {"data": "2 questions, 0123456789ab"})
    for n, change in enumerate(changes):
        monkeypatch.setattr(recipe, "SUITES", {"worlds": lambda change=change: replace(suite, **change)})
        with contextlib.suppress(BuildError):  # other items are another curation
            clean(config)
        assert len(signed) == n + 1
    monkeypatch.setattr(recipe, "SUITES", {"worlds": lambda: replace(suite, per_task=5)})
    assert clean(replace(config, to=str(tmp_path / "anew"))).left_out == {"evaluation": 1}


def test_pairs_are_scored_by_the_towers(towers, tmp_path):
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (56, 56, 3), np.uint8) for _ in range(8)]
    said = [f"all {('red', 'green', 'blue')[n % 3]} {n}" for n in range(8)]
    scores = TowerScorer(load_image_text(towers)).score(pictures, said)
    assert all(-1 <= score <= 1 for score in scores)
    least = sorted(scores)[3] + 1e-6
    with ShardWriter(tmp_path / "raw") as writer:
        for n, (picture, text) in enumerate(zip(pictures, said, strict=True)):
            talk = (user(Image(), "Describe it."), assistant(text))
            writer.write(Record(f"p{n}", "pairs", talk, images=(encode_image(picture),)))
    main([
        f"folders=[{tmp_path / 'raw'}]", f"to={tmp_path / 'to'}", f"rules.least_score={least}", f"image_text={towers}",
        "limits.processes=0", "device=cpu",
    ])  # fmt: skip
    assert keys(tmp_path / "to/raw") == [f"p{n}" for n, score in enumerate(scores) if score >= least]


def test_another_model_in_the_same_folder_is_not_taken_for_the_one_before(towers, tmp_path):
    with ShardWriter(tmp_path / "raw") as writer:
        talk = (user(Image(), "Describe it."), assistant("all red"))
        writer.write(Record("p", "pairs", talk, images=(encode_image(np.full((56, 56, 3), 90, np.uint8)),)))
    scorer = tmp_path / "image_text"
    shutil.copytree(towers, scorer)
    config = Config(
        folders=[str(tmp_path / "raw")], to=str(tmp_path / "to"), image_text=str(scorer), device="cpu",
        rules=ScanRules(least_score=-1.0), limits=LimitsConfig(processes=0),
    )  # fmt: skip
    assert clean(config) == clean(config)
    weights = load_file(scorer / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, scorer / "model.safetensors")
    with pytest.raises(BuildError, match="scored_by"):
        clean(config)
    one, other = load_image_text(towers), load_image_text(scorer)
    assert digest_of("a/hub-id", one) == digest_of("a/hub-id", one) != digest_of("a/hub-id", other)


def test_what_lacks_its_other_half_is_refused(towers):
    with pytest.raises(ValueError, match="need each other"):
        Config(image_text=str(towers))
    with pytest.raises(ValueError, match="need each other"):
        Config(rules=ScanRules(least_score=0.1))
    with pytest.raises(ValueError, match="there is no 'nothing'"):
        Config(suites=["nothing"])
    with pytest.raises(ValueError, match="there is no 'nothing'"):
        Config(suites=["chartqa=data/ChartQA", "nothing=data/x"])
