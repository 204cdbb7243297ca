"""Pages of PDFs and frames of videos: what is read of sound ones, and that broken ones are refused."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_kit import at, members, pdf, records, run, write_video

from data_pipelines.ingest.files import RefusedError
from data_pipelines.ingest.pdf import MAX_PAGE_PIXELS, Line, PdfPage, read_pages, reading_order
from data_pipelines.ingest.video import Clip, VideoConfig, _chosen, sample_video
from data_pipelines.workers import LimitsConfig
from mmagent.chat import Image, Text, Video, assistant, user
from mmagent.records import decode_image
from tests.examples import examples

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("av")
pytest.importorskip("pypdfium2")


# ------------------------------------------------------------------------------------------------ pages


def lorem(n: int) -> str:
    return f"line {n} of a column of prose that is long enough"


TWO_COLUMNS = "".join(  # written row by row over both columns, as some programs do
    at(72, 600 - 14 * n, lorem(n), 9) + at(330, 600 - 14 * n, lorem(n + 100), 9) for n in range(12)
)


def test_columns_are_read_one_after_the_other_whatever_order_they_were_written_in():
    content = TWO_COLUMNS + at(72, 300, "and a footnote that goes over the whole width of the page, as they do", 9)
    content += at(150, 700, "A heading over both of the columns", 18)
    content += "".join(at(80 + 120 * c, 400 - 14 * r, f"cell {r}{c}", 9) for c in range(4) for r in range(3))
    (page,) = read_pages(pdf([content]))
    told = page.text.split("\n")
    assert told[0] == "A heading over both of the columns"
    assert told[1:13] == [lorem(n) for n in range(12)]
    assert told[13:25] == [lorem(n + 100) for n in range(12)]
    assert told[25:28] == [" ".join(f"cell {r}{c}" for c in range(4)) for r in range(3)]
    assert told[28].startswith("and a footnote")


def test_a_table_is_read_by_rows():
    rows = [("Name", "Age", "Town"), ("Ann", "31", "Rome"), ("Bob", "4", "Kiel"), ("Eve", "57", "Oslo")]
    content = "".join(
        at(80 + 150 * c, 700 - 20 * r, cell) for c in range(3) for r, cell in enumerate(x[c] for x in rows)
    )
    (page,) = read_pages(pdf([content]))
    assert page.text.split("\n") == [" ".join(row) for row in rows]


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_lines_stand_where_they_are_drawn(rotate):
    """The ink of the only line lies within its box, on a page turned to any side."""
    (page,) = read_pages(pdf([at(100, 600, "Ink is here", 24)], rotate=rotate), dpi=72)
    pixels = decode_image(page.image.data, "k")
    assert pixels.shape[:2] == ((792, 612) if rotate % 180 == 0 else (612, 792))
    (line,) = page.lines
    x1, y1, x2, y2 = line.coordinates
    ys, xs = np.nonzero(pixels.min(axis=2) < 128)
    assert x1 - 2 <= xs.min() <= xs.max() <= x2 + 2
    assert y1 - 2 <= ys.min() <= ys.max() <= y2 + 2
    assert (x2 - x1) * (y2 - y1) < 3 * (xs.max() - xs.min()) * (ys.max() - ys.min())
    assert line.label == 'line "Ink is here"'


def test_pages_become_records(tmp_path):
    (tmp_path / "book.pdf").write_bytes(pdf([at(72, 700, "One"), "", at(72, 700, "Three")]))
    report = run([tmp_path / "book.pdf"], tmp_path / "to", dpi=36)
    assert (report["records"], report["refused"]) == (2, 1)
    first, last = records(tmp_path / "to")
    assert first.parts == (Image(), Text("One"))
    assert (first.key, last.key) == ("book-pdf/page-00001", "book-pdf/page-00003")
    assert [region.label for region in last.boxes] == ['line "Three"']
    run([tmp_path / "book.pdf"], tmp_path / "asked", dpi=36, prompt="Read it.")
    assert records(tmp_path / "asked")[0].messages == (user(Image(), "Read it."), assistant("One"))


def test_bombs_of_paper_are_drawn_small_or_refused():
    started = time.perf_counter()
    (huge,) = read_pages(pdf([at(72, 700, "Far away", 400)], width=14_000, height=14_000), dpi=600)
    height, width = decode_image(huge.image.data, "k").shape[:2]
    assert height * width <= 1.01 * MAX_PAGE_PIXELS
    for wide, high in ((14_000, 10), (10, 14_000)):
        (refused,) = read_pages(pdf([""], width=wide, height=high))
        assert isinstance(refused, RefusedError)
        assert "is a line, no page" in str(refused)
    assert time.perf_counter() - started < 20


def test_pages_without_end_are_cut(monkeypatch):
    monkeypatch.setattr("data_pipelines.ingest.pdf.MAX_PAGES", 2)
    pages = list(read_pages(pdf([at(72, 700, str(n)) for n in range(5)]), dpi=36))
    assert [isinstance(page, PdfPage) for page in pages] == [True, True, False]
    assert str(pages[2]) == "pdf: 5 pages: those from 3 on are left out"
    assert len(list(read_pages(pdf([at(72, 700, str(n)) for n in range(2)]), start=1, dpi=36))) == 1


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", b"nonsense" * 100, pdf([""])[:300]])
def test_what_is_no_pdf_is_one_refusal(data):
    (refused,) = read_pages(data)
    assert str(refused).startswith("pdf: ")


boxes = st.tuples(st.integers(0, 500), st.integers(0, 700), st.integers(1, 300), st.integers(1, 40))


@given(st.lists(boxes, max_size=25))
@settings(max_examples=examples(60), deadline=None)
def test_reading_order_loses_no_line(found):
    lines = [Line(f"w{n}", (x, y, x + w, y + h)) for n, (x, y, w, h) in enumerate(found)]
    assert sorted(" ".join(line.text for line in reading_order(lines)).split()) == sorted(line.text for line in lines)


# ------------------------------------------------------------------------------------------------ videos


def clip(path: Path, **options: float) -> Clip:
    return sample_video(os.open(path, os.O_RDONLY), VideoConfig(**options))


def greys(found: Clip) -> list[int]:
    """Which frames they are, by the grey value that each was given."""
    return [round(float(decode_image(frame.data, "k").mean()) / 10) for frame in found.frames]


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """5 frames a second for 4 seconds: frame n is shown at n / 5 s."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    write_video(path, [n / 5 for n in range(20)])
    return path


