"""VLMEvalKit with our suites and models: its own command, with both made known to it.

    LMUData=FOLDER python -m evals.bridges.vlmeval --checkpoint DIR --data mmagent_SUITE --work-dir OUT
    LMUData=FOLDER python -m evals.bridges.vlmeval --url URL --name NAME --data MMStar ...

It has no place for plugins. What it does not find here it takes as its own ``run.py`` would.
"""

from __future__ import annotations

import argparse
import json
import os.path
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from vlmeval import dataset as datasets
from vlmeval.config import supported_VLM
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.smp import LMUDataRoot, dump, load
from vlmeval.vlm.base import BaseModel

from evals.bridges.answers import Answerer, Asked
from evals.bridges.exam import exam
from evals.bridges.export import pixels, read_answers

MODEL = "mmagent"


class MmagentDataset(ImageBaseDataset):
    """Suites that `evals.bridges.export.write_vlmeval` wrote into VLMEvalKit's folder, judged by us."""

    TYPE = "VQA"

    @classmethod
    def supported_datasets(cls) -> list[str]:
        return sorted(path.stem for path in Path(LMUDataRoot()).glob("mmagent_*.tsv"))

    def load_data(self, dataset: str) -> Any:
        """The table of ``dataset``; pictures lie beside it."""
        table = load(os.path.join(LMUDataRoot(), f"{dataset}.tsv"))
        table["image_path"] = ["[]"] * len(table)  # where its own loaders look; ours stand among the pieces
        return table

    def build_prompt(self, line: Any) -> list[dict[str, str]]:
        """Text and pictures in their order; rules come first and say that they are the system's."""
        line = self.data.iloc[line] if isinstance(line, int) else line
        pieces = json.loads(line["pieces"])
        for piece in pieces:
            if piece["type"] == "image":
                piece["value"] = os.path.join(self.img_root, piece["value"])
        return pieces

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """``Overall``: the mean over tasks, in percent, and each task's own; the items' lie beside ``eval_file``.

        Raises what our judge raises: an error is no zero."""
        table = read_answers(eval_file)
        scores = [exam(line["source"]).judge(line["key"], line["prediction"]).value for _, line in table.iterrows()]
        table["score"] = scores
        dump(table, os.path.splitext(eval_file)[0] + "_scored.json")
        by_task: dict[str, list[float]] = {}
        for task, score in zip(table["task"], scores, strict=True):
            by_task.setdefault(str(task), []).append(score)
        means = {task: 100 * float(np.mean(values)) for task, values in by_task.items()}
        return {"Overall": float(np.mean(list(means.values()))), **means}


class MmagentModel(BaseModel):
    """A checkpoint or an endpoint, asked as `evals` asks it."""

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(self, max_tokens: int = 1024, **who: str):
        """``who``: :meth:`evals.bridges.answers.Answerer.of`."""
        super().__init__()
        self.answerer, self.max_tokens = Answerer.of(**who), max_tokens

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        rules = "\n".join(piece["value"] for piece in message if piece.get("role") == "system")
        pieces = tuple(
            piece["value"] if piece["type"] == "text" else pixels(piece["value"])
            for piece in message
            if piece.get("role") != "system"
        )
        (answer,) = self.answerer.answers([Asked(pieces, rules, self.max_tokens)])
        return answer


def register(**model: Any) -> None:
    """Make our suites known to VLMEvalKit and, if any arguments are given, a model named ``mmagent``."""
    if MmagentDataset not in datasets.DATASET_CLASSES:
        datasets.DATASET_CLASSES.insert(0, MmagentDataset)
    if model:
        supported_VLM[MODEL] = partial(MmagentModel, **model)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evals.bridges.vlmeval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="", metavar="DIR", help="the model: a folder that training wrote")
    parser.add_argument("--url", default="", help="the model: an endpoint, up to and including /v1")
    parser.add_argument("--name", default="", metavar="NAME", help="the endpoint's name of the model")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of an answer (default 1024)")
    args, rest = parser.parse_known_args(argv)
    model: dict[str, Any] = {}
    if args.checkpoint or args.url:
        model = {"checkpoint": args.checkpoint, "url": args.url, "model": args.name, "max_tokens": args.max_tokens}
    register(**model)
    from vlmeval.run import main as run

    sys.argv = ["vlmeval", *rest, *(["--model", MODEL] if model else [])]
    run()


if __name__ == "__main__":
    main()
