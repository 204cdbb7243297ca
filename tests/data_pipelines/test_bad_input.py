"""Files made to break whoever reads them, and what becomes of each: in ingestion, and in reading shards that hold them.

Nothing hangs, nothing grows, nothing is silent: a file is a record like any other, or it is refused with a key and a
reason. Every case is read by a process with little time and memory, which it must not need to be ended for.
"""

from __future__ import annotations

import base64
import errno
import io
import json
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from chat_kit import VOCAB
from ingest_kit import encoded, members, pdf, records, run, write_video
from PIL import Image as PILImage

from data_pipelines.documents import DocumentBuilder, QuarantineConfig, QuarantineError, read_quarantine
from data_pipelines.ingest.report import REFUSED
from data_pipelines.mixture import SourceConfig
from data_pipelines.shards import ShardError, ShardSet, parse_sample
from data_pipelines.stream import PackStream, StreamConfig
from data_pipelines.workers import LimitsConfig
from mmagent.geometry import GeometryConfig
from mmagent.records import RecordError, decode_image, from_sample, to_sample
from mmagent.types import Document

GEOMETRY = GeometryConfig(max_tokens=64)


def saved(image: PILImage.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png(width: int, height: int, body: bytes = b"", depth: int = 8, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def frames(format_: str) -> bytes:
    pictures = [PILImage.new("RGB", (30, 20), (40 * n, 0, 0)) for n in range(4)]
    return saved(pictures[0], format_, save_all=True, append_images=pictures[1:], duration=50)


def sixteen() -> bytes:
    return saved(PILImage.fromarray(np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)), "PNG")


def text_chunk() -> bytes:
    """A PNG with a text of 20 MB in a few kilobytes."""
    packed = b"Comment\0\0" + zlib.compress(bytes(20 << 20), 9)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed
    return png(30, 20, bytes(20 * 91), extra=chunk + struct.pack(">I", zlib.crc32(b"zTXt" + packed)))


def sideways() -> bytes:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return saved(PILImage.new("RGB", (30, 20)), "JPEG", exif=exif)


LAUGHS = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">' + b"".join(
    b'<!ENTITY %c "&%c;&%c;&%c;">' % (98 + n, 97 + n, 97 + n, 97 + n) for n in range(20)
)
BITMAP = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24, *[0] * 6)
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00"


@dataclass(frozen=True)
class Case:
    """The bytes of ``name``; ``shape (height, width)`` of what is decoded, or the ``problem`` it is refused with."""

    name: str
    data: Callable[[], bytes]
    shape: tuple[int, int] | None = None
    problem: str = ""


CASES = (
    Case("zeros.png", lambda: png(7000, 7000, bytes(100)), problem="cannot decode image"),
    Case("bomb.png", lambda: png(60_000, 60_000), problem="3600000000|exceed the limit of 64000000"),
    Case("bomb.bmp", lambda: BITMAP, problem="exceed the limit"),
    Case("flat.png", lambda: saved(PILImage.new("1", (7900, 7900)), "PNG"), shape=(7900, 7900)),
    Case("long.png", lambda: saved(PILImage.new("1", (60_000, 20)), "PNG"), problem="as 3000 to 1|aspect ratio 3000"),
    Case("text.png", text_chunk, problem="cannot decode image"),
    Case("moving.gif", lambda: frames("GIF"), problem="is an animation"),
    Case("moving.webp", lambda: frames("WEBP"), problem="is an animation"),
    Case("moving.png", lambda: frames("PNG"), problem="is an animation"),
    Case("still.gif", lambda: saved(PILImage.new("RGB", (30, 20)), "GIF"), shape=(20, 30)),
    Case("sixteen.png", sixteen, shape=(20, 30)),
    Case("sixteen_rgb.png", lambda: png(30, 20, bytes(20 * 181), depth=16), shape=(20, 30)),
    Case("cmyk.jpg", lambda: saved(PILImage.new("CMYK", (30, 20)), "JPEG"), shape=(20, 30)),
    Case("sideways.jpg", sideways, shape=(30, 20)),
    Case("alpha.webp", lambda: saved(PILImage.new("RGBA", (30, 20), (9, 9, 9, 99)), "WEBP"), shape=(20, 30)),
    Case("none.png", lambda: b"", problem="it has no bytes"),
    Case("cut.png", lambda: encoded(200, 300)[:-5000], problem="cannot decode image"),
    Case("cut.jpg", lambda: encoded(200, 300, "JPEG")[:-5000], problem="cannot decode image"),
    Case("really_jpeg.png", lambda: encoded(20, 30, "JPEG"), shape=(20, 30)),
    Case("really_svg.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", problem="it looks like SVG"),
    Case("laughs.png", lambda: LAUGHS + b"]><svg>&u;</svg>", problem="it looks like SVG or XML"),
    Case("page.jpg", lambda: b"<!doctype html><title>404</title>", problem="it looks like HTML"),
    Case("program.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", problem="no PNG, JPEG"),
    Case("tiff.png", lambda: saved(PILImage.new("RGB", (30, 20)), "TIFF"), problem="it looks like TIFF"),
    Case("scans.jpg", lambda: encoded(20, 30, "JPEG")[:-2] + SCAN * 5000, problem="scans exceeds the limit"),
    Case("noise.webp", lambda: b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(500), problem="cannot decode image"),
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, bytes]:
    return {case.name: case.data() for case in CASES}