@pytest.mark.parametrize(
    "rate, frames",
    [
        (1, [0, 5, 10, 15]),
        (2, [0, 2, 5, 7, 10, 12, 15, 17]),
        (5, list(range(20))),
        (25, list(range(20))),
        (0.4, [0, 12]),
    ],
)
def test_frames_are_those_on_screen_at_every_tick(video, rate, frames):
    """At 2 a second every other tick falls between two frames: at 0.5 s the one of 0.4 s is on screen."""
    found = clip(video, rate=rate)
    assert list(found.timestamps) == [n / 5 for n in frames]
    assert greys(found) == frames


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=40), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
@settings(max_examples=examples(80), deadline=None)
def test_ticks_by_brute_force(gaps, rate):
    """The last frame that has begun at each tick, up to the last frame."""
    seconds = np.cumsum([0, *gaps]) / 1000
    ticks = range(int(seconds[-1] * rate) + 2)
    expected = set()
    for tick in ticks:
        shown = [n for n, s in enumerate(seconds) if s <= tick / rate + 1e-6]
        if tick / rate <= seconds[-1] + 1e-6:
            expected.add(shown[-1])
    assert set(_chosen(seconds, rate)) == expected


def test_a_budget_makes_frames_smaller_and_then_fewer(tmp_path):
    write_video(tmp_path / "v.mp4", list(range(20)), size=(640, 480))
    # 20 seconds at 1 a second are 20 frames
    for tokens, each, count in ((20 * 640, 640, 20), (20 * 384 + 5, 384, 20), (20 * 128, 128, 20), (10 * 128, 128, 10)):
        found = clip(tmp_path / "v.mp4", tokens=tokens)
        height, width = decode_image(found.frames[0].data, "k").shape[:2]
        assert len(found.frames) == len(found.timestamps) == count
        assert height % 28 == width % 28 == 0
        assert 0.5 * each <= min(height * width // 784, 391) <= each  # 640 x 480 pixels are 391 tokens: never enlarged
    assert found.timestamps[0] == 0.0
    assert found.timestamps[-1] == 19.0


def test_a_pause_of_a_year_takes_no_longer(tmp_path):
    write_video(tmp_path / "v.mkv", [0.0, 1.0, 31_000_000.0], codec="mpeg4")
    found = clip(tmp_path / "v.mkv", rate=5)
    assert list(found.timestamps) == [0.0, 1.0, 31_000_000.0]


def test_seeking_finds_the_frames_that_decoding_all_finds(tmp_path):
    write_video(tmp_path / "v.mp4", [n / 10 for n in range(24)], gop=5)
    assert greys(clip(tmp_path / "v.mp4", rate=2)) == greys(clip(tmp_path / "v.mp4", rate=10))[::5]


def test_videos_become_records(tmp_path, video):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(video.read_bytes())
    (tmp_path / "in/a.txt").write_text("it gets brighter")
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "It."}]
    row = {"video": "a.mp4", "conversations": turns}
    qwen = [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 2.0}, {"type": "text", "text": "q"}]}
    ]
    run([tmp_path / "in"], tmp_path / "to")
    (record,) = records(tmp_path / "to")
    assert record.parts == (Video((0.0, 1.0, 2.0, 3.0)), Text("it gets brighter"))
    (tmp_path / "in/x.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"messages": [*qwen, {"role": "assistant", "content": "a"}]})
    )
    run([tmp_path / "in/x.jsonl"], tmp_path / "rows", style="llava")
    llava, other = records(tmp_path / "rows")
    assert llava.messages[0] == user(Video((0.0, 1.0, 2.0, 3.0)), "What?")
    assert len(other.images) == len(other.messages[0].parts[0].timestamps) == 8


