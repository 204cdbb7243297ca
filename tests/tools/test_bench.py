"""The benchmark runs, in its smallest size, and says what it measured."""

from __future__ import annotations

import json

import pytest

from tools import bench
from tools.benchmarks.row import Row, Settings, smaller_is_better, table, throughput


def test_ratio_above_one_means_that_ours_is_better():
    calls: list[str] = []
    row = throughput("x", lambda: calls.append("a"), lambda: sum(range(200_000)), "slow", 10, "things/s", Settings(5))
    assert row.ratio > 1
    assert row.ours > row.peer
    assert len(calls) == 6  # one to warm up
    assert smaller_is_better("bytes", 10, 40, "wasteful", "MiB").ratio == 4


def test_table_is_aligned():
    text = table([Row("a", 1234.5, 3.14159, "peer", 393.0, "tokens/s", 0.07)])
    lines = text.splitlines()
    assert len(lines) == 3
    assert "1,234" in lines[2]
    assert "±7%" in lines[2]


def test_unknown_areas_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["nothing"])
    assert "encoder" in capsys.readouterr().err


@pytest.mark.parametrize("area", [pytest.param("encoder", marks=pytest.mark.slow), "model", "data", "contrastive"])
def test_areas_run_and_write_json(area, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert bench.main([area, "--quick", "--repeats", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) >= 2
    assert rows[0].keys() == {"name", "ours", "peer", "peer_name", "ratio", "unit", "spread"}
    assert all(row["ratio"] > 0 for row in rows)
    assert rows[0]["name"] in capsys.readouterr().out