def test_what_becomes_of_images_in_ingestion(tmp_path, images):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in images.items():
        (folder / name).write_bytes(data)
        (folder / f"{name.rpartition('.')[0]}.txt").write_text(f"about {name}")
    started = time.perf_counter()
    report = run([folder], tmp_path / "to", limits=LimitsConfig(2, seconds=15, megabytes=700))
    assert time.perf_counter() - started < 90
    refused = {line["shard"]: line for line in read_quarantine(tmp_path / "to" / REFUSED)}
    written = records(tmp_path / "to")
    shapes = {record.key: decode_image(record.images[0].data, record.key).shape[:2] for record in written}
    for case in CASES:
        key = "-".join(case.name.rsplit(".", 1))
        assert (key in shapes) != (case.name in refused), case.name
        if case.shape:
            assert shapes[key] == case.shape, case.name
        else:
            line = refused[case.name]
            assert line["key"] == key
            assert line["reason"] == "images"
            assert any(words in line["problem"] for words in case.problem.split("|")), line
    assert report["refused"] == len(refused) == sum(1 for case in CASES if not case.shape)
    extensions = {record.key: record.images[0].extension for record in written}
    assert extensions["really_jpeg-png"] == "jpg"


def test_what_becomes_of_images_in_reading(tmp_path, images):
    """The same bytes in shards of other hands: named by key and image, wherever they are found out."""
    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]
    body = json.dumps({"source": "s", "messages": turns}).encode()
    files: dict[str, bytes] = {}
    for n, data in enumerate(images.values()):
        files |= {f"{n:03d}.json": body, f"{n:03d}.0.png": data}
    members(tmp_path / "x.tar", files)
    shards = ShardSet(tmp_path / "x.tar")
    builder = DocumentBuilder(VOCAB, GEOMETRY)
    for n, case in enumerate(CASES):
        outcome = read(builder, shards, n)
        if case.shape:
            assert isinstance(outcome, Document), f"{case.name}: {outcome}"
            assert outcome.images[0].view.original == case.shape, case.name
        else:
            assert isinstance(outcome, RecordError), case.name
            assert (outcome.key, outcome.field) == (f"{n:03d}", "images[0]")
            assert any(words in outcome.problem for words in case.problem.split("|")), f"{case.name}: {outcome}"


def read(builder: DocumentBuilder, shards: ShardSet, n: int) -> Document | RecordError:
    try:
        return builder.document(from_sample(shards.read(n)))
    except RecordError as error:
        return error