@pytest.mark.parametrize("name", ["empty", "text", "cut", "audio", "playlist", "image"])
def test_videos_that_are_none_are_refused(tmp_path, video, name):
    import av

    path = tmp_path / "v.mp4"
    whole = video.read_bytes()
    contents = {
        "empty": b"",
        "text": b"no video at all\n" * 100,
        "cut": whole[: len(whole) // 3],
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }
    if name in contents:
        path.write_bytes(contents[name])
    else:
        with av.open(str(path), "w") as out:
            stream = out.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    with pytest.raises(RefusedError, match=r"^video: "):
        clip(path)


def test_videos_within_tars_and_tables_are_read_as_files_are(tmp_path, video, monkeypatch):
    """In a process with limits, frame for frame what the file gives; what cannot be decoded is refused alone."""
    data, talk = video.read_bytes(), [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Grey."}]
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/a.mp4").write_bytes(data)
    (tmp_path / "dir/a.txt").write_text("It gets lighter.")
    run([tmp_path / "dir"], tmp_path / "file")
    (wanted,) = records(tmp_path / "file")
    files = {"a.mp4": data, "a.txt": b"It gets lighter.", "b.mp4": data[: len(data) // 8], "b.txt": b"Torn."}
    members(tmp_path / "in.tar", files)
    report = run([tmp_path / "in.tar"], tmp_path / "tar", limits=LimitsConfig(processes=1))
    assert (report["records"], report["refused"]) == (1, 1)
    assert "cannot be decoded" in (tmp_path / "tar/refused.jsonl").read_text()
    table = {"video": [data, None], "caption": ["It gets lighter."] * 2}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    inside = {"video": [{"bytes": data, "path": "elsewhere.mp4"}], "caption": ["It gets lighter."]}
    parquet.write_table(pyarrow.table(inside), tmp_path / "d.parquet")
    for name in ("tar", "t", "d"):
        if name != "tar":
            run([tmp_path / f"{name}.parquet"], tmp_path / name)
        (record,) = records(tmp_path / name)
        assert (record.parts, record.images) == (wanted.parts, wanted.images)
    rows = {"a.mp4": data, "a.json": json.dumps({"conversations": talk, "video": "gone.mp4"}).encode()}
    members(tmp_path / "talk.tar", rows)
    run([tmp_path / "talk.tar"], tmp_path / "talk")
    (record,) = records(tmp_path / "talk")
    assert record.images == wanted.images
    monkeypatch.setattr("data_pipelines.ingest.styles.MAX_RECORD", len(data) - 1)
    report = run([tmp_path / "talk.tar"], tmp_path / "large")
    assert "the limit is" in (tmp_path / "large/refused.jsonl").read_text()
    members(tmp_path / "two.tar", {"a.mp4": data, "a.webm": data, "a.txt": b"Two."})
    assert run([tmp_path / "two.tar"], tmp_path / "two")["refused"] == 1


def test_a_video_of_too_many_frames_is_refused_before_it_is_decoded(video, monkeypatch):
    monkeypatch.setattr("mmagent.videos.MAX_FRAMES", 10)
    with pytest.raises(RefusedError, match="more than 10 frames"):
        clip(video)


def changed(path: Path, box: bytes, at_: int, *values: int) -> bytes:
    """The file with 32-bit ``values`` written ``at_`` bytes behind the name of a box."""
    data = bytearray(path.read_bytes())
    struct.pack_into(f">{len(values)}I", data, data.index(box) + at_, *values)
    return bytes(data)


@pytest.mark.parametrize("box, at_", [(b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)])
@pytest.mark.parametrize("duration", [0, 1, 0x7FFFFFFF])
def test_no_duration_that_a_header_tells_is_believed(tmp_path, video, box, at_, duration):
    (tmp_path / "v.mp4").write_bytes(changed(video, box, at_, duration))
    assert clip(tmp_path / "v.mp4").timestamps == (0.0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "each, count, problem",
    [
        (0, 0, "there is no frame in it"),
        (0, 2_000_000_000, "cannot be decoded|there is no frame in it"),
        (1, 50_000_000, "tells of 50000000 samples of 1 bytes, and has"),
        (1, 4_000_000_000, "tells of 4000000000 samples"),
    ],
)
def test_headers_of_no_frames_and_of_millions_cost_nothing(tmp_path, video, each, count, problem):
    """Two kilobytes that tell of 50 million frames would cost five seconds and 1.7 GB of index."""
    (tmp_path / "v.mp4").write_bytes(changed(video, b"stsz", 8, each, count))
    (tmp_path / "v.mp4").write_bytes(changed(tmp_path / "v.mp4", b"stts", 12, count, 1))
    (tmp_path / "v.mp4").write_bytes(changed(tmp_path / "v.mp4", b"stsc", 12, 1, count, 1))
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RefusedError, match=problem):
        clip(tmp_path / "v.mp4")
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_a_stream_that_is_damaged_in_the_middle_is_read_as_far_as_it_goes_or_refused(tmp_path, video):
    whole = bytearray(video.read_bytes())
    rng = np.random.default_rng(0)
    for n in range(30):
        broken = bytearray(whole)
        for at_ in rng.integers(0, len(whole), 8):
            broken[at_] = rng.integers(256)
        (tmp_path / "v.mp4").write_bytes(broken)
        try:
            found = clip(tmp_path / "v.mp4", rate=5)
        except RefusedError:
            continue
        assert len(found.frames) == len(found.timestamps), n
        assert list(found.timestamps) == sorted(found.timestamps)


def test_limits_of_videos_are_checked():
    for wrong in ({"rate": 0}, {"rate": 101}, {"tokens": 127}):
        with pytest.raises(ValueError):
            VideoConfig(**wrong)


@pytest.mark.parametrize(
    "matrix, white",
    [
        ((1, 0, 0, 1), "left"),
        ((0, 1, -1, 0), "top"),  # a quarter clockwise, as telephones write it that are held upright
        ((-1, 0, 0, -1), "right"),
        ((0, -1, 1, 0), "bottom"),
    ],
)
def test_videos_are_turned_as_their_file_says(tmp_path, matrix, white):
    """The left half of what is stored is white; the track's header says how it is to be shown (ISO 14496-12, 8.3.2)."""
    import av

    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[:, :48] = 255
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    at_ = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at_ : at_ + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "v.mp4").write_bytes(data)
    (frame,) = clip(tmp_path / "v.mp4").frames
    seen = decode_image(frame.data, "k").mean(axis=2)
    height, width = seen.shape
    assert (height > width) == (white in ("top", "bottom"))
    halves = {
        "left": seen[:, : width // 2],
        "right": seen[:, width // 2 :],
        "top": seen[: height // 2],
        "bottom": seen[height // 2 :],
    }
    means = {name: part.mean() for name, part in halves.items()}
    assert max(means, key=means.__getitem__) == white
    assert means[white] > 230
