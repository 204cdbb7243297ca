"""The data pipeline against plain webdataset, naive packing and the image processor of transformers.

The shards hold texts, captioned pictures and interleaved documents of `data_pipelines.build`. `next fit` closes a pack
at the first document that does not fit; `padded` pads every row of a batch to its longest. The webdataset pipeline
shuffles its shards and a buffer of 500 samples, on one thread as we do. `webdataset + PIL` decodes and resizes pictures
with PIL, makes tensors of them and of the texts' ids, and neither validates nor packs: less than ours does.
`webdataset + ours` renders, decodes and packs (next fit) with our own functions. `resume` is the time to the first step
after a stop: webdataset reads again what it has seen. `memory` is what the process holds while a stream with threads
reads on, beside what it held after a tenth of the samples (`--part memory --plot FILE` draws it).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image as PILImage

from data_pipelines.build import texts_of
from data_pipelines.documents import DocumentBuilder
from data_pipelines.making import build_source
from data_pipelines.mixture import SourceConfig, permute
from data_pipelines.pictures import Captions, Interleaved, picture
from data_pipelines.shards import ShardSet
from data_pipelines.stream import PackStream, StreamConfig
from data_pipelines.texts import Texts
from mmagent.geometry import GeometryConfig, image_grid, patchify
from mmagent.packing import Size, pack, size_of
from mmagent.records import from_sample
from mmagent.types import Document, PackedBatch
from mmagent.vocab import Vocab
from tools.benchmarks.row import Row, Settings, smaller_is_better, throughput, throughputs

BUDGET = Size(4096, 8192)
GEOMETRY = GeometryConfig(max_tokens=256)
PARTS = ("stream", "memory")


def rows(settings: Settings) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for size in (300,) if settings.quick else (300, 2400):
            make_shards(root / str(size), size)
            if settings.part != "memory":
                yield reading(root / str(size), size, settings)
        builder = DocumentBuilder(train_vocab(root / "300"), GEOMETRY, limit=BUDGET)
        if settings.part != "memory":
            yield from filling(root / "300", builder)
            yield from streaming(root / "300", builder, settings)
            yield starting(root / str(size), builder, settings)
            yield resuming(root / "300", builder, settings)
        if settings.part != "stream":
            yield from memory(root / str(size), builder, 2_000 if settings.quick else 100_000)
    if settings.part != "memory":
        yield patching(settings)


def make_shards(root: Path, size: int) -> None:
    """``size`` samples in all: half text, a third captions, a sixth interleaved."""

    async def build() -> None:
        for maker, samples in ((Texts(0), size // 2), (Captions(0), size // 3), (Interleaved(0), size // 6)):
            await build_source(maker, root / maker.name, samples, shard_samples=100)

    asyncio.run(build())


def train_vocab(root: Path) -> Vocab:
    sets = [ShardSet(folder) for folder in sorted(root.iterdir())]
    return Vocab.train([t for s in sets for n in range(len(s)) for t in texts_of(from_sample(s.read(n)))], 2048)


def stream(root: Path, builder: DocumentBuilder, prefetch: int = 0, threads: int = 0) -> PackStream:
    folders = sorted(root.iterdir())
    config = StreamConfig(
        sources={folder.name: SourceConfig(str(folder), len(ShardSet(folder))) for folder in folders},
        tokens_per_step=BUDGET.tokens,
        tokens_per_microbatch=BUDGET.tokens,
        patches_per_microbatch=BUDGET.patches,
        by_tokens=False,  # every sample as often as any other, as the peer reads them
        prefetch=prefetch,
        threads=threads,
    )
    return PackStream(config, builder.vocab, builder.geometry, builder.chat)


def peer_samples(root: Path) -> Iterator[dict[str, Any]]:
    """Shuffled samples as webdataset gives them, epoch after epoch."""
    urls = sorted(map(str, root.glob("*/*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(500, rng=Random(0)).repeat()
    for sample in dataset:
        yield {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}


def next_fit(documents: Iterator[Document], builder: DocumentBuilder) -> Iterator[PackedBatch]:
    waiting: list[Document] = []
    room = BUDGET
    for document in documents:
        size = size_of(document)
        if not size.fits(room):
            yield pack(waiting, image_id=builder.vocab.image_id, merge_size=builder.geometry.merge_size)
            waiting, room = [], BUDGET
        waiting.append(document)
        room = room.less(size)


def reading(root: Path, size: int, settings: Settings) -> Row:
    """Shuffled reading of parsed, validated records, without decoding."""
    shards = ShardSet(str(root / "*" / "*.tar"))
    count = min(size, 600)

    def ours() -> None:
        for n in range(count):
            from_sample(shards.read(permute(n, len(shards), 1)))

    def peer() -> None:
        for sample in islice(peer_samples(root), count):
            from_sample(sample)

    return throughput(f"records read shuffled, {size} samples", ours, peer, "webdataset", count, "records/s", settings)


def filling(root: Path, builder: DocumentBuilder) -> Iterator[Row]:
    """Share of the token budget that documents fill, over the same documents in the same order."""
    packs = stream(root, builder)
    fill = 100 * float(np.mean([packs.metrics["data/fill"] for _ in range(40) if next(packs)]))
    (packer,) = stream(root, builder)._packers.values()
    documents = [builder.finish(waiting.draft) for _ in range(40) for waiting in packer.next().documents]
    Random(0).shuffle(documents)
    fitted = 100 * float(np.mean([batch.num_tokens / BUDGET.tokens for batch in next_fit(iter(documents), builder)]))
    padded = padded_fill(documents)
    yield Row("pack fill", fill, fitted, "next fit", fill / fitted, "% of tokens", 0.0)
    yield Row("pack fill", fill, padded, "padded", fill / padded, "% of tokens", 0.0)


def padded_fill(documents: Sequence[Document]) -> float:
    """Percentage of real tokens when rows of a batch are padded to the longest and a batch holds at most the budget."""
    used = spent = 0
    batch: list[int] = []
    for document in documents:
        if (len(batch) + 1) * max([*batch, len(document)]) > BUDGET.tokens:
            used, spent, batch = used + sum(batch), spent + len(batch) * max(batch), []
        batch.append(len(document))
    return 100 * used / spent


def streaming(root: Path, builder: DocumentBuilder, settings: Settings) -> Iterator[Row]:
    """From shards to packs, decoding and patching included."""
    packs = stream(root, builder)
    count = sum(len(batch.keys) for _ in range(4) for batch in next(packs))  # about as many in other packs
    peers = next_fit((builder.document(from_sample(sample)) for sample in peer_samples(root)), builder)
    plain = map(partial(plain_tensors, builder), peer_samples(root))
    seen = [0, 0]

    def ours() -> None:
        while seen[0] < count:
            seen[0] += sum(len(batch.keys) for batch in next(packs))
        seen[0] -= count  # what was too many counts in the next turn

    def packed() -> None:
        while seen[1] < count:
            seen[1] += len(next(peers).keys)
        seen[1] -= count

    def unpacked() -> None:
        for _ in islice(plain, count):
            pass

    others = {"webdataset + PIL": unpacked, "webdataset + ours": packed}
    yield from throughputs("webdataset shards to packs", ours, others, count, "samples/s", settings)


def plain_tensors(builder: DocumentBuilder, sample: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a pipeline without this library would make of a sample: ids of its texts, and its pictures in the sizes
    that the model sees, between -1 and 1."""
    body = json.loads(sample["json"])
    written = body.get("parts") or [part for message in body["messages"] for part in message["content"]]
    ids = builder.vocab.encode("".join(part["text"] for part in written if part["type"] == "text"))
    pictures = []
    for name, data in sample.items():
        if name.endswith((".png", ".jpg")):
            image = PILImage.open(io.BytesIO(data)).convert("RGB")
            _, rows, columns = image_grid(image.height, image.width, GEOMETRY)
            size = (columns * GEOMETRY.patch_size, rows * GEOMETRY.patch_size)
            pixels = np.asarray(image.resize(size, PILImage.Resampling.BICUBIC), np.float32) / 127.5 - 1
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    return torch.tensor(ids), pictures