def test_a_stream_goes_on_and_its_log_has_every_one(tmp_path, images):
    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]
    body = json.dumps({"source": "s", "messages": turns}).encode()
    bad = [data for case, data in zip(CASES, images.values(), strict=True) if case.problem]
    files: dict[str, bytes] = {}
    for n in range(200):
        files |= {f"{n:03d}.json": body, f"{n:03d}.0.png": bad[n] if n < len(bad) else encoded(28, 28)}
    members(tmp_path / "x.tar", files)

    def stream(share: float, folder: str) -> PackStream:
        quarantine = QuarantineConfig(str(tmp_path / folder), max_share=share, min_seen=20)
        config = StreamConfig(
            sources={"s": SourceConfig(str(tmp_path / "x.tar"))}, tokens_per_step=256, tokens_per_microbatch=256,
            patches_per_microbatch=1024, prefetch=0, threads=0, quarantine=quarantine,
        )  # fmt: skip
        return PackStream(config, VOCAB, GEOMETRY)

    packs = stream(0.5, "log")
    while packs.quarantine.seen["s"] < 300:
        next(packs)
    lines = read_quarantine(tmp_path / "log/quarantine-0.jsonl")
    assert sorted(line["key"] for line in lines) == [f"{n:03d}" for n in range(len(bad))]
    assert {line["reason"] for line in lines} == {"images"}
    strict = stream(0.01, "strict")
    with pytest.raises(QuarantineError, match=r"source 's': .* samples are unusable, .* more than the allowed 1\.00%"):
        list(islice(strict, 50))


# ------------------------------------------------------------------------------------------------ texts and archives


def sample(**change: object) -> dict[str, object]:
    return {"source": "s", "parts": [{"type": "text", "text": "x"}]} | change


@pytest.mark.parametrize(
    "name, body, problem",
    [
        ("a", b"", "does not parse"),
        ("a", b'{"source": "\xff"}', "does not parse"),
        ("a", b"[" * 500_000, "too deep"),
        ("a", b'{"a":' * 100_000, "too deep"),
        ("a", json.dumps(sample(parts=[{"type": "text", "text": "x" * 2_000_000}])).encode(), ""),
        ("a", b'{"source": ' + b"9" * 100_000 + b"}", "does not parse"),
        ("../../a", json.dumps(sample()).encode(), "must be a name"),
        ("/a", json.dumps(sample()).encode(), "must be a name"),
        ("a/../b", json.dumps(sample()).encode(), "must be a name"),
        ("a\x1b[31m", json.dumps(sample()).encode(), ""),
    ],
)
def test_what_becomes_of_texts_in_reading_and_ingestion(tmp_path, name, body, problem):
    members(tmp_path / "x.tar", {f"{name}.json": body})
    shards = ShardSet(tmp_path / "x.tar")
    report = run([tmp_path / "x.tar"], tmp_path / "to", style="record")
    if problem:
        with pytest.raises(RecordError, match=problem):
            from_sample(shards.read(0))
        assert report["refused"] == 1
        (kind,) = report["kinds"].values()
        assert kind["examples"][0]["where"].startswith("x.tar@")
        assert "must be a name" in kind["examples"][0]["problem"] or "must be a name" not in problem
    else:
        assert to_sample(from_sample(shards.read(0)))["__key__"] == name
        assert report["records"] == 1


def test_names_that_nobody_can_print_are_refused_by_a_name_that_they_can(tmp_path):
    body = json.dumps(sample()).encode()
    members(tmp_path / "x.tar", {"a\udcff.json": body, "b.json": body})
    report = run([tmp_path / "x.tar"], tmp_path / "to")
    assert (report["records"], report["refused"]) == (1, 1)
    (line,) = read_quarantine(tmp_path / "to" / REFUSED)
    assert line["problem"] == "is no UTF-8"
    json.dumps(line).encode("ascii")
    (kind,) = report["kinds"].values()
    assert kind["examples"][0]["key"].isprintable()


