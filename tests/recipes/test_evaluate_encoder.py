"""The command on encoders of every kind, side by side; what the user can mend is told in one line."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.hub_images import ColumnsConfig
from data_pipelines.shards import ShardWriter
from mmagent.chat import Image, Text
from mmagent.dist import World
from mmagent.geometry import GeometryConfig, image_grid
from mmagent.interop.encoder_folder import open_encoder, save_encoder
from mmagent.interop.image_text import AlignedTowers, save_image_text
from mmagent.models.backbones import new_backbone, wrap
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.models.text_tower import TextTower, text_debug
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.records import Record, Region, encode_image
from mmagent.train.launch import launch
from mmagent.train.step import begun
from mmagent.vocab import Vocab
from recipes import evaluate_encoder
from recipes.encoder_sources import PATCHES, native_patches, open_judged
from recipes.encoder_stage import StageConfig, pictures
from recipes.probe_data import DataOptions, users_question
from tests.data_pipelines.image_samples import COLOURS, bomb, encoded, folder_of_classes, pixels, tar_of, write

GEOMETRY = GeometryConfig(min_tokens=1)


class Means(torch.nn.Module):
    """An encoder of the user, without parameters: a patch is its mean colour."""

    patch_size, merge_size, width = 14, 2, 3

    def forward(self, vision, layers=()):
        from mmagent.types import VisionFeatures

        tokens = vision.patches.unflatten(1, (3, -1)).mean(dim=2)
        parts = tokens.split(vision.grids.prod(dim=1).tolist())
        return VisionFeatures(tokens, {}, torch.stack([part.mean(dim=0) for part in parts]))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Ours, aligned towers, timm's and a transformers folder: random, and tiny."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    ours = CogViT(cogvit_debug())
    save_encoder(root / "ours" / "encoder", ours, GEOMETRY)
    vocab = Vocab.train(["all red", "all green", "all blue"] * 3, 300)
    towers = Alignment(ours, TextTower(text_debug(vocab.size)), AlignmentConfig(width=16))
    save_image_text(root / "towers", towers, GEOMETRY, vocab, max_text=16)
    ensure_torchvision()
    import timm
    from timm.models import save_for_hf
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 56}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    save_for_hf(module, root / "timm", model_args=sizes, safe_serialization=True)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(root / "transformers")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Colours with captions, masks and distances, some of which cannot be used."""
    root = folder_of_classes(tmp_path_factory.mktemp("photos") / "set", 16)
    for name in COLOURS:
        for n in range(16):
            write(root / name / f"{n:03d}.txt", f"all {name}")
            write(root / name / f"{n:03d}.mask.png", encoded(np.full((30, 44), list(COLOURS).index(name), np.uint8)))
            write(root / name / f"{n:03d}.depth.png", encoded(np.full((30, 44), 100 + n, np.uint16)))
    for n in range(4):
        write(root / "red" / f"bad{n}.png", bomb() if n % 2 else b"no image")
    write(root / "red" / "line.png", encoded(np.zeros((2, 900, 3), np.uint8)))  # a shape that no encoder is shown
    return root


def _run(monkeypatch, *arguments: object) -> None:
    begun.clear()
    monkeypatch.setattr(sys, "argv", ["evaluate_encoder", *map(str, arguments)])
    launch(evaluate_encoder.main)


