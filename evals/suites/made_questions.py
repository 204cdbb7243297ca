"""Small splits of published question sets, made from our own worlds and written as the sets are published."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evals.published_sets import LETTER_DIRECTLY
from mmagent.chat import Video
from mmagent.files import write_text
from mmagent.records import encode_image
from mmagent.tasks.worlds import WorldTask
from mmagent.videos import video_library
from mmagent.worlds import search
from mmagent.worlds.catalogue import choose_worlds
from mmagent.worlds.examples import Example

SEED = 700
"""Of what is made here; no other suite uses it."""
VSTAR_EACH = 9
"""Questions of each kind of :data:`CATEGORIES`."""
CATEGORIES = {"search/attribute": "direct_attributes", "search/position": "relative_position"}
_FORM = re.compile(
    r" Answer with (?:a number(?: of degrees|, in \w+)?|its name|one word|the text as printed|the cell's text)\.$"
)


def make_vstar(folder: Path) -> None:
    """V*Bench; nine questions of each kind."""
    lines: list[dict[str, Any]] = []
    for world in search.worlds():
        if world.name not in CATEGORIES:
            continue
        category = CATEGORIES[world.name]
        (folder / category).mkdir(parents=True)
        task = WorldTask(world)
        for item in islice(task.items("test", SEED), VSTAR_EACH):
            example = task.example(item)
            question, _, told = example.question.partition(" Answer with one of ")
            words = told.rstrip(".").split(", ")
            random.Random(item.seed).shuffle(words)
            letters = "ABCDEFGH"[: len(words)]
            options = "".join(f"\n({letter}) {word}" for letter, word in zip(letters, words, strict=True))
            row = {
                "image": _picture(example, folder, f"{category}/made_{item.seed}.png"),
                "text": f"{question}{options}\n{LETTER_DIRECTLY}",
                "category": category,
                "label": letters[words.index(example.answer)],
                "question_id": str(len(lines)),
            }
            lines.append(row)
    _write_lines(folder / "test_questions.jsonl", lines)


def make_chartqa(folder: Path) -> None:
    """ChartQA; 12 questions that ask for more than a reading, 8 that do not."""
    for part, worlds in {"human": ("charts/compare", "charts/calculate"), "augmented": ("charts/value",)}.items():
        rows = [
            {"imgname": _name(example, folder / "test/png"), "query": question, "label": example.answer}
            for world in worlds
            for example, question in _examples(world, 6 if part == "human" else 8)
        ]
        _write_json(folder / f"test/test_{part}.json", rows)


def make_ocrbench(folder: Path) -> None:
    """OCRBench; six questions of each of three kinds."""
    rows = []
    for world, kind, source in (
        ("documents/lookup", "Key Information Extraction", "made"),
        ("tables/lookup", "Doc-oriented VQA", "made"),
        ("formulas/latex", "Handwritten Mathematical Expression Recognition", "HME100k"),
    ):
        for example, question in _examples(world, 6):
            name = _name(example, folder / "OCRBench_Images")
            row = {"dataset_name": source, "type": kind, "question": question, "answers": [example.answer]}
            rows.append({**row, "id": len(rows), "image_path": name})
    _write_json(folder / "OCRBench/OCRBench.json", rows)


def make_docvqa(folder: Path) -> None:
    """DocVQA; 16 questions about forms and tables."""
    rows: list[dict[str, Any]] = []
    for world, kind in (("documents/lookup", "form"), ("tables/lookup", "table/list")):
        for example, question in _examples(world, 8):
            name = f"documents/{_name(example, folder / 'val/documents')}"
            row = {"questionId": len(rows), "question": question, "image": name, "answers": [example.answer]}
            rows.append({**row, "question_types": [kind]})
    _write_json(folder / "val/val_v1.0_withQT.json", {"dataset_name": "made", "data": rows})


def make_textvqa(folder: Path) -> None:
    """TextVQA; 12 questions on which seven of ten people agree."""
    rows = []
    for example, question in _examples("documents/lookup", 12):
        name = _name(example, folder / "train_images", "jpg").removesuffix(".jpg")
        answers = [example.answer] * 7 + ["unreadable", "nothing", f"{example.answer} or so"]
        rows.append({"question_id": len(rows), "question": question, "image_id": name, "answers": answers})
    _write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "made", "data": rows})


def make_countbench(folder: Path) -> None:
    """CountBenchQA; 16 questions about drawn shapes."""
    rows = [
        {"image": f"images/{_name(example, folder / 'images')}", "question": question, "number": int(example.answer)}
        for example, question in _examples("counting/objects", 40)
        if 2 <= int(example.answer) <= 10  # as in the published set
    ]
    _write_lines(folder / "test.jsonl", rows[:16])


def make_mathvista(folder: Path) -> None:
    """MathVista; six questions each with options, whole numbers and decimals."""
    rows: dict[str, dict[str, Any]] = {}
    queries: dict[str, str] = {}
    for world, task, kind in (
        ("scenes/attribute", "visual question answering", "text"),
        ("geometry/angle", "geometry problem solving", "integer"),
        ("physics/lever", "textbook question answering", "float"),
    ):
        for example, question in _examples(world, 6):
            question, _, told = question.partition(" Answer with one of: ")
            choices = told.rstrip(".").split(", ") if kind == "text" else None
            answer = f"{float(example.answer.split()[0]):.1f}" if kind == "float" else example.answer
            lines = "".join(f"\n({letter}) {words}" for letter, words in zip("ABCDEFGH", choices or (), strict=False))
            row = {
                "pid": str(len(rows) + 1),
                "question": question,
                "image": f"images/{_name(example, folder / 'images')}",
                "choices": choices,
                "unit": None,
                "precision": 1.0 if kind == "float" else None,
                "answer": answer,
                "question_type": "multi_choice" if choices else "free_form",
                "answer_type": kind,
                "metadata": {"category": "made", "context": "synthetic scene", "task": task, "split": "testmini"},
            }
            rows[row["pid"]] = row
            queries[row["pid"]] = f"{_HINTS[kind]}\nQuestion: {question}{lines and chr(10) + 'Choices:'}{lines}"
    _write_json(folder / "data/testmini.json", rows)
    _write_json(folder / "data/query.json", queries)


_HINTS = {"text": "Give the letter of the right choice.", "integer": "Give a whole number.", "float": "One decimal."}


def make_mathvision(folder: Path) -> None:
    """MATH-Vision; 14 problems, half of them with options."""
    rows: list[dict[str, Any]] = []
    for world, subject, choices in (
        ("geometry/length", "metric geometry - length", True),
        ("geometry/area", "metric geometry - area", False),
        ("formulas/evaluate", "arithmetic", False),
    ):
        for example, question in _examples(world, 7 if choices else 4):
            answer, options = example.answer, []
            if choices:
                near = {answer} | {str(int(answer) + step) for step in (-3, 2, 5, 9)}
                options = sorted(near, key=int)
                answer = "ABCDE"[options.index(answer)]
            name = f"images/{_name(example, folder / 'images')}"
            row = {"id": str(len(rows) + 1), "question": f"{question}\n<image1>", "options": options, "image": name}
            rows.append({**row, "answer": answer, "level": example.level + 1, "subject": subject})
    (folder / "data").mkdir()
    _write_lines(folder / "data/test.jsonl", rows)


def make_videomme(folder: Path) -> None:
    """Video-MME; six questions about short clips of each of three kinds."""
    tasks = {"direction": "Action Recognition", "change": "Action Reasoning", "count": "Counting Problem"}
    rows: list[dict[str, Any]] = []
    for world, task in tasks.items():
        for example, question, words in _about_clips(world):
            name, number = f"made_{len(rows):03}", f"{len(rows) + 1:03}"
            _write_video(folder / f"data/{name}.mp4", example)
            row = {
                "video_id": number,
                "duration": "short",
                "domain": "Drawn Shapes",
                "videoID": name,
                "question_id": f"{number}-1",
                "task_type": task,
                "question": question,
                "options": [f"{letter}. {each}." for letter, each in zip("ABCD", words, strict=True)],
                "answer": "ABCD"[words.index(example.answer)],
            }
            rows.append(row)
    _write_lines(folder / "test.jsonl", rows)


def make_mvbench(folder: Path) -> None:
    """MVBench; six questions of each of three tasks."""
    for world, task, source in (
        ("direction", "moving_direction", "clevrer/video_validation"),
        ("change", "state_change", "perception/videos"),
        ("count", "action_count", "perception/videos"),
    ):
        rows = []
        for example, question, words in _about_clips(world):
            name = f"{task}_{len(rows)}.mp4"
            _write_video(folder / "video" / source / name, example)
            rows.append({"video": name, "question": question, "candidates": words, "answer": example.answer})
        _write_json(folder / f"json/{task}.json", rows)


_CLIPS = {"direction": ("right", "left", "up", "down"), "change": (), "count": tuple(map(str, range(7)))}
"""What may be answered about clips of a world; that of "change" stands in its questions."""


def _about_clips(world: str) -> Iterator[tuple[Example, str, list[str]]]:
    """Six examples, each with its question and four options in random order, the right one among them."""
    choices = _CLIPS[world]
    asked = [pair for pair in _examples(f"videos/{world}", 12) if not choices or pair[0].answer in choices]
    for example, question in asked[:6]:
        question, _, told = question.partition(" Answer with one of: ")
        rng = random.Random(example.key)
        others = [words for words in choices or told.rstrip(".").split(", ") if words != example.answer]
        words = [example.answer, *rng.sample(others, 3)]
        rng.shuffle(words)
        yield example, question, words


def _write_video(file: Path, example: Example) -> None:
    """The frames of an example at their times. Raises ``ValueError`` without the library for it."""
    av = video_library()
    file.parent.mkdir(parents=True, exist_ok=True)
    times = next(part.timestamps for part in example.prompt if isinstance(part, Video))
    height, width = example.images[0].shape[:2]
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.qmin = stream.codec_context.qmax = 2  # nearly as it was drawn
        for pixels, second in zip(example.images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(1000 * second), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def _examples(world: str, count: int) -> Iterator[tuple[Example, str]]:
    """Test examples, and what they ask without the form of the answer."""
    (chosen,) = choose_worlds([world])
    task = WorldTask(chosen)
    for item in islice(task.items("test", SEED), count):
        example = task.example(item)
        yield example, _FORM.sub("", example.question)


def _name(example: Example, folder: Path, ending: str = "png") -> str:
    """Write the picture of an example into ``folder``, and what it is called there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"made_{len(list(folder.iterdir()))}.{ending}"
    return _picture(example, folder, name)


def _picture(example: Example, folder: Path, name: str) -> str:
    (folder / name).write_bytes(encode_image(example.images[0]).data)
    return name


def _write_json(file: Path, body: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(body, ensure_ascii=False, indent=1) + "\n")


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
