"""Every training recipe at debug size on data that needs no browser, each on what the one before it leaves."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from data_pipelines.build import BuildConfig, build
from data_pipelines.shards import ShardWriter
from mmagent.chat import Image, Text
from mmagent.records import EncodedImage, Record, Region, encode_image
from mmagent.train.hooks import read_jsonl
from mmagent.worlds.questions import KINDS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RECIPES = ("teacher-siglip2", "teacher-dinov3", "distill", "align", "pretrain", "sft", "diffusion")
STEPS = 4
BROKEN = "boxes-5"


def make_data(folder: Path) -> None:
    """Shards and a vocabulary from drawn scenes and texts."""
    pretrain = {"captions": 40, "interleaved": 20, "text": 40}
    held_out = {"captions": 24, "interleaved": 10, "text": 24}
    build(BuildConfig(folder=str(folder), pretrain=pretrain, validation=held_out, browser="none", vocab_size=600))
    make_boxes(folder / "boxes")


def make_boxes(folder: Path, count: int = 24) -> None:
    """Shards of pictures with labelled boxes, as screens have; the image of :data:`BROKEN` cannot be decoded."""
    with ShardWriter(folder) as writer:
        for n in range(count):
            random = np.random.default_rng([11, n])
            picture = np.full((84, 112, 3), 240, np.uint8)
            boxes = []
            for left in (0, 56):  # one thing in each half
                x, y = left + int(random.integers(2, 14)), int(random.integers(2, 30))
                kind = KINDS[int(random.integers(len(KINDS)))]
                picture[y : y + 40, x : x + 36] = random.integers(0, 200, 3)
                boxes.append(Region(0, (x, y, x + 36, y + 40), f'{kind} "{n}"'))
            image, key = encode_image(picture), f"boxes-{n}"
            image = EncodedImage(image.data[:100], "png") if key == BROKEN else image
            parts = (Image(), Text("Two things."))
            writer.write(Record(key, "boxes", parts=parts, images=(image,), boxes=tuple(boxes)))


def arguments(recipe: str, root: Path, output: Path) -> list[str]:
    """``MODULE --preset ...`` of a recipe whose inputs lie in ``root``, the outputs of :func:`train_all`."""
    tokenizer, shards = f"tokenizer={root}/data/tokenizer.json", f"data.folder={root}/data/pretrain"
    end = [f"output={output}"]
    teacher = [f"steps={STEPS}", "width=32", "depth=2", "heads=2", "save_every=2", "data.images_per_step=8"]
    teacher += ["data.patches_per_microbatch=256", tokenizer, *end]
    sources = [f"teachers.{kind}.source={root}/teacher-{kind}/teacher" for kind in ("siglip2", "dinov3")]
    return {
        "teacher-siglip2": ["recipes.teachers", "--preset", "siglip2", *teacher],
        "teacher-dinov3": ["recipes.teachers", "--preset", "dinov3", *teacher],
        "distill": [
            *(
                "recipes.distill_encoder",
                "--preset",
                "debug",
                *sources,
                "average.decay=0.5",
                "objective.drop=0.3",
                *end,
            ),
        ],
        "align": [
            "recipes.align_encoder",
            "--preset",
            "debug",
            f"init={root}/distill/encoder",
            tokenizer,
            f"sources.captions={root}/data/pretrain/captions",
            "mix.captions=0.5",
            f"sources.boxes={root}/data/boxes",
            "mix.boxes=0.5",
            "average.decay=0.5",
            "role_schedules.text.warmup=3",
            "optim.role_lr.encoder=0.5",
            *end,
        ],
        "pretrain": ["recipes.pretrain", "--preset", "debug", f"encoder={root}/align/encoder", tokenizer, shards, *end],
        "sft": ["recipes.sft", "--preset", "debug", f"init={root}/pretrain/agent", shards, *end],
        "own_ways": [
            *("recipes.own_ways", "--preset", "debug", f"init={root}/diffusion/agent"),
            *(f"data={root}/data/pretrain", "verify=false", *end),
        ],
        "diffusion": ["recipes.diffusion", "--preset", "debug", f"init={root}/pretrain/agent", shards, *end],
    }[recipe]


def run_here(recipe: str, root: Path, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """One recipe in this process; the rows of its log."""
    module, *rest = arguments(recipe, root, output)
    with mock.patch.object(sys, "argv", [module, *rest, *overrides]):
        importlib.import_module(module).main()
    return read_jsonl(output / "log.jsonl")


def train_all(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Data and all recipes in order, into folders of their names; ``{recipe: rows}``."""
    make_data(root / "data")
    return {recipe: run_here(recipe, root, root / recipe) for recipe in RECIPES}


def start(recipe: str, root: Path, output: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    """One recipe as a user launches it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", *arguments(recipe, root, output), *overrides]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
