"""Suites written as lmms-eval and VLMEvalKit read them; the judge stays ours, and is asked by what is written."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evals.bridges.exam import Exam, Question, Source, digest
from evals.suite import Suite
from mmagent.files import write_text
from mmagent.records import encode_image

if TYPE_CHECKING:
    import pandas

LMMS_TASKS = "evals.bridges.lmms_task"


def task_name(source: Source) -> str:
    """Of a suite in other harnesses."""
    return f"mmagent_{source.suite}"


def write_lmms(source: Source, folder: Path) -> Path:
    """Write ``folder/mmagent_SUITE.yaml`` and the questions beside it; for ``lmms-eval --include_path folder --tasks
    mmagent_SUITE``. Returns the YAML's path.

    Raises ``ValueError`` for a suite that cannot be bridged.
    """
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets import Image as ImageFeature

    with _Exam(source) as (suite, pinned, exam):
        rows = [_lmms_row(exam.question(key), pinned) for key in exam.names()]
    texts = ("key", "task", "source", "rules", "layout")
    features = Features(
        {**{name: Value("string") for name in texts}, "words": List(Value("string")), "images": List(ImageFeature())}
    )
    name = task_name(source)
    folder.mkdir(parents=True, exist_ok=True)
    DatasetDict({"test": Dataset.from_list(rows, features=features)}).save_to_disk(str(folder / name))
    play = suite.play
    path = folder / f"{name}.yaml"
    write_text(
        path,
        f"""# {suite.summary}
# Judge: {suite.judge}
task: {name}
dataset_path: {json.dumps(str((folder / name).resolve()))}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_messages: !function {LMMS_TASKS}.messages
doc_to_visual: !function {LMMS_TASKS}.pictures
doc_to_text: !function {LMMS_TASKS}.words
doc_to_target: key
generation_kwargs:
  max_new_tokens: {play.max_tokens}
  temperature: {play.temperature:g}
  top_p: {play.top_p:g}
  do_sample: {json.dumps(play.temperature > 0)}
  until: []
process_results: !function {LMMS_TASKS}.judged
metric_list:
  - metric: score
    aggregation: !function {LMMS_TASKS}.mean_over_tasks
    higher_is_better: true
metadata:
  version: {suite.version}
""",
    )
    return path


def write_vlmeval(source: Source, folder: Path) -> Path:
    """Write ``folder/mmagent_SUITE.tsv`` and its pictures into ``folder/images``; ``folder`` is VLMEvalKit's, which it
    looks for in the variable ``LMUData``. Returns the table's path.

    Raises ``ValueError`` for a suite that cannot be bridged.
    """
    name = task_name(source)
    pictures = folder / "images" / name
    pictures.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(("index", "key", "task", "source", "question", "pieces"))]
    with _Exam(source) as (_, pinned, exam):
        for number, key in enumerate(exam.names()):
            asked = exam.question(key)
            pieces = [{"type": "text", "value": asked.rules, "role": "system"}] if asked.rules else []
            for place, piece in enumerate(asked.pieces):
                if isinstance(piece, str):
                    pieces.append({"type": "text", "value": piece})
                else:
                    file = pictures / f"{number}_{place}.png"
                    file.write_bytes(encode_image(piece).data)
                    pieces.append({"type": "image", "value": file.name})
            words = "\n".join(piece for piece in asked.pieces if isinstance(piece, str))
            cells = (str(number), key, asked.task, pinned.text(), words, json.dumps(pieces))
            lines.append("\t".join(map(_cell, cells)))
    path = folder / f"{name}.tsv"
    write_text(path, "\n".join(lines) + "\n")
    return path


class _Exam:
    """The exam of a source that is opened for writing, and the source with the suite's digest."""

    def __init__(self, source: Source):
        self.suite = source.build()
        self.source = dataclasses.replace(source, pinned=digest(self.suite))
        self.exam = Exam(self.suite, source.limit)

    def __enter__(self) -> tuple[Suite, Source, Exam]:
        return self.suite, self.source, self.exam

    def __exit__(self, *_: object) -> None:
        self.exam.close()


def _lmms_row(asked: Question, source: Source) -> dict[str, object]:
    return {
        "key": asked.key,
        "task": asked.task,
        "source": source.text(),
        "rules": asked.rules,
        "layout": "".join("T" if isinstance(piece, str) else "I" for piece in asked.pieces),
        "words": [piece for piece in asked.pieces if isinstance(piece, str)],
        "images": [{"bytes": encode_image(p).data, "path": None} for p in asked.pieces if not isinstance(p, str)],
    }


def _cell(text: str) -> str:
    """A value of a table whose cells are quoted where they must be."""
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '\t\n\r"') else text


def read_answers(path: Path | str) -> pandas.DataFrame:
    """A table of answers that VLMEvalKit wrote (xlsx, tsv, csv or json), every cell the text that it was. Its own
    reader has pandas guess: of nothing but numbers "007" is 7, "3" beside an empty one 3.0, and "NA" is none at all."""
    import pandas

    if Path(path).suffix == ".json":
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return pandas.DataFrame([{name: "" if v is None else str(v) for name, v in row.items()} for row in rows])
    texts: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    if Path(path).suffix == ".xlsx":
        return pandas.read_excel(path, **texts)
    return pandas.read_csv(path, sep="\t" if Path(path).suffix == ".tsv" else ",", **texts)


def pixels(picture: bytes | str | Path | Image.Image) -> np.ndarray:
    """A picture as other harnesses hand it over, ``(height, width, 3)`` uint8."""
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture))
    elif not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    return np.asarray(picture.convert("RGB"))


def in_order(layout: str, words: list[str], images: list[object]) -> Iterator[object]:
    """Texts and pictures of a row in their order."""
    texts, pictures = iter(words), iter(images)
    for kind in layout:
        yield next(texts) if kind == "T" else next(pictures)
