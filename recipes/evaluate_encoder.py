"""Evaluate encoders side by side: nearest neighbours, linear and dense probes, zero-shot classification, retrieval.

    python -m recipes.evaluate_encoder runs/distill/encoder timm:vit_small_patch14_dinov2 --data photos
    python -m recipes.evaluate_encoder mine=runs/align/image_text other=google/siglip2-base-patch16-224 --data photos \\
        --probes zero-shot retrieval

Without --data the built-in questions are asked, which need no download. Prints scores with 95 % intervals and leaves
them in OUTPUT/encoder_scores.json, and with bars, pictures, predictions and predicted maps in OUTPUT/encoders.html.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import torch

from data_pipelines.hub_images import ColumnsConfig
from evals.encoder.battery import PROBES, Measured, Probe, Probing, measure, measure_towers
from evals.encoder.features import Whole
from evals.encoder.page import Results, render, score_table
from mmagent.files import write_text
from mmagent.interop.zero_shot import ENGLISH, class_embeddings, load_templates
from mmagent.ops.devices import chosen_device
from mmagent.train.launch import launch
from recipes.encoder_sources import Judged, open_judged
from recipes.probe_data import DataOptions, Question, built_in_questions, users_question

TOWERS = {"zero-shot", "retrieval"}
DATA = """a folder of images (CLASS/image.jpg; captions in image.txt or metadata.jsonl; maps in image.mask.png and
image.depth.png), webdataset shards, or datasets:ID[:SPLIT]; without splits it is split by a hash of names"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m recipes.evaluate_encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "encoders", nargs="+", metavar="[NAME=]ENCODER", help="an encoder folder, a folder of aligned towers, "
        "timm:NAME, a folder or hub id of transformers, or package.module:Class"
    )  # fmt: skip
    add = made.add_argument_group("what is asked").add_argument
    add("--data", metavar="SOURCE", help=DATA.replace("\n", " "))
    add("--test", metavar="SOURCE", default="", help="images to judge by, from elsewhere; all of --data is then fitted")
    add("--probes", nargs="+", choices=PROBES, default=[], help="default: all that there are answers for")
    columns = ", ".join(one.name for one in fields(ColumnsConfig))
    told = f"where types do not tell: {columns}"
    add("--columns", nargs="+", metavar="KIND=COLUMN", default=[], help=told)
    add("--limit", type=int, default=0, metavar="N", help="at most N images a set, drawn by the seed")
    told = "of a built-in set to fit, 2/3 N to judge (%(default)s)"
    add("--images", type=int, default=600, metavar="N", help=told)
    add("--seed", type=int, default=0, help="of splits and of --limit (%(default)s)")
    add = made.add_argument_group("how").add_argument
    add("--max-patches", type=int, default=0, metavar="N", help="shrink images to N patches (what the encoder knows)")
    add("--square", type=int, default=0, metavar="PIXELS", help="show squares of so many pixels (native shape)")
    add("--k", nargs="+", type=int, default=[20], metavar="K", help="neighbours that vote (20)")
    add("--features", choices=get_args(Whole), default="both", help="what the linear probe reads (%(default)s)")
    add("--templates", metavar="FILE", help="prompts for names of classes, one a line with {} (built-in English ones)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products (%(default)s)")
    add("--device", default="", help="(cuda if there is one, else cpu)")
    add("--output", type=Path, default=Path("runs/encoders"), metavar="FOLDER", help="(%(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.limit, args.max_patches, args.square, args.seed) < 0 or min(*args.k, args.images - 1) < 1:
        raise ValueError("--k must be 1 and --images 2 at least, and no other number negative")
    args.device = chosen_device(args.device)
    templates = load_templates(args.templates) if args.templates else ENGLISH
    chosen = dict(pair.partition("=")[::2] for pair in args.columns)
    if wrong := sorted(set(chosen) - {one.name for one in fields(ColumnsConfig)}):
        raise ValueError(f"--columns: {wrong[0]!r} is none of {', '.join(one.name for one in fields(ColumnsConfig))}")
    options = DataOptions(ColumnsConfig(**chosen), args.limit, args.square, args.seed)
    questions = (
        [users_question(args.data, args.test, args.probes, options)]
        if args.data
        else built_in_questions(args.images, args.probes, args.square)
    )
    asked = {probe for question in questions for probe in question.probes}
    smallest = 0 if args.data else 1  # digits of 56 pixels are shown as they are
    judged = [open_judged(one, args.device, args.max_patches, smallest, bool(asked & TOWERS)) for one in args.encoders]
    _check(judged, asked, bool(args.probes))
    how = Probing(ks=tuple(args.k), whole=args.features, dtype=getattr(torch, args.dtype), device=args.device)
    results = {one.name: {q.name: _measured(one, q, how, templates) for q in questions} for one in judged}
    about: dict[str, object] = {name: str(value) for name, value in vars(args).items() if value}
    about |= {f"shown to {one.name}": one.limit for one in judged} | _left_out(questions)
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "encoder_scores.json", json.dumps(_plain(results, about), indent=1) + "\n")
    page = args.output / "encoders.html"
    write_text(page, render(results, {q.name: q.test.classes for q in questions}, about))
    shown = "\n".join(f"{one.name}: {one.limit}" for one in judged)
    print(f"{score_table(results)}\n{shown}\npictures: {page}")


def _left_out(questions: Sequence[Question]) -> dict[str, object]:
    """What images took no part, told on stderr and for the page."""
    out: dict[str, object] = {}
    for question in questions:
        if question.copies:
            out["left out of the fit"] = f"{question.copies} images that are images of the test too"
            print(f"{question.name}: left out of the fit: {out['left out of the fit']}", file=sys.stderr)
        for unusable in (part for part in question.unusable if part.problems):
            print(unusable, file=sys.stderr)
            out[f"left out of {unusable.source}"] = f"{len(unusable.problems)} of {unusable.total} images"
    return out


def _check(judged: list[Judged], asked: set[Probe], by_name: bool) -> None:
    """Every name is one encoder's, and there is somebody to answer what was ``asked`` ``by_name``."""
    names = [one.name for one in judged]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two encoders are called {doubled.pop()!r}: write NAME=ENCODER")
    blind = [one for one in judged if one.towers is None]
    if not asked & TOWERS or not blind:
        return
    if not asked - TOWERS and len(blind) == len(judged):
        raise ValueError(f"no encoder has the text tower that is asked for: {blind[0].why_blind}")
    if by_name:
        print(f"without a text tower, so without {' and '.join(sorted(asked & TOWERS))}: "
              f"{', '.join(one.name for one in blind)}", file=sys.stderr)  # fmt: skip


def _measured(one: Judged, question: Question, how: Probing, templates: Sequence[str]) -> Measured:
    here = replace(how, probes=question.probes)
    measured = measure(one.encoder, one.geometry, question.train, question.test, here)
    if one.towers is None or not TOWERS & set(question.probes):
        return measured
    classes = None
    if "zero-shot" in question.probes:
        classes = class_embeddings(one.towers, [name.replace("_", " ") for name in question.test.classes], templates)
    return measured.with_(measure_towers(one.towers, question.test, classes, here))


def _plain(results: Results, about: dict[str, object]) -> dict[str, object]:
    scores = {
        encoder: {name: {score: asdict(value) for score, value in m.scores.items()} for name, m in sets.items()}
        for encoder, sets in results.items()
    }
    return {"about": about, "scores": scores}


if __name__ == "__main__":
    launch(main)