def test_encoders_of_every_kind_side_by_side(encoders, photos, tmp_path, monkeypatch, capsys):
    sources = [encoders["ours"] / "encoder", encoders["timm"], f"hf={encoders['transformers']}", encoders["towers"]]
    own = "mean=tests.recipes.test_evaluate_encoder:Means"
    how = ("--data", photos, "--output", tmp_path / "out", "--k", 1, 5, "--max-patches", 16)
    _run(monkeypatch, *sources, own, *how)
    said = capsys.readouterr()
    assert "images cannot be used; the first: red/bad" in said.err
    rows = said.out.splitlines()
    assert rows[0].split() == ["ours", "timm", "hf", "towers", "mean"]
    assert [row.split()[0] for row in rows[1:-6]] == [
        "knn@1", "knn@5", "linear", "linear/class", "segmentation/miou", "segmentation/class_accuracy",
        "segmentation/pixel_accuracy", "depth/rmse", "depth/r2", "depth/delta_1.25", "zero-shot/top-1",
        "zero-shot/top-5", "zero-shot/class", "retrieval/image_to_text@1", "retrieval/image_to_text@5",
        "retrieval/image_to_text@10", "retrieval/text_to_image@1", "retrieval/text_to_image@5",
        "retrieval/text_to_image@10",
    ]  # fmt: skip
    left = json.loads((tmp_path / "out" / "encoder_scores.json").read_text())
    scores = {name: sets[str(photos)] for name, sets in left["scores"].items()}
    assert set(scores) == {"ours", "timm", "hf", "towers", "mean"}
    for name, found in scores.items():
        assert ("zero-shot/top-1" in found) == (name == "towers")
        for value in found.values():
            assert value["low"] <= value["mean"] <= value["high"], value
    assert scores["mean"]["linear"]["mean"] == scores["mean"]["segmentation/miou"]["mean"] == 1.0  # colour is the class
    assert scores["towers"]["knn@5"] == scores["ours"]["knn@5"]  # the same image tower
    assert rows[-6] == "ours: 16 patches an image at most, as asked"
    assert left["about"]["shown to hf"] == "16 patches an image at most, as asked"
    page = (tmp_path / "out" / "encoders.html").read_text()
    assert "16 patches an image at most" in page
    assert page.count("<img ") > 5 * (3 + 2)
    assert "green" in page


def test_other_sources_and_probes_by_name(encoders, tmp_path, monkeypatch, capsys):
    for part, first in (("train", 0), ("test", 90)):
        members = {}
        for n in range(9):
            name = list(COLOURS)[n % 3]
            members |= {f"{n}.png": encoded(pixels(name, first + n)), f"{n}.cls": name, f"{n}.txt": f"all {name}"}
        tar_of(tmp_path / "shards" / part / "0.tar", members)
    write(tmp_path / "shards" / "classes.txt", "\n".join(COLOURS))
    ours = encoders["ours"] / "encoder"
    _run(monkeypatch, ours, encoders["towers"], "--data", tmp_path / "shards", "--probes", "retrieval", "zero-shot",
         "--output", tmp_path / "out", "--square", 56)  # fmt: skip
    said = capsys.readouterr()
    assert "without a text tower, so without retrieval and zero-shot: ours" in said.err
    assert "knn" not in said.out
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder_of_classes(tmp_path / "f" / "train", 3)
    folder_of_classes(tmp_path / "f" / "test", 2, first=50)
    _run(monkeypatch, ours, "--data", f"datasets:imagefolder:{tmp_path}/f", "--probes", "knn", "--limit", 5,
         "--output", tmp_path / "out", "--dtype", "bfloat16")  # fmt: skip
    assert "knn@20" in capsys.readouterr().out
    left = json.loads((tmp_path / "out" / "encoder_scores.json").read_text())
    (found,) = left["scores"]["ours"].values()
    assert found["knn@20"]["n"] == 5


def test_a_test_that_was_fitted_is_told(encoders, tmp_path, monkeypatch, capsys):
    folder_of_classes(tmp_path / "cls", 4)
    folder_of_classes(tmp_path / "super", 6)
    _run(monkeypatch, encoders["ours"] / "encoder", "--data", tmp_path / "super", "--test", tmp_path / "cls",
         "--probes", "knn", "--output", tmp_path / "out")  # fmt: skip
    told = "12 images that are images of the test too"
    assert f"left out of the fit: {told}" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "encoder_scores.json").read_text())["about"]["left out of the fit"] == told
    assert "6 to fit, 12 to judge" in (tmp_path / "out" / "encoders.html").read_text()


def test_without_data_the_built_in_questions_are_asked(encoders, tmp_path, monkeypatch, capsys):
    _run(monkeypatch, encoders["ours"] / "encoder", "--images", 40, "--probes", "knn", "--output", tmp_path)
    rows = capsys.readouterr().out.splitlines()[1:-2]
    assert {row.split()[0] for row in rows} >= {"digit", "shape", "colour"}
    assert all(row.split()[1] == "knn@20" for row in rows)


