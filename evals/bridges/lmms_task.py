"""What the YAML of `evals.bridges.export` names: a question's messages for lmms-eval, and our judge of the answers. And
the way back: messages of lmms-eval as what our models are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from evals.bridges.answers import Asked
from evals.bridges.exam import exam
from evals.bridges.export import in_order, pixels

Doc = Mapping[str, Any]


def messages(doc: Doc) -> list[dict[str, Any]]:
    """For models that are asked by chat: the rules as system message, then text and pictures in their order."""
    content = [
        {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image", "url": piece}
        for piece in in_order(doc["layout"], doc["words"], pictures(doc))
    ]
    asked = [{"role": "user", "content": content}]
    if not doc["rules"]:
        return asked
    return [{"role": "system", "content": [{"type": "text", "text": doc["rules"]}]}, *asked]


def pictures(doc: Doc) -> list[Image.Image]:
    return [image.convert("RGB") for image in doc["images"]]


def words(doc: Doc) -> str:
    """For models that take one text behind all pictures."""
    return "\n\n".join([*([doc["rules"]] if doc["rules"] else []), *doc["words"]])


def judged(doc: Doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One answer's score, with the task that it belongs to."""
    score = exam(doc["source"]).judge(doc["key"], results[0])
    return {"score": {"key": doc["key"], "task": doc["task"], "score": score.value}}


def mean_over_tasks(scored: Sequence[Mapping[str, Any]]) -> float:
    """Our score of a run: the mean over tasks of the means of their items."""
    by_task: dict[str, list[float]] = {}
    for one in scored:
        by_task.setdefault(one["task"], []).append(one["score"])
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def asked(messages: Sequence[Mapping[str, Any]], told: Mapping[str, Any], name: str) -> Asked:
    """Messages of lmms-eval as a question; ``told`` are its generation arguments.

    Raises ``ValueError``, naming the question, for several turns, videos and sounds.
    """
    by_role: dict[str, list[list[Any]]] = {"system": [], "user": []}
    for message in messages:
        if message["role"] not in by_role:
            raise ValueError(f"{name}: mmagent takes one turn here, and this is a conversation")
        by_role[message["role"]].append([_piece(part, name) for part in message["content"]])
    if len(by_role["user"]) != 1:
        raise ValueError(f"{name}: mmagent takes one turn here, and these are {len(by_role['user'])}")
    temperature = float(told.get("temperature") or 0.0) if told.get("do_sample", True) else 0.0
    return Asked(
        tuple(by_role["user"][0]),
        "\n".join(piece for part in by_role["system"] for piece in part),
        int(told.get("max_new_tokens", 1024)),
        temperature,
        float(told.get("top_p") or 1.0),
    )


def _piece(part: Mapping[str, Any], name: str) -> Any:
    match part["type"]:
        case "text":
            return part["text"]
        case "image":
            return pixels(part["url"])
    raise ValueError(f"{name}: mmagent is shown no {part['type']} here, only text and pictures")
