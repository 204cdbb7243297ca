"""Questions over a corpus: which layouts are read, what is right, what is wrong and said so."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from evals_kit import Knows
from PIL import Image

from evals.__main__ import main
from evals.baselines import BaselineAgent
from evals.corpus_sets import load_corpus
from evals.runner import Options, evaluate_now
from evals.store import read_run
from evals.suites.corpus import HITS, MAX_TURNS, corpus_search, normalised, overlap, same
from evals.suites.made_corpus import make_corpus
from evals.summary import summarise
from mmagent.records import decode_image
from mmagent.tasks.tools import write_call

OPTIONS = Options(progress=False)
CORPUS = [
    {"_id": "MED-10", "title": "Bridges", "text": "The long bridge of Lumorn was built in 1540."},
    {"_id": "MED-11", "title": "", "text": "The emblem of Lumorn, on a flag.", "image": "images/flag.png"},
    {"_id": "MED-12", "title": "Hills", "text": "A hill is higher than a mound."},
]
QUERIES = [
    {"_id": "q1", "text": "When was the bridge of Lumorn built?", "metadata": {"answer": "1540"}},
    {"_id": "q2", "text": "Which colour has this flag?", "image": "images/flag.png", "answers": ["the blue", "navy"]},
    {"_id": "q3", "text": "What has no answer?"},
    {"_id": "q4", "text": "What does the other split ask?", "answers": ["this"]},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\tMED-10\t1\nq1\tMED-12\t0\nq2\tMED-11\t2\nq2\tMED-10\t1\nq3\tMED-12\t1\n"


def written(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """As BEIR publishes its sets, with pictures."""
    path = tmp_path / "set"
    (path / "qrels").mkdir(parents=True)
    (path / "images").mkdir()
    Image.fromarray(np.full((12, 16, 3), (0, 0, 200), np.uint8)).save(path / "images" / "flag.png")
    (path / "corpus.jsonl").write_text(written(CORPUS))
    (path / "queries.jsonl").write_text(written(QUERIES))
    (path / "qrels" / "test.tsv").write_text(QRELS)
    (path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq4\tMED-12\t1\n")
    return path


def test_a_folder_as_beir_publishes_them(folder):
    corpus = load_corpus(folder)
    assert [(e.title, e.told(), e.picture is not None) for e in corpus.entries] == [
        ("Bridges", "Bridges", False),
        ("", "The emblem of Lumorn, on a flag.", True),
        ("Hills", "Hills", False),
    ]
    assert [(q.key, q.answers, sorted(q.relevant)) for q in corpus.questions] == [
        ("q1", ("1540",), [0]),
        ("q2", ("the blue", "navy"), [0, 1]),
    ]  # q3 has no answer, of q4 the judged qrels do not speak
    assert [q.slices for q in corpus.questions] == [
        {"asked": "in words", "evidence": "passages"},
        {"asked": "about a picture", "evidence": "picture"},
    ]
    assert corpus.questions[1].picture().shape == corpus.entries[1].shown()[0].shape == (12, 16, 3)
    assert corpus.describe().startswith("2 questions (1 without an answer left out), 3 entries, ")
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.write((folder / "corpus.jsonl").read_text())
    (folder / "corpus.jsonl").unlink()
    assert load_corpus(folder).digest() == corpus.digest()


def test_without_qrels_all_with_an_answer_are_asked(folder):
    digest = load_corpus(folder).digest()
    for path in (folder / "qrels").iterdir():
        path.unlink()
    corpus = load_corpus(folder)
    assert [q.key for q in corpus.questions] == ["q1", "q2", "q4"]
    assert {len(q.relevant) for q in corpus.questions} == {0}
    assert corpus.digest() != digest


def saved(folder, blue) -> None:
    """ViDoRe V3's columns; one page has no picture, as in corpora of both kinds."""
    datasets = pytest.importorskip("datasets")
    corpus = datasets.Features(
        {name: datasets.Value("int64") for name in ("corpus_id", "page_number_in_doc")}
        | {"image": datasets.Image(), "doc_id": datasets.Value("string"), "markdown": datasets.Value("string")}
    )
    pages = {"corpus_id": [3, 5], "page_number_in_doc": [1, 2], "image": [blue, None], "doc_id": ["a", "a"]}
    pages["markdown"] = ["# Sales of pumps", "# Sales of wheels"]
    asked = {"query_id": [7, 8], "query": ["Who sells?", "Qui vend ?"], "language": ["english", "french"]}
    asked |= {"raw_answers": [["Ana", "Ana Kim"], []], "answer": ["Ana Kim", "Ana"]}
    judged = {"query_id": [7, 8, 8], "corpus_id": [5, 5, 3], "score": [1, 2, 1]}
    datasets.Dataset.from_dict(pages, features=corpus).save_to_disk(folder / "corpus")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(asked)}).save_to_disk(folder / "queries")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(judged)}).save_to_disk(folder / "qrels")


