"""A stream that is thrown away at random moments and begun anew from its state goes on as if nothing had happened."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest

from data_pipelines.mixture import SourceConfig
from data_pipelines.shards import ShardWriter
from data_pipelines.stream import PackStream, StreamConfig
from mmagent.chat import Image, Text, assistant, user
from mmagent.geometry import GeometryConfig
from mmagent.records import Record, encode_image
from mmagent.types import PackedBatch
from mmagent.vocab import Vocab

GEOMETRY = GeometryConfig(patch_size=4, min_tokens=2, max_tokens=24)


def looks(n: int) -> Record:
    pixels = np.random.default_rng(n).integers(0, 256, (12 + n % 9, 12 + n % 13, 3), dtype=np.uint8)
    turns = (user(Image(), f"what {n}?"), assistant(f"at {n}"))
    return Record(f"look-{n:04d}", "looks", turns, images=(encode_image(pixels),))


def reads(n: int) -> Record:
    """Every seventh exceeds a pack and is cut."""
    words = " ".join(str(n * k % 97) for k in range(130 if n % 7 == 0 else 3 + n % 20))
    return Record(f"read-{n:04d}", "reads", parts=(Text(words),))


def spoilt(n: int) -> Record:
    """Every fifth is no picture."""
    record = looks(1000 + n)
    if n % 5 == 0:
        record = Record(
            f"spoilt-{n:04d}", "spoilt", record.messages, images=(encode_image(np.zeros((1, 900, 3), np.uint8)),)
        )
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    for name, make, count in (("looks", looks, 60), ("reads", reads, 50), ("spoilt", spoilt, 20)):
        with ShardWriter(root / "data" / name, max_samples=16) as writer:
            for n in range(count):
                writer.write(make(n))
    Vocab.train(["what at 0 1 2 3 4 5 6 7 8 9?"], 300).save(root)
    return root


@cache
def vocab(root: Path) -> Vocab:
    return Vocab.load(root)


def stream(root: Path, prefetch: int = 0, threads: int = 0) -> PackStream:
    sources = {
        "looks": SourceConfig(schedule={0: 2.0, 40: 0.5}),
        "reads": SourceConfig(schedule={0: 0.0, 10: 1.0}),
        "spoilt": SourceConfig(weight=0.3),
    }
    config = StreamConfig(
        folder=str(root / "data"),
        sources=sources,
        tokens_per_step=2 * 128,
        tokens_per_microbatch=128,
        patches_per_microbatch=500,
        split_long=True,
        buffer=4,
        prefetch=prefetch,
        threads=threads,
    )
    config.quarantine.max_share = 1.0
    return PackStream(config, vocab(root), GEOMETRY)


def trace(batches: list[PackedBatch]) -> list[tuple[object, ...]]:
    """What a step is: keys, ids, and a digest of the pixels."""
    return [
        (b.keys, tuple(b.input_ids.tolist()), float(b.vision.patches.double().sum()) if b.vision else 0.0)
        for b in batches
    ]


def test_the_packs_do_not_depend_on_how_many_prepare_them(folder):
    expected = None
    for prefetch, threads in ((0, 0), (1, 1), (3, 4), (0, 8)):
        packs = stream(folder, prefetch, threads)
        seen = [trace(next(packs)) for _ in range(60)]
        packs.close()
        expected = expected or seen
        assert seen == expected


@pytest.mark.parametrize("kills", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(folder, kills):
    """Each life is a stream of its own, with any number of threads; its state goes through a file's text. A life ends
    right after a step, or with steps prepared that nobody saw; sometimes before its first."""
    random, steps = Random(7), 60
    whole = stream(folder)
    expected = [trace(next(whole)) for _ in range(steps)]
    assert len({key for step in expected for batch in step for key in batch[0] if "#" in key}) > 5
    died = at = 0
    state: str | None = None
    while died < kills:
        threaded = died % 10 == 0  # slower to begin: every tenth is enough to meet every moment
        life = stream(folder, random.randint(1, 3) if threaded else 0, random.randint(0, 3) if threaded else 0)
        if state is not None:
            life.load_state_dict(json.loads(state))
        for _ in range(random.choice((0, 1, 1, 1, 2, 3, 5))):
            if at == steps:
                break
            assert trace(next(life)) == expected[at], f"step {at} after {died} kills"
            at += 1
            state = json.dumps(life.state_dict())  # what a checkpoint after the step would hold
            if random.random() < 0.3:
                break
        life.close()
        died += 1
        if at == steps:
            at, state = 0, None
