"""What a user can mend is told alike by every command: a line that begins with ``error: ``, and a status but 0."""

from __future__ import annotations

import importlib

import pytest

from mmagent.config import parse_cli

NOWHERE = "nowhere-at-all"
WRONG = {
    "data_pipelines.build": [f"folder={NOWHERE}", "sources.poems.samples=3"],
    "data_pipelines.curate": [f"folders=[{NOWHERE}]", "to=there"],
    "data_pipelines.validate": [NOWHERE],
    "data_pipelines.ingest.__main__": [NOWHERE, "there"],
    "recipes.curate": [f"folders=[{NOWHERE}]", "to=there"],
    "evals.__main__": [NOWHERE],
    "tools.convert": [NOWHERE, "--check"],
    "tools.convert_encoder": ["export", NOWHERE, "there"],
    "tools.merge": [NOWHERE, "--into", "there"],
    "tools.report": [NOWHERE],
}


def said(call, capsys) -> list[str]:
    """The lines of an error: of stderr, or of the exit that would print them."""
    told = ""
    try:
        status = call()
    except SystemExit as stop:
        status = stop.code
    if isinstance(status, str):
        told, status = status, 1
    assert status
    return [line for line in (capsys.readouterr().err + told).splitlines() if line]


@pytest.mark.parametrize("module", WRONG)
def test_an_error_is_told_as_one(tmp_path, monkeypatch, capsys, module):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(module).main
    lines = said(lambda: main(WRONG[module]), capsys)
    assert any(line.startswith("error: ") or ": error: " in line for line in lines), lines
    assert not any(line.startswith("Traceback") for line in lines)


PRESETS = {
    "recipes.pretrain": "laptop", "recipes.sft": "laptop", "recipes.rl": "laptop", "recipes.distill_encoder": "laptop",
    "recipes.align_encoder": "laptop", "recipes.teachers": "siglip2", "data_pipelines.build": "laptop",
    "data_pipelines.curate": "pairs",
}  # fmt: skip


@pytest.mark.parametrize("module", PRESETS)
def test_a_typo_in_a_key_is_told_as_an_error(capsys, module):
    preset = getattr(importlib.import_module(module), PRESETS[module])
    (line,) = said(lambda: parse_cli({"only": preset}, "", ["outptu=3"]), capsys)
    assert line.startswith("error: unknown config key 'outptu' in the command line")
