"""Documents as questions: what stands before the first answer, and the answer that should come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.documents import DocumentBuilder
from data_pipelines.shards import ShardSet
from mmagent.geometry import visual_tokens
from mmagent.records import RecordError, from_sample
from mmagent.trajectories import Completion, Trajectory
from mmagent.types import Document

TRIED = 50
"""Samples looked at for each question wanted: those without a prompt, an answer or sound pictures are passed over."""


def question(document: Document, image_id: int, merge_size: int) -> tuple[Trajectory, list[int]] | None:
    """The prompt, with the pictures that are seen by then, and the ids of the first answer; None where the document has
    no prompt or no answer."""
    said = [*document.trainable.tolist(), False]
    start = said.index(True) if True in said else 0
    if not start:
        return None
    ids = document.input_ids.tolist()
    seen, slots = 0, ids[:start].count(image_id)
    while slots > 0:
        slots -= visual_tokens(document.images[seen].grid, merge_size)
        seen += 1
    prompt = Trajectory(document.key, document.source, document.key)
    prompt.extend(ids[:start], trainable=False, images=document.images[:seen])
    return prompt, ids[start : said.index(False, start)]


def verbatim(asked: Sequence[tuple[Trajectory, list[int]]]) -> Callable[[Trajectory, Completion], float]:
    """A verifier of these questions: 1 for the answer of the document, token for token, else 0."""
    known = {prompt.key: tuple(answer) for prompt, answer in asked}
    return lambda prompt, completion: float(completion.ids == known[prompt.key])


class Questions:
    """Of all shards under ``folder``, one sub-folder a source, each as likely. A draw is a function of its seed."""

    def __init__(self, folder: Path | str, builder: DocumentBuilder, image_id: int, merge_size: int):
        """Raises ``ValueError`` naming a folder without shards."""
        paths = sorted({tar.parent for tar in Path(folder).glob("*/*.tar")})
        if not paths:
            raise ValueError(f"{folder}: no sub-folder with shards in it")
        self.sources = [ShardSet(path) for path in paths]
        self.builder, self.image_id, self.merge_size, self.folder = builder, image_id, merge_size, str(folder)

    def draw(self, seed: int, count: int, longest: int) -> list[tuple[Trajectory, list[int]]]:
        """``count`` questions whose prompt and answer together have at most ``longest`` tokens. Raises ``ValueError``
        where hardly any sample is one."""
        rng, found = np.random.default_rng(seed), []
        for _ in range(TRIED * count):
            source = self.sources[int(rng.integers(len(self.sources)))]
            at = int(rng.integers(len(source)))
            try:
                asked = question(self.builder.document(from_sample(source.read(at))), self.image_id, self.merge_size)
            except RecordError:
                continue  # training leaves it out, too, and says so
            if asked is not None and len(asked[0]) + len(asked[1]) <= longest:
                found.append(asked)
                if len(found) == count:
                    return found
        raise ValueError(
            f"{self.folder}: {len(found)} questions of at most {longest} tokens in {TRIED * count} draws, not {count}"
        )
