"""Rows, images, pages and clips for tests of ingestion."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from data_pipelines.ingest.files import Root
from data_pipelines.ingest.inputs import Row
from data_pipelines.ingest.run import IngestConfig, ingest
from data_pipelines.ingest.styles import Read, StyleConfig, read_row
from data_pipelines.shards import ShardSet
from data_pipelines.workers import LimitsConfig
from mmagent.records import Record, from_sample

INLINE = LimitsConfig(processes=0)


def encoded(height: int = 40, width: int = 60, format_: str = "PNG", seed: int = 0, **save: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format_, **save)
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def read(style: str, cells: Mapping[str, Any], folder: Path | str = ".", **options: Any) -> Read:
    root = Root(str(folder), str(folder))
    return read_row(Row("key", "here", cells, root), StyleConfig(style, "src", **options))


def only(style: str, cells: Mapping[str, Any], folder: Path | str = ".", **options: Any) -> Record:
    (record,) = read(style, cells, folder, **options).records
    return record


def run(sources: Sequence[Path | str], to: Path, **options: Any) -> dict[str, Any]:
    """An ingestion in this process."""
    settings = {"limits": INLINE} | options
    return ingest(IngestConfig([str(s) for s in sources], str(to), **settings), say=lambda line: None, progress=False)


def records(folder: Path) -> list[Record]:
    shards = ShardSet(folder)
    return [from_sample(shards.read(n)) for n in range(len(shards))]


def write_video(
    path: Path, times: Sequence[float], size: tuple[int, int] = (64, 48), codec: str = "mpeg4", gop: int = 12
) -> None:
    """A clip with a frame at each of ``times`` (seconds), its grey value 10 times the number of the frame."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = gop
        for n, at in enumerate(times):
            grey = np.full((size[1], size[0], 3), 10 * n % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = round(1000 * at), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def pdf(pages: Sequence[str], width: float = 612, height: float = 792, rotate: int = 0) -> bytes:
    """A PDF whose pages have these content streams, with Helvetica as ``/F1``."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for content in pages:
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Rotate {rotate} /Contents "
            f"{len(objects)} 0 R /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica "
            ">> >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{at:010d} 00000 n \n" for at in places)
    size = len(objects) + 1
    end = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return f"{out}xref\n0 {size}\n0000000000 65535 f \n{table}{end}".encode("latin-1")


def at(x: float, y: float, text: str, size: int = 12) -> str:
    """A line of text in a content stream."""
    return f"BT /F1 {size} Tf {x} {y} Td ({text}) Tj ET\n"


def members(path: Path, files: Mapping[str, bytes]) -> None:
    """A tar of these files; ``~`` at the end of a name lets it appear again."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.removesuffix("~"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