def test_two_samples_of_one_key_are_told_apart_or_refused(tmp_path):
    """Beside one another they are one sample with a member twice; apart from one another reading tells them by their
    place, ingestion refuses the second, and so it does where two shards are one source: keys have the shard's name."""
    body = json.dumps(sample()).encode()
    members(tmp_path / "beside.tar", {"a.json": body, "a.json~": body})
    with pytest.raises(RecordError, match="a: json: appears twice"):
        from_sample(ShardSet(tmp_path / "beside.tar").read(0))
    assert list(run([tmp_path / "beside.tar"], tmp_path / "to1")["kinds"]) == ["json: appears twice"]
    members(tmp_path / "apart.tar", {"a.json": body, "b.json": body, "a.json~": body})
    shards = ShardSet(tmp_path / "apart.tar")
    assert [shards.where(n) for n in (0, 2)] == ["apart.tar@0", "apart.tar@2048"]
    assert list(run([tmp_path / "apart.tar"], tmp_path / "to2")["kinds"]) == [
        "key: another sample of the shard has the same"
    ]
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        members(tmp_path / f"set/{name}.tar", {"a.json": body})
    assert run([tmp_path / "set"], tmp_path / "to3")["records"] == 2


def test_a_line_longer_than_memory_should_hold_is_not_held(tmp_path):
    """A sparse file: one line of zeros, and a good one behind it. Peaks are those of this process."""
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.write(b'{"text": "first"}\n')
        file.truncate(280 << 20)
        file.seek(0, 2)
        file.write(b'\n{"text": "last"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = run([tmp_path / "x.jsonl"], tmp_path / "to", style="text")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert (report["records"], list(report["kinds"])) == (2, ["json: a row of 293601262 bytes, the limit is 268435456"])


def test_a_list_of_a_million_brackets_is_one_bad_row(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"text": "first"}, ' + b"[" * 1_000_000)
    report = run([tmp_path / "x.json"], tmp_path / "to", style="text")
    assert (report["records"], list(report["kinds"])) == (1, ["json: lists and objects stand too deep in one another"])


# ------------------------------------------------------------------------------------------------ pages and videos


def test_pages_that_bomb_cost_a_row_each(tmp_path):
    """In processes with little time and memory; what is between them is read."""
    folder = tmp_path / "data"
    folder.mkdir()
    good = pdf(["BT /F1 12 Tf 72 700 Td (fine) Tj ET"])
    (folder / "a.pdf").write_bytes(good)
    (folder / "b.pdf").write_bytes(pdf(["BT /F1 12 Tf 72 700 Td (far) Tj ET"], width=1e6, height=1e6))
    (folder / "c.pdf").write_bytes(pdf(["0 0 m 600 700 l S\n" * 100_000]))  # draws for long, says nothing
    (folder / "d.pdf").write_bytes(good[:200])
    (folder / "e.pdf").write_bytes(good)
    started = time.perf_counter()
    limits = LimitsConfig(1, seconds=1, megabytes=600)
    report = run([folder], tmp_path / "to", dpi=72, style="captions", limits=limits)
    assert time.perf_counter() - started < 60
    refused = {line["shard"]: line["problem"] for line in read_quarantine(tmp_path / "to" / REFUSED)}
    assert refused.keys() - {"b.pdf page 1"} == {"c.pdf page 1", "d.pdf page 1"}
    assert refused["c.pdf page 1"] == "takes more than 1 s to read"
    assert report["records"] == 2 + ("b.pdf page 1" not in refused)


def test_videos_that_are_none_cost_a_row_each(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_video(folder / "a.mp4", [0, 1, 2])
    (folder / "b.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(1000))
    (folder / "c.mp4").write_bytes(b"")
    (folder / "d.mp4").write_bytes(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    for name in "abcd":
        (folder / f"{name}.txt").write_text("a clip")
    report = run([folder], tmp_path / "to")
    refused = {line["shard"]: line["reason"] for line in read_quarantine(tmp_path / "to" / REFUSED)}
    assert (report["records"], refused) == (1, dict.fromkeys(["b.mp4", "c.mp4", "d.mp4"], "video"))


def test_a_name_of_a_gigabyte_is_not_read_into_memory(tmp_path):
    """A sparse file whose first member claims to be the long name of the next one."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate((1 << 30) + (1 << 12))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = run([tmp_path / "x.tar"], tmp_path / "to", style="record")
    assert list(report["kinds"]) == ["torn shard: cut short at byte 0: a header of 1073741824 bytes"]
    with pytest.raises(ShardError, match=r"not one whole sample; x\.tar: a header of 1073741824 bytes"):
        ShardSet(tmp_path / "x.tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_storage_that_fails_ends_an_ingestion_and_is_no_row(tmp_path, monkeypatch):
    """An image that cannot be read for the disk's sake is not bad: the run ends, and goes on when the disk is back."""
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / f"in/{n}.png").write_bytes(encoded(seed=n))
        (tmp_path / f"in/{n}.txt").write_text("x")
    fails = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.ingest.files.retried", lambda read, path: (_ for _ in ()).throw(fails))
        with pytest.raises(OSError, match="Input/output error"):
            run([tmp_path / "in"], tmp_path / "to", style="captions")
    assert run([tmp_path / "in"], tmp_path / "to", style="captions")["records"] == 3


def test_base64_of_a_bomb_is_refused_like_its_file(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(png(60_000, 60_000)).decode()
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": uri, "text": "x"}))
    (kind,) = run([tmp_path / "x.jsonl"], tmp_path / "to")["kinds"]
    assert kind == "images: too many pixels to be opened exceed the limit of 64000000"


def test_nothing_is_unpickled_whatever_a_member_is_called(tmp_path):
    """A sample with members that other libraries would load as objects: they are left aside, and said."""
    body = json.dumps({"caption": "x"}).encode()
    members(tmp_path / "x.tar", {"a.jpg": encoded(), "a.json": body, "a.pyd": b"cos\nsystem\n", "a.npy": b"\x93NUMPY"})
    report = run([tmp_path / "x.tar"], tmp_path / "to")
    assert (report["records"], report["aside"]) == (1, {"pyd": 1, "npy": 1})


# ------------------------------------------------------------------------------------------------ headers of archives


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def told(name: str, value: str) -> bytes:
    """A header of attributes before a member."""
    line = f" {name}={value}\n"
    size = next(n for n in range(len(line), len(line) + 9) if n == len(line) + len(str(n)))
    return member("attributes", f"{size}{line}".encode(), tarfile.XHDTYPE)


@pytest.mark.parametrize(
    "header, problem",
    [
        *((told("size", str(-512 * n)), f"a size of {-512 * n} bytes") for n in (1, 2, 3, 4, 20)),
        (member("././@LongLink", b"a.json\0", tarfile.GNUTYPE_LONGNAME) * 2000, "too deep in one another"),
        (told("path", "a.json") * 2000, "too deep in one another"),
        (told("GNU.sparse.map", "0,a"), "invalid literal"),
        (told("GNU.sparse.size", "x"), "invalid literal"),
    ],
)
def test_headers_made_to_break_a_reader_end_the_shard_there(tmp_path, header, problem):
    """A negative size leads back to a member before: the reader would go round for ever."""
    body = json.dumps(sample()).encode()
    before, after = member("before.json", body), member("after.json", body)
    (tmp_path / "x.tar").write_bytes(before + header + after + bytes(1024))
    shards = ShardSet(tmp_path / "x.tar")
    assert [from_sample(shards.read(n)).key for n in range(len(shards))] == ["before"]
    (torn,) = shards.torn
    assert torn.offset == len(before)
    assert problem in torn.problem
    with pytest.raises(RecordError, match="is no tar"):
        parse_sample(header + after, "here")
    report = run([tmp_path / "x.tar"], tmp_path / "to")
    assert (report["records"], report["refused"]) == (1, 1)


@pytest.mark.parametrize("size, checksum", [(b"00000000099\0", b""), (b"", b"009999\0 "), (b"00000000777\0", b"")])
def test_a_header_that_its_index_does_not_fit_is_a_bad_sample(size, checksum):
    """Indexes come with the tar, from whoever made it."""
    data = bytearray(member("a.json", b"{}"))
    if size:
        data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = checksum or b"%06o\0 " % sum(data[:512])
    with pytest.raises(RecordError):
        parse_sample(bytes(data[:512]), "here")