def test_what_the_user_can_mend_is_one_line(encoders, photos, tmp_path, monkeypatch, capsys):
    ours = encoders["ours"] / "encoder"
    bare = folder_of_classes(tmp_path / "bare", 8)
    for arguments, said in (
        ((ours, "--data", tmp_path / "none"), "no such folder, tar or glob"),
        ((tmp_path / "none", "--data", bare), "no such folder; an encoder is"),
        (("timm:no_such_model", "--data", bare), "timm:no_such_model: cannot be loaded: "),
        (("json:JSONDecoder", "--data", bare), "JSONDecoder is no encoder"),
        (("json:Nothing", "--data", bare), "has no 'Nothing'"),
        ((ours, ours, "--data", bare), "two encoders are called 'ours'"),
        ((ours, "--data", bare, "--probes", "dense"), "has no maps; put the map of IMAGE.jpg"),
        ((ours, "--data", bare, "--probes", "retrieval"), "has no captions"),
        ((ours, "--data", photos, "--probes", "zero-shot"), "no encoder has the text tower that is asked for"),
        ((ours, "--data", bare, "--columns", "img=x"), "'img' is none of image, label"),
        ((ours, "--data", bare, "--k", "0"), "--k must be 1"),
        ((ours, "--probes", "retrieval"), "no answers for retrieval: give --data"),
        ((ours, "--data", bare, "--templates", tmp_path / "none"), "no templates at"),
        ((ours, "--data", bare, "--test", bare), "are the same images"),
    ):
        with pytest.raises(SystemExit) as ended:
            _run(monkeypatch, *arguments, "--output", tmp_path / "out")
        told = capsys.readouterr().err.strip()
        assert ended.value.code == 1, told
        assert told.startswith("error: ")
        assert said in told
        assert "\n" not in told
    assert not (tmp_path / "out").exists()


def test_sources_keep_their_geometry_within_what_is_asked(encoders):
    model, geometry, _ = open_encoder("tests.recipes.test_evaluate_encoder:Means")
    assert (geometry.patch_size, geometry.merge_size) == (14, 2)
    assert type(model).__name__ == "Means"
    one = open_judged(f"x={encoders['ours']}/encoder", "cpu", max_patches=40, towers=False)
    assert (one.name, one.geometry.max_tokens, one.towers) == ("x", 10, None)
    assert one.limit == "40 patches an image at most, as asked"
    assert open_judged(str(encoders["towers"]), "cpu").towers is not None


def test_images_are_shown_as_large_as_an_encoder_knows_them(encoders, tmp_path):
    """A photograph of a telephone, to each kind of encoder; in patches."""
    photo = (3000, 4000)

    def shown(source: object, max_patches: int = 0) -> tuple[int, str]:
        one = open_judged(str(source), "cpu", max_patches)
        if isinstance(one.towers, AlignedTowers):
            assert one.towers.geometry == one.geometry
        return math.prod(image_grid(*photo, one.geometry)), one.limit.partition(", ")[2]

    patches, why = shown(encoders["ours"] / "encoder")
    assert 900 < patches <= PATCHES
    assert why == "by default"
    save_encoder(tmp_path / "small", CogViT(cogvit_debug()), replace(GEOMETRY, max_tokens=20))
    assert shown(tmp_path / "small")[0] <= 80
    assert shown(tmp_path / "small")[1] == "by its geometry"
    assert 1000 < shown(tmp_path / "small", 1200)[0] <= 1200
    for kind, cells in (("transformers", 4), ("timm", 4)):  # 56 pixels: 4 patches of 14, and 3.5 of 16
        patches, why = shown(encoders[kind])
        assert patches <= cells**2
        assert why == "as the model was made for"
    own = shown("tests.recipes.test_evaluate_encoder:Means")
    assert 900 < own[0] <= PATCHES


