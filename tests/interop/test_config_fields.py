"""Every field of a released folder's ``config.json`` and ``generation_config.json`` is refused, comes out of an export
again, or is named as not kept: nothing that a folder says is lost in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmagent.interop.conversion import Plan, convert
from mmagent.interop.glm_config import read_config
from mmagent.interop.model_source import open_source
from tests.conversion_kit import KINDS, released

WRITER = "transformers_version"
"""Who wrote the file, and nothing about the model."""


def leaves(told: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in told.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def at(told: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        told = told.get(name, KeyError) if isinstance(told, dict) else KeyError
    return told


def another(value: Any) -> Any:
    """Of the same type where that is possible, so that it is what it says that counts."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    return [*value, value[-1]] if value else [7]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_comes_out_again_or_is_named(tmp_path, kind):
    released(tmp_path / "theirs", kind)
    notes = convert(tmp_path / "theirs", tmp_path / "ours", "native")
    convert(tmp_path / "ours", tmp_path / "back", kind)
    noted = " ".join(note for note in notes if note.startswith("config.json: not kept: "))
    told, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    read = read_config(tmp_path / "back").to_dict()  # what the file leaves to the class is as good as said
    seen = 0
    for path, value in leaves(told):
        if path != (WRITER,):
            name = ".".join(path)
            assert at(back, path) == value or at(read, path) == value or f"{name} {value!r} (not " in noted, name
            seen += 1
    assert seen > 25


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_with_another_value_is_refused_or_comes_out_again_or_is_named(tmp_path, kind):
    released(tmp_path, kind)
    file = tmp_path / "config.json"
    told = json.loads(file.read_text())
    inner = [()] + [(part,) for part in ("text_config", "vision_config") if part in told]
    fields = [(path, another(value)) for path, value in leaves(told) if path != (WRITER,)]
    fields += [((*part, "of_another_library"), value) for part in inner for value in (3, None, {"a": [1]})]
    lost = []
    for path, value in fields:
        changed = json.loads(json.dumps(told))
        at(changed, path[:-1])[path[-1]] = value
        file.write_text(json.dumps(changed))
        try:
            with open_source(tmp_path) as source:
                notes = source.notes
                again = at(Plan(source, kind)._theirs, path)
        except ValueError:
            continue
        named = any(note.startswith("config.json: not kept: ") and f" {'.'.join(path)}" in note for note in notes)
        if again != value and not named and value is not None:
            lost.append((".".join(path), value))
    assert not lost


def test_how_to_generate_is_named(tmp_path):
    """Settings of sampling, and ids that are not those which an export writes."""
    assert notes_of(tmp_path, {"transformers_version": "4.54.0"}) == []
    assert notes_of(tmp_path, {"eos_token_id": [1], "pad_token_id": 5, "suppress_tokens": [2]}) == [
        "generation_config.json: not kept: eos_token_id [1], pad_token_id 5, suppress_tokens [2]"
    ]
    assert notes_of(tmp_path, {"eos_token_id": 1, "temperature": 0.7, "use_cache": True}) == [
        "generation_config.json: not kept: eos_token_id 1, temperature 0.7"
    ]


def notes_of(folder: Path, told: dict[str, Any]) -> list[str]:
    if not (folder / "config.json").is_file():
        released(folder, "glm_ocr")
    (folder / "generation_config.json").write_text(json.dumps(told))
    with open_source(folder) as source:
        return [note for note in source.notes if note.startswith("generation_config.json")]
