"""Published questions about videos: which frames are shown, and what is said of a video that cannot be."""

from __future__ import annotations

import asyncio
import json
from fractions import Fraction

import numpy as np
import pytest

from evals.baselines import BaselineAgent
from evals.bridges.exam import Exam
from evals.endpoint import OwnTalk
from evals.published_sets import MVBENCH, VIDEOMME
from evals.question_sets import FRAMES, FRAMES_TOKENS, Row, load_questions, watch
from evals.runner import Options, evaluate_now
from evals.suites import SUITES
from evals.suites.made_questions import _examples, make_videomme
from mmagent.chat import Text, Video
from mmagent.geometry import GeometryConfig
from mmagent.prompts import shown
from mmagent.records import encode_image
from mmagent.trajectories import Item

av = pytest.importorskip("av")
OPTIONS = Options(progress=False)
ROW = {  # as in lmms-lab/Video-MME
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
    "url": "https://example.org/fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
    "task_type": "Counting Problem", "question": "What is shown last?",
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All kinds are of the same number."], "answer": "C",
}  # fmt: skip


def film(path, count: int, rate: float = 10.0, size: tuple[int, int] = (96, 64)) -> None:
    """Frame n of a clip is of grey 2 n."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for n in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 2 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * n / rate), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "Video-MME"
    (folder / "data").mkdir(parents=True)
    film(folder / "data/fFjv93ACGo8.mp4", 100)
    (folder / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    return folder


def test_frames_are_evenly_spaced_and_have_their_seconds(clone):
    (question,) = load_questions(VIDEOMME, clone)
    assert (question.key, question.answers, question.options["C"]) == ("001-1", ("C",), "Berries.")
    assert question.slices == {"duration": "short", "domain": "Knowledge", "task": "Counting Problem"}
    seen = question.load()
    assert len(seen.images) == len(seen.times) == FRAMES
    assert (seen.times[0], seen.times[-1]) == (0.0, 9.9)
    steps = np.diff(seen.times)
    assert steps.min() >= 0.29
    assert steps.max() <= 0.41
    greys = [float(image.mean()) for image in seen.images]
    assert greys == pytest.approx([20 * second for second in seen.times], abs=4)  # lossy


def test_a_short_video_is_shown_whole_and_a_large_one_small(tmp_path):
    film(tmp_path / "a.mp4", 5, size=(1280, 720))
    seen = watch(tmp_path / "a.mp4")
    assert seen.times == (0.0, 0.1, 0.2, 0.3, 0.4)
    tokens = [image.shape[0] * image.shape[1] / 28**2 for image in seen.images]
    assert max(tokens) <= 640
    assert sum(tokens) <= FRAMES_TOKENS
    assert watch(tmp_path / "a.mp4", (0.15, 0.3)).times == (0.2, 0.3)
    with pytest.raises(ValueError, match=r"a\.mp4: no frame of its 0.4 seconds is between 7 and 9"):
        watch(tmp_path / "a.mp4", (7.0, 9.0))


def test_the_model_hears_the_seconds_as_it_does_of_our_own_videos(clone, tmp_path):
    run = evaluate_now(SUITES["videomme"](clone), BaselineAgent("gold"), tmp_path / "out", OPTIONS)
    assert [row.value for row in run.rows] == [1.0]
    suite = SUITES["videomme"](clone)
    (question,) = load_questions(VIDEOMME, clone)

    async def first():
        async with suite.open(suite.tasks) as (task,):
            return await task.environment(Item("videomme", question.key, 0, question)).reset()

    seen = asyncio.run(first())
    video, text = shown(seen)
    assert isinstance(video, Video)
    assert video.timestamps == question.load().times
    assert text == Text(question.text)
    (message,) = OwnTalk("", GeometryConfig()).asked(seen)
    said = [part.get("text") for part in message["content"]]
    assert said[:4] == [None, "0.0 seconds", None, "0.3 seconds"]
    assert said[-1] == question.text
    exam = Exam(suite)
    with pytest.raises(ValueError, match="videomme/001-1 shows a video; only text and pictures can be bridged"):
        exam.question(exam.names()[0])
    exam.close()


@pytest.mark.parametrize("kind", ["missing", "empty", "torn", "text"])
def test_videos_that_cannot_be_shown_are_errors_that_name_them(clone, tmp_path, kind):
    file = clone / "data/fFjv93ACGo8.mp4"
    whole = file.read_bytes()
    file.unlink()
    if kind != "missing":
        file.write_bytes({"empty": b"", "torn": whole[: len(whole) // 3], "text": b"no video\n" * 99}[kind])
    run = evaluate_now(SUITES["videomme"](clone), BaselineAgent("gold"), tmp_path / "out", OPTIONS)
    (row,) = run.errors
    assert row.error.startswith(f"ValueError: {file}")
    assert row.value is None


def test_the_made_videos_are_what_the_world_drew(tmp_path):
    make_videomme(tmp_path)
    found = load_questions(VIDEOMME, tmp_path)
    (example, _), *_ = _examples("videos/direction", 12)
    seen = found[0].load()
    assert seen.times == next(part.timestamps for part in example.prompt if isinstance(part, Video))
    apart = [np.abs(a.astype(int) - b).mean() for a, b in zip(seen.images, example.images, strict=True)]
    assert max(apart) < 6


def test_other_endings_and_folders_and_a_clone_with_parquet(clone, tmp_path):
    datasets = pytest.importorskip("datasets")
    (clone / "videos").mkdir()
    (clone / "data/fFjv93ACGo8.mp4").rename(clone / "videos/fFjv93ACGo8.MP4")
    (clone / "test.jsonl").unlink()
    datasets.Dataset.from_list([ROW]).to_parquet(clone / "videomme/test-00000-of-00001.parquet")
    (question,) = load_questions(VIDEOMME, clone)
    assert len(question.load().images) == FRAMES
    (clone / "more").mkdir()
    datasets.Dataset.from_list([ROW]).to_parquet(clone / "more/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="parquet files in several folders"):
        load_questions(VIDEOMME, clone)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": "E"}, "'E' is right, its options are 'A. Apples"),
        ({"options": ["Apples", "B. x"]}, "'C' is right, its options are 'Apples', 'B. x'"),
        ({"options": ["A. x"]}, "options must be a list of texts"), ({"options": None}, "there is no options"),
        ({"question": ""}, "question must be a text"), ({"videoID": None}, "there is no videoID"),
        ({"answer": None}, "there is no answer"), ({"question_id": None}, "there is no question_id"),
    ],
)  # fmt: skip
def test_rows_that_are_wrong_are_named(clone, changes, says):
    (clone / "test.jsonl").write_text(json.dumps(ROW | changes) + "\n")
    with pytest.raises(ValueError, match=rf"^videomme, .*test\.jsonl, line 1: .*{says}"):
        load_questions(VIDEOMME, clone)


def test_the_hub_alone_has_no_videos():
    with pytest.raises(ValueError, match=r"here, test 0: .*give the folder of a clone where they are unpacked"):
        VIDEOMME.read(Row(ROW, "here, test 0", 0))


def question_of_mvbench(folder, task: str, **values):
    row = {
        "video": "a.avi",
        "question": "Which way?",
        "candidates": ["left", "right", "up"],
        "answer": "right",
        **values,
    }
    (folder / "json").mkdir(parents=True, exist_ok=True)
    (folder / f"json/{task}.json").write_text(json.dumps([row]))
    (found,) = (q for q in load_questions(MVBENCH, folder) if q.slices["task"] == task.replace("_", " "))
    return found


def test_mvbench_of_either_branch(tmp_path):
    """Seconds of a row count where a video is whole, and not where it was cut already."""
    for name in ("video/star/Charades_v1_480", "star/Charades_segment"):
        (tmp_path / name).mkdir(parents=True)
    film(tmp_path / "video/star/Charades_v1_480/a.avi", 50)
    question = question_of_mvbench(tmp_path, "action_sequence", start=1.0, end=2.05)
    assert question.text == ("Question: Which way?\nOptions:\n(A) left\n(B) right\n(C) up\nOnly give the best option.")
    assert (question.key, question.answers) == ("action_sequence-1", ("B",))
    assert question.load().times == pytest.approx([1.0 + n / 10 for n in range(11)])
    film(tmp_path / "star/Charades_segment/a.mp4", 20)  # converted
    assert len(question.load().times) == 20
    with pytest.raises(ValueError, match=r"Moments_in_Time_Raw/videos/a\.avi is missing"):
        question_of_mvbench(tmp_path, "fine_grained_action").load()


def test_mvbench_has_videos_of_stills(tmp_path):
    folder = tmp_path / "video/tvqa/frames_fps3_hq/friends_1"
    folder.mkdir(parents=True)
    for n in range(30):
        (folder / f"{n + 1:05}.png").write_bytes(encode_image(np.full((56, 84, 3), 8 * n, np.uint8)).data)
    seen = question_of_mvbench(tmp_path, "episodic_reasoning", video="friends_1", start=2.0, end=4.0).load()
    assert seen.times == pytest.approx([n / 3 for n in range(6, 13)])
    assert [image.mean() for image in seen.images] == [8.0 * n for n in range(6, 13)]
    with pytest.raises(ValueError, match=r"friends_1: no frame of its 9\.66667 seconds is between 60 and 70"):
        question_of_mvbench(tmp_path, "episodic_reasoning", video="friends_1", start=60, end=70).load()


@pytest.mark.parametrize(
    ("task", "values", "says"),
    [
        ("cooking", {}, "'cooking' is none of the tasks"),
        ("state_change", {"answer": "down"}, "none of the candidates"),
        ("state_change", {"candidates": "left"}, "candidates must be a list"),
        ("state_change", {"start": 3, "end": 2}, "one before the other"),
        ("state_change", {"start": 3}, "must be seconds"),
        ("state_change", {"video": None}, "there is no video"),
    ],
)  # fmt: skip
def test_rows_of_mvbench_that_are_wrong_are_named(tmp_path, task, values, says):
    with pytest.raises(ValueError, match=rf"^mvbench, .*{task}\.json, row 1: .*{says}"):
        question_of_mvbench(tmp_path, task, **values)