def test_aligned_towers_see_what_their_training_showed_in_all_probes(tmp_path, capsys):
    vocab = Vocab.train(["all red", "all green", "all blue"] * 3, 300)
    towers = Alignment(CogViT(cogvit_debug()), TextTower(text_debug(vocab.size)), AlignmentConfig(width=16))
    save_image_text(tmp_path / "both", towers, GEOMETRY, vocab, max_text=16, max_patches=48)
    for with_text in (True, False):
        one = open_judged(str(tmp_path / "both"), "cpu", towers=with_text)
        assert one.geometry.max_tokens * 4 == 48
        assert one.limit == "48 patches an image at most, as its training had"
    asked = open_judged(str(tmp_path / "both"), "cpu", 20)
    assert isinstance(asked.towers, AlignedTowers)
    assert asked.towers.geometry == asked.geometry == GEOMETRY.within(20)


@pytest.mark.parametrize(("name", "cells"), [("siglip2", 64), ("dinov3", 14 * 14)])
def test_foreign_models_say_what_size_they_were_made_for(name, cells):
    """SigLIP2 counts patches, DINOv3 pixels: 224 of them, in patches of 16."""
    assert native_patches(new_backbone(name, 32, 1, 2, 16)) == cells


def test_an_odd_grid_is_lifted_to_whole_tokens():
    ensure_torchvision()
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=224)
    backbone = wrap(ConvNextModel(config).eval())
    assert native_patches(backbone) == 49
    assert native_patches(backbone, 2) == 64


def _sources(root: Path) -> dict[str, Path | str]:
    """Every kind of source of 60 images, no two of which are equal, with and without splits of its own."""
    made = {(name, n): encoded(pixels(name, n)) for name in COLOURS for n in range(20)}
    folder_of_classes(root / "folder", 20)
    folder_of_classes(root / "split" / "train", 14)
    folder_of_classes(root / "split" / "test", 6, first=14)
    members: dict[str, bytes | str] = {}
    for (name, n), data in made.items():
        members |= {f"{name}{n}.png": data, f"{name}{n}.txt": f"{name} {n}"}
    tar_of(root / "tars" / "0.tar", members)
    for part, some in (("train", slice(80)), ("test", slice(80, None))):
        tar_of(root / "tar splits" / part / "0.tar", dict(list(members.items())[some]))
    with ShardWriter(root / "records") as writer:
        for name, n in made:
            boxes = (Region(0, (0, 0, 20, 20), f'button "{name}"'),)
            parts = (Image(), Text(f"{name} {n}"))
            writer.write(Record(f"{name}{n}", "s", parts=parts, images=(encode_image(pixels(name, n)),), boxes=boxes))
    found: dict[str, Path | str] = {path.name: path for path in root.iterdir()}
    found["hub"], found["hub splits"] = f"datasets:imagefolder:{root}/folder", f"datasets:imagefolder:{root}/split"
    return found


@pytest.mark.parametrize("kind", ["folder", "split", "tars", "tar splits", "records", "hub", "hub splits"])
def test_training_on_a_source_leaves_out_what_the_command_judges_by(kind, tmp_path, monkeypatch):
    """By the defaults of both commands, whatever the seed of the training."""
    if kind.startswith("hub"):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = str(_sources(tmp_path / "sources")[kind])
    args = evaluate_encoder.parser().parse_args(["x", "--data", source])
    options = DataOptions(ColumnsConfig(), args.limit, args.square, args.seed)
    question = users_question(source, args.test, (), options)
    judged = {example.image.tobytes() for example in question.test.read()}
    fitted = {example.image.tobytes() for example in question.train.read()}
    config = StageConfig(str(tmp_path / "run"), seed=5, mix={"mine": 1.0}, sources={"mine": source}, split="train")
    gallery = pictures(config, GEOMETRY, World(0, 1, 0, torch.device("cpu")), kinds=("button",))
    shown = [gallery(n) for n in range(len(fitted))]  # one epoch
    assert {picture.image.tobytes() for picture in shown} == fitted
    assert judged
    assert not judged & fitted
    assert all(picture.things for picture in shown) == (kind == "records")  # boxes come along