def starting(root: Path, builder: DocumentBuilder, settings: Settings) -> Row:
    """From nothing but imports to the first step."""

    def ours() -> None:
        next(stream(root, builder))

    def peer() -> None:
        next(next_fit((builder.document(from_sample(sample)) for sample in peer_samples(root)), builder))

    return throughput("starts to the first pack", ours, peer, "webdataset + ours", 1, "starts/s", settings)


def memory(root: Path, builder: DocumentBuilder, samples: int) -> Iterator[Row]:
    """What the process holds after every tenth of ``samples``."""
    packs = stream(root, builder, prefetch=2, threads=2)
    seen, first = 0, 0.0
    for tenth in range(1, 11):
        while seen < tenth * samples // 10:
            seen += sum(len(batch.keys) for batch in next(packs))
        held = resident() / 1e6
        first = first or held
        yield smaller_is_better(f"memory after {seen:,} samples", held, first, "after a tenth", "MB")
    packs.close()


def resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Memory against samples read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [(int(row.name.split()[2].replace(",", "")), row.ours) for row in rows if row.name.startswith("memory")]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set(xlabel="samples read", ylabel="memory of the process, MB", title="A stream that reads on")
    axes.set_ylim(0, 1.25 * max(held for _, held in points))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def resuming(root: Path, builder: DocumentBuilder, settings: Settings) -> Row:
    steps = 8 if settings.quick else 40
    packs = stream(root, builder)
    seen = sum(len(batch.keys) for _ in range(steps) for batch in next(packs))
    state = packs.state_dict()

    def ours() -> None:
        again = stream(root, builder)
        again.load_state_dict(state)
        next(again)

    def peer() -> None:
        samples = peer_samples(root)
        for _ in islice(samples, seen):
            pass
        next(next_fit((builder.document(from_sample(sample)) for sample in samples), builder))

    return throughput(f"resume after {seen} samples", ours, peer, "webdataset", 1, "resumes/s", settings)


def patching(settings: Settings) -> Row:
    images = [picture(Random(n))[0] for n in range(8 if settings.quick else 64)]
    return throughput(
        "images to patches", lambda: [patchify(i, GEOMETRY) for i in images], processor(images), "transformers",
        len(images), "images/s", settings,
    )  # fmt: skip


def processor(images: Sequence[np.ndarray]) -> Callable[[], object]:
    """The image processor that ships with the GLM-4V classes."""
    from mmagent.ops.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from transformers import Glm4vImageProcessor

    unit = GEOMETRY.unit**2 * GEOMETRY.temporal_patch
    limits = {"shortest_edge": GEOMETRY.min_tokens * unit, "longest_edge": GEOMETRY.max_tokens * unit}
    glm = Glm4vImageProcessor(size=limits)
    return lambda: glm(list(images), return_tensors="pt")
