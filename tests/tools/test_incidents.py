"""The documents of an incident are found by their keys and shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from data_pipelines.shards import ShardWriter
from mmagent.chat import Image, assistant, user
from mmagent.records import Record, encode_image
from mmagent.train.health import HealthConfig
from mmagent.train.incidents import Incident, append_incident, read_incidents
from mmagent.train.logs import read_jsonl
from mmagent.train.loop import fit
from tests.engine_kit import toy_run
from tools.incidents import main


@pytest.fixture
def run(tmp_path):
    toy = toy_run(tmp_path / "run", health=HealthConfig("skip"), spoil={2: math.nan})
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=4)
    return tmp_path / "run"


def test_incidents_are_listed_and_their_documents_found(run, tmp_path, capsys):
    (incident,) = read_incidents(run / "incidents.jsonl")
    key = incident.findings[0].documents[0]
    pixels = np.zeros((4, 4, 3), np.uint8)
    with ShardWriter(tmp_path / "data" / "source") as writer:
        for name in ("other", key):
            messages = (user(Image(), f"what {name} says"), assistant("yes"))
            writer.write(Record(name, "s", messages, images=(encode_image(pixels),)))
    assert main([str(run), "--data", str(tmp_path / "data"), "--show", str(tmp_path / "shown")]) == 0
    out = capsys.readouterr().out
    assert "step 3: the loss is not finite" in out
    assert f"what {key} says" in out
    assert "what other says" not in out
    (image,) = (tmp_path / "shown").iterdir()
    assert image.name.startswith(key)
    assert image.read_bytes() == encode_image(pixels).data


def test_what_is_not_there_is_said(run, tmp_path, capsys):
    assert main([str(run), "--step", "9"]) == 1
    assert "no incidents at step 9" in capsys.readouterr().err
    with ShardWriter(tmp_path / "data") as writer:
        writer.write(Record("other", "s", (user("q"), assistant("a"))))
    assert main([str(run), "--step", "3", "--data", str(tmp_path / "data")]) == 1
    assert "not found: sample-0-5-0" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        main([str(run), "--data", str(tmp_path / "empty")])
    assert left.value.code == 2
    assert "holds no shards" in capsys.readouterr().err


def test_files_count_steps_as_people_are_told(run):
    """The third batch is spoilt: step 3 on the console, in the log, in the file and for --step."""
    (row,) = read_jsonl(run / "incidents.jsonl")
    (incident,) = read_incidents(run / "incidents.jsonl")
    assert row["step"] == 3
    assert incident.step == 2
    assert "step 3:" in incident.paragraph(run)
    rolled = replace(incident, action="rollback", to=1, leaves_out=(1, 2))
    assert rolled.to_json()["leaves_out"] == (2, 3)
    assert rolled.to_json()["to"] == 1  # a checkpoint is called by the steps done
    assert Incident.from_json(json.loads(json.dumps(rolled.to_json()))) == rolled
    assert Incident.from_json(incident.to_json()) == incident


def test_an_older_format_is_told_in_a_line(run, capsys):
    path = run / "incidents.jsonl"
    path.write_text(path.read_text().replace('"format": 2, ', ""))
    with pytest.raises(SystemExit):
        main([str(run)])
    assert "has the format of before 2, and this version reads 2" in capsys.readouterr().err


def test_a_torn_line_is_left_out(run):
    path = run / "incidents.jsonl"
    (incident,) = read_incidents(path)
    append_incident(path, incident)
    path.write_text(path.read_text()[:-5])
    assert read_incidents(path) == [incident]
