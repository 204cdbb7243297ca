"""Ingestion against plain PIL and webdataset's own writer, over the same captioned photographs.

The peer opens every image, decodes it, and writes image and caption with `webdataset.TarWriter`: no check of paths,
keys or texts, no report, nothing that survives a kill. Ours decodes as well and does all of that. `one process` reads
in the process that writes, as the peer does; `guarded` is the command's own way with one reading process, so that a
file may hang or crash it, and moves every image between two processes.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_pipelines.ingest.run import IngestConfig, ingest
from data_pipelines.workers import LimitsConfig
from mmagent.worlds.images import PHOTO_KINDS, crop_photo
from tools.benchmarks.row import Row, Settings, throughput


def rows(settings: Settings) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for side in (256,) if settings.quick else (256, 1024):
            count = 40 if settings.quick else 1200 * 256 // side
            yield from writing(root, side, count, settings)


def make_images(folder: Path, side: int, count: int) -> int:
    """JPEGs of photographs with captions beside them; how many bytes they have."""
    folder.mkdir(parents=True)
    total = 0
    for n in range(count):
        pixels = crop_photo(n, PHOTO_KINDS[n % len(PHOTO_KINDS)], "train").image
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).resize((side, side * 3 // 4)).save(buffer, "JPEG", quality=90)
        (folder / f"{n:05d}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{n:05d}.txt").write_text(f"photograph number {n}\n")
        total += buffer.tell()
    return total


def writing(root: Path, side: int, count: int, settings: Settings) -> Iterator[Row]:
    source, to = root / f"images-{side}", root / "to"
    total = make_images(source, side, count)

    def ours(processes: int) -> None:
        shutil.rmtree(to, ignore_errors=True)
        config = IngestConfig([str(source)], str(to), style="captions", limits=LimitsConfig(processes))
        report = ingest(config, say=lambda line: None, progress=False)
        assert report["records"] == count

    def peer() -> None:
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        with webdataset.TarWriter(str(to / "shard-00000.tar")) as writer:
            for path in sorted(source.glob("*.jpg")):
                data = path.read_bytes()
                Image.open(io.BytesIO(data)).load()
                text = path.with_suffix(".txt").read_text()
                writer.write({"__key__": path.stem, "jpg": data, "txt": text})

    for name, processes in (("one process", 0), ("guarded", 1)):
        title = f"{count} images of {total // count // 1000} KB, {name}"
        row = throughput(title, lambda n=processes: ours(n), peer, "PIL + TarWriter", count, "images/s", settings)
        yield row
        each = total / count / 1e6
        yield replace(row, ours=each * row.ours, peer=each * row.peer, unit="MB/s")
