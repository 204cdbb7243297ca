"""The area browser: peers that are not here have a row that says so, and those that are win their episodes."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest

from mmagent.browser import find_chromium
from tools import bench
from tools.benchmarks import browser
from tools.benchmarks.row import Settings, as_json, not_run, table

NAME = f"miniwob {browser.TASK}: reset, look, click, reward, look"
PEERS = ["its own gym environment", "Playwright"]


def test_a_driver_is_looked_for_in_the_usual_places(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIWOB_CHROMEDRIVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    place = tmp_path / "lib" / "chromedriver"
    monkeypatch.setattr(browser, "DRIVERS", ("chromedriver", str(place)))
    with pytest.raises(browser.PeerMissing, match="no chromedriver: `apt-get install -y chromium-driver`, or name one"):
        browser.find_driver()
    for driver in (place, tmp_path / "bin" / "chromedriver"):  # what is on the path comes first
        driver.parent.mkdir()
        driver.write_text("#!/bin/sh\n")
        driver.chmod(0o755)
        assert browser.find_driver() == str(driver)
    monkeypatch.setenv("MINIWOB_CHROMEDRIVER", str(place))
    assert browser.find_driver() == str(place)
    monkeypatch.setenv("MINIWOB_CHROMEDRIVER", "/nowhere/chromedriver")
    with pytest.raises(browser.PeerMissing, match="MINIWOB_CHROMEDRIVER=/nowhere/chromedriver is no program"):
        browser.find_driver()


def test_peers_that_are_not_here_have_rows_that_say_so(monkeypatch, tmp_path, capsys):
    def missing():
        raise browser.PeerMissing("no such thing: `install it`")

    for name in ("Gym", "Playwright"):
        monkeypatch.setattr(browser, name, missing)
    file = tmp_path / "rows.json"
    assert bench.main(["browser", "--quick", "--json", str(file)]) == 0
    said = capsys.readouterr()
    assert "Playwright not run: no such thing: `install it`" in said.err
    assert "Playwright: not run" in said.out
    rows = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    assert [(row["name"], row["peer_name"], row["ratio"]) for row in rows] == [(NAME, peer, None) for peer in PEERS]


def test_a_row_that_was_not_run_has_no_figures():
    row = not_run("x", "peer", "things/s", "no peer")
    assert math.isnan(row.ratio)
    assert as_json(row)["missing"] == "no peer"
    assert table([row]).splitlines()[-1].split() == ["x", "-", "-", "peer:", "not", "run", "things/s", "-", "-"]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
def test_peers_that_are_here_win_their_episodes():
    found = {row.peer_name: row for row in browser.rows(Settings(repeats=1, quick=True))}
    assert sorted(found) == sorted(PEERS)
    assert bool(found["Playwright"].missing) == (importlib.util.find_spec("playwright") is None)
    for row in found.values():
        assert row.missing or (row.ours > 0 and row.peer > 0), row
