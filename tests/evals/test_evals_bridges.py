"""Bridges to other harnesses without them: questions, judge, what is written, and what their questions become."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
from bridge_kit import LOST, SOURCE, scripted, serving
from evals_kit import RuleAgent
from PIL import Image

import evals.bridges.__main__ as command
from evals.bridges import lmms_task
from evals.bridges.answers import Answerer, Asked
from evals.bridges.exam import Exam, Source, digest, exam
from evals.bridges.export import read_answers, write_lmms, write_vlmeval
from evals.endpoint import EndpointAgent, EndpointConfig
from evals.runner import Options, evaluate_now
from evals.summary import summarise
from mmagent.generation.http import EndpointUnavailable


@pytest.fixture
def our_exam():
    made = Exam(SOURCE.build(), SOURCE.limit)
    yield made
    made.close()
    made.close()


def test_the_exam_judges_as_our_own_run_does(our_exam, tmp_path):
    with serving(scripted(SOURCE)) as server:
        agent = EndpointAgent(EndpointConfig(server.url, "m"))
        run = evaluate_now(SOURCE.build(), agent, tmp_path, Options(limit=SOURCE.limit, progress=False))
    rows = {row.key: row for row in run.rows}
    assert sorted(our_exam.names()) == sorted(rows)
    assert {row.value for row in run.rows} == {0.0, 1.0}
    for key, row in rows.items():
        said = row.steps[0].said or row.steps[0].action
        assert our_exam.judge(key, said).value == row.value, key
        assert our_exam.judge(key, our_exam.gold(key)).value == 1.0
        assert our_exam.judge(key, "").value == 0.0


def test_the_mean_is_ours(our_exam, tmp_path):
    """7 items of 3 tasks: one task has more items than the others, and none more weight."""
    agent = RuleAgent(lambda task, item, seed: next(task.gold(item)) if item.key.endswith("0") else "no")
    run = evaluate_now(SOURCE.build(), agent, tmp_path, Options(limit=SOURCE.limit, progress=False))
    scored = [{"task": row.task, "score": row.value} for row in run.rows]
    assert len({row.task for row in run.rows}) == 3
    assert lmms_task.mean_over_tasks(scored) == pytest.approx(summarise(run.rows).score.mean, abs=1e-12)
    assert np.mean([row.value for row in run.rows]) != pytest.approx(lmms_task.mean_over_tasks(scored))


def test_what_cannot_be_bridged_is_refused(our_exam):
    with pytest.raises(ValueError, match="suite tasks: 30 turns an item"):
        Exam(Source("tasks").build())
    with pytest.raises(ValueError, match="suite worlds has no item 'x' among its 7"):
        our_exam.judge("x", "")
    film = Exam(Source("worlds", tasks=("race",)).build(), 1)
    with pytest.raises(ValueError, match="race/test-0 shows a video; only text and pictures"):
        film.question(film.names()[0])
    film.close()
    with pytest.raises(ValueError, match="no suite 'world'"):
        Source("world").build()
    with pytest.raises(ValueError, match="suite worlds takes no data"):
        Source("worlds", "somewhere").build()


def test_an_exam_that_fails_to_open_says_why():
    broken = Exam(dataclasses.replace(SOURCE.build(), open=_broken), 3)
    with pytest.raises(RuntimeError, match="no room"):
        broken.names()
    broken.close()


def _broken(names):
    raise RuntimeError("no room")


def test_questions_of_another_version_are_not_judged():
    suite = SOURCE.build()
    pinned = dataclasses.replace(SOURCE, pinned=digest(suite))
    assert Source.of(pinned.text()) == pinned
    assert exam(pinned.text()) is exam(pinned.text())
    stale = dataclasses.replace(SOURCE, pinned=digest(dataclasses.replace(suite, version=suite.version + 1)))
    with pytest.raises(ValueError, match="write them again"):
        exam(stale.text())


def test_what_lmms_eval_reads(our_exam, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = write_lmms(SOURCE, tmp_path)
    said = path.read_text()
    assert "task: mmagent_worlds" in said
    assert "process_results: !function evals.bridges.lmms_task.judged" in said
    rows = datasets.load_from_disk(str(tmp_path / "mmagent_worlds"))["test"]
    assert [row["key"] for row in rows] == our_exam.names()
    kinds = set()
    for row in rows:
        system, user = lmms_task.messages(row)
        question = our_exam.question(row["key"])
        assert system["content"] == [{"type": "text", "text": question.rules}]
        kinds.add(row["layout"])
        back = lmms_task.asked([system, user], {"max_new_tokens": 9, "temperature": 0.0, "do_sample": False}, "x")
        assert (back.rules, back.max_tokens, back.temperature) == (question.rules, 9, 0.0)
        for ours, theirs in zip(question.pieces, back.pieces, strict=True):
            assert np.array_equal(ours, theirs)
        assert lmms_task.words(row).startswith(question.rules)
        (result,) = lmms_task.judged(row, [our_exam.gold(row["key"])]).values()
        assert result == {"key": row["key"], "task": row["task"], "score": 1.0}
    assert kinds == {"T", "IT"}


@pytest.mark.parametrize("kind", ["tsv", "csv", "json", "xlsx"])
@pytest.mark.parametrize("said", [["3", "007", ""], ["NA", "None", "1e3"], ["two\nlines", '"', "\t"]])
def test_answers_are_read_as_they_were_written(said, kind, tmp_path):
    """By pandas left to itself they are 3.0, 7.0 and nothing; nothing, nothing and 1000.0."""
    pandas = pytest.importorskip("pandas")
    table, path = pandas.DataFrame({"index": range(3), "prediction": said}), tmp_path / f"answers.{kind}"
    if kind == "xlsx":
        pytest.importorskip("openpyxl")
        table.to_excel(path, index=False)
    elif kind == "json":
        table.to_json(path, orient="records")
    else:
        table.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    assert read_answers(path)["prediction"].tolist() == said


def test_what_vlmeval_reads(our_exam, tmp_path):
    path = write_vlmeval(SOURCE, tmp_path)
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["key"] for row in rows] == our_exam.names()
    for row in rows:
        question = our_exam.question(row["key"])
        rules, *pieces = json.loads(row["pieces"])
        assert rules == {"type": "text", "value": question.rules, "role": "system"}
        for ours, theirs in zip(question.pieces, pieces, strict=True):
            if theirs["type"] == "image":
                shown = Image.open(tmp_path / "images" / "mmagent_worlds" / theirs["value"])
                assert np.array_equal(np.asarray(shown), ours)
            else:
                assert theirs["value"] == ours
        assert Source.of(row["source"]).suite == "worlds"


def test_an_answerer_asks_as_our_harness_does(our_exam):
    with serving(scripted(SOURCE)) as server:
        answerer = Answerer.of(url=server.url, model="m")
        questions = map(our_exam.question, our_exam.names())
        asked = [Asked(question.pieces, question.rules, 33, 0.5, 0.9) for question in questions]
        said = answerer.answers(asked)
        assert LOST not in said
        assert said[1:3] == ["nonsense", ""]
        assert said[0] == our_exam.gold(our_exam.names()[0])  # what was thought before is left out
        body = server.bodies[0]
        assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("m", 33, 0.5, 0.9)
        assert answerer.answers([Asked(("another thing",))]) == [LOST]
    with pytest.raises(EndpointUnavailable):
        answerer.answers([Asked(("are you there?",))])


def test_who_is_asked_must_be_said():
    with pytest.raises(ValueError, match="who is asked"):
        Answerer.of()
    with pytest.raises(ValueError, match="who is asked"):
        Answerer.of(checkpoint="a", url="b")
    with pytest.raises(ValueError, match="url wants model=NAME"):
        Answerer.of(url="http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "assistant", "content": []}], "t 3: mmagent takes one turn here, and this is a conversation"),
        ([{"role": "user", "content": []}] * 2, "t 3: mmagent takes one turn here, and these are 2"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "t 3: mmagent is shown no video here"),
    ],
)
def test_questions_of_lmms_eval_that_are_not_taken(messages, said):
    with pytest.raises(ValueError, match=said):
        lmms_task.asked(messages, {}, "t 3")


def test_generation_arguments_of_lmms_eval():
    user = [{"role": "user", "content": [{"type": "text", "text": "hm"}]}]
    assert lmms_task.asked(user, {}, "x") == Asked(("hm",), "", 1024, 0.0, 1.0)
    told = {"max_new_tokens": 5, "temperature": 0.7, "top_p": None, "do_sample": True}
    assert lmms_task.asked(user, told, "x") == Asked(("hm",), "", 5, 0.7, 1.0)
    assert lmms_task.asked(user, {"temperature": 0.7, "do_sample": False}, "x").temperature == 0.0


def test_the_command(tmp_path, capsys):
    argv = ["vlmeval", "worlds", str(tmp_path), "--tasks", "motion"]
    assert command.main([*argv, "--limit", "2"]) == 0
    assert f"mmagent_worlds: {tmp_path / 'mmagent_worlds.tsv'}" in capsys.readouterr().out
    for more, said in (
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--data", "x"], "worlds takes no data"),
        (["--tasks", "motoin"], "did you mean motion?"),
    ):
        assert command.main([*argv, *more]) == 2
        assert said in capsys.readouterr().err
    assert command.main(["lmms-eval", "sites", str(tmp_path)]) == 2
    assert "suite sites: 40 turns an item; only suites of one turn" in capsys.readouterr().err