def test_tables_with_the_columns_of_vidore(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    saved(tmp_path, Image.new("RGB", (9, 6), "blue"))
    corpus = load_corpus(tmp_path)
    assert [(e.told(), [p.shape for p in e.shown()]) for e in corpus.entries] == [
        ("# Sales of pumps", [(6, 9, 3)]),
        ("# Sales of wheels", []),
    ]
    assert [(q.key, q.text, q.answers, sorted(q.relevant), q.slices) for q in corpus.questions] == [
        ("7", "Who sells?", ("Ana Kim", "Ana"), [1], {**corpus.questions[0].slices, "language": "english"}),
        ("8", "Qui vend ?", ("Ana",), [0, 1], {**corpus.questions[1].slices, "language": "french"}),
    ]
    # the same on the hub, where each table is a configuration; MTEB calls the qrels the default one
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["corpus", "default", "queries", "more"])
    names = {"default": "qrels"}
    there = {table: datasets.load_from_disk(tmp_path / table) for table in ("corpus", "queries", "qrels")}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, table=None: there[names.get(table, table)] if name == "lab/pages" else 1 / 0,
    )
    assert load_corpus("datasets:lab/pages").digest() == corpus.digest()
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    with pytest.raises(ValueError, match="lab/pages has no configuration corpus and no queries, but default"):
        load_corpus("datasets:lab/pages")


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("corpus.jsonl", "{", r"corpus\.jsonl, line 1: no JSON"),
        ("corpus.jsonl", "[]", "line 1: an object is expected"),
        ("corpus.jsonl", written([{"text": "x"}]), "line 1: none of the columns _id, id, corpus-id, corpus_id, but te"),
        ("corpus.jsonl", written([CORPUS[0], CORPUS[0]]), "line 2: entry 'MED-10' is there twice"),
        ("corpus.jsonl", written([{"_id": "a", "text": 3}]), "line 1: text must be a text, not 3"),
        ("corpus.jsonl", written([{"_id": "a", "image": "../b.png"}]), r"image '\.\./b\.png' is not within the folder"),
        ("corpus.jsonl", written([{"_id": "a", "image": "b.png"}]), "no entry of 1 has words"),
        ("queries.jsonl", written([QUERIES[0], QUERIES[0]]), "line 2: query 'q1' is there twice"),
        ("queries.jsonl", written([{**QUERIES[0], "answers": {"a": 1}}]), "answers must be a text or a list of texts"),
        ("queries.jsonl", written([{"_id": "q1", "answer": "x"}]), "query 'q1' asks nothing; columns: _id, answer"),
        ("queries.jsonl", written(QUERIES[:1]), "its qrels speak of query 'q2', which is not there"),
        ("queries.jsonl", written({**row, "answers": [], "metadata": {}} for row in QUERIES), "none of 3 queries has"),
        ("qrels/test.tsv", QRELS + "q1\tMED-99\t1\n", r"test\.tsv, line 7: the corpus has no entry 'MED-99'"),
        ("qrels/test.tsv", "q1\tMED-10\t1\nq2\tMED-11\t1\n", "none of the columns query-id, query_id, but q1"),
        ("qrels/test.tsv", QRELS + "q1\tMED-10\thigh\n", "line 7: the score of a qrel is 'high', no number"),
    ],
)
def test_what_is_wrong_is_named(folder, file, text, says):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=says):
        load_corpus(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    with pytest.raises(ValueError, match=r"which is judged, dev\.tsv, train\.tsv\? name it test\.tsv"):
        load_corpus(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no queries\.jsonl, and no queries that datasets saved"):
        load_corpus(folder)
    with pytest.raises(ValueError, match="is no folder"):
        load_corpus(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("answer", "truth", "right", "f1"),
    [  # by hand, as SQuAD's own script judges
        ("The Eiffel Tower!", "eiffel tower", True, 1.0),
        ("1,540", "1540", True, 1.0),
        ("a well-known theory", "wellknown theory", True, 1.0),
        ("An  apple\n", "apple", True, 1.0),
        ("theatre", "atre", False, 0.0),
        ("in the red house", "red house", False, 0.8),
        ("red red house", "red house", False, 0.8),
        ("", "red", False, 0.0),
        ("", "The A", False, 0.0),
        ("the", "an", False, 0.0),
        ("the a", "The A", True, 1.0),
        ("ÉCOLE", "école", True, 1.0),
    ],
)
def test_answers_are_judged_as_squad_does(answer, truth, right, f1):
    assert same(answer, truth) is right
    assert overlap(answer, truth) == pytest.approx(f1)
    assert normalised(normalised(answer)) == normalised(answer)


def judged(folder, out, turns: dict[str, list[str]]):
    run = evaluate_now(corpus_search(folder), Knows(lambda _, item: turns[item.key]), out, OPTIONS)
    assert not run.errors
    return run, {row.item: row for row in run.rows}


def test_an_episode(folder, tmp_path):
    search, look = write_call("search", query="emblem Lumorn"), write_call("open", number=1)
    run, rows = judged(folder, tmp_path / "out", {"q1": ["built in 1540"], "q2": [search, look, "Blue."]})
    calls = {"calls": 0.0, "refused": 0.0}
    assert (rows["q1"].value, rows["q1"].parts) == (0.0, calls | {"right": 0, "f1": 0.5, "recall": 0, "found": 0})
    assert (rows["q2"].value, rows["q2"].parts) == (
        1.0,
        {"calls": 2, "refused": 0, "right": 1, "f1": 1, "recall": 0.5, "found": 1},
    )
    steps = rows["q2"].steps
    assert steps[0].text.startswith("Which colour has this flag? Search for what you need")
    assert f"The {HITS} entries that fit" in steps[0].text
    assert steps[0].note == "1: The emblem of Lumorn, on a flag. (picture)\n0: Bridges (passage)"
    assert steps[1].note == "The emblem of Lumorn, on a flag."
    for step in (steps[0], steps[2]):  # the query's picture, and the entry's once it is open
        assert decode_image((run.folder / step.picture).read_bytes(), "").shape == (12, 16, 3)
    assert steps[1].picture is None


def test_what_was_opened_counts_without_an_answer(folder, tmp_path):
    look = write_call("open", number=0)
    _, rows = judged(folder, tmp_path / "out", {"q1": [look, ""], "q2": [look] * MAX_TURNS})
    assert (rows["q1"].value, rows["q1"].parts) == (0.0, {"malformed": 1.0, "recall": 1.0, "found": 1.0})
    told = {"calls": MAX_TURNS - 1, "refused": 0, "recall": 0.5, "found": 1}  # the last turn was for the answer
    assert (rows["q2"].value, rows["q2"].parts) == (0.0, told)


def test_a_picture_that_is_missing_is_an_error_and_no_zero(folder, tmp_path):
    (folder / "images" / "flag.png").unlink()
    run = evaluate_now(corpus_search(folder), BaselineAgent("gold"), tmp_path / "out", OPTIONS)
    assert [row.item for row in run.judged] == ["q1"]
    assert [row.error for row in run.errors] == [f"ValueError: {folder / 'images' / 'flag.png'} is missing"]


def test_the_drawn_set_is_of_the_published_form_and_one_name_means_one_thing(tmp_path):
    make_corpus(tmp_path / "made")
    corpus = load_corpus(tmp_path / "made")
    titles = [entry.title for entry in corpus.entries]
    assert len(set(titles)) == len(titles) > 300
    about = [q for q in corpus.questions if q.picture is not None]
    assert len(about) >= 6
    assert len(corpus.questions) - len(about) == 12
    assert {q.slices["evidence"] for q in corpus.questions} == {"picture", "passages"}
    for question in about:
        (emblem,) = [n for n in question.relevant if corpus.entries[n].picture is not None]
        assert np.array_equal(question.picture(), corpus.entries[emblem].shown()[0])


def test_the_command_takes_a_folder(folder, tmp_path):
    argv = ["corpus_search", "--data", str(folder), "--quiet", "--out", str(tmp_path / "o"), "--baseline", "gold"]
    assert main(argv) == 0
    run = read_run(tmp_path / "o" / "corpus_search")
    assert run.pins["suite.data"].startswith("2 questions (1 without an answer left out), 3 entries, ")
    summary = summarise(run.rows)
    assert (summary.score.mean, summary.parts["recall"], summary.parts["f1"]) == (1.0, 1.0, 1.0)
    assert set(summary.by_slice) == {"asked", "evidence"}
