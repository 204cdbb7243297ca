"""What the README and the encoder's guide show runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "recipes/ENCODER.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_example_in_python_runs(page, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)  # what it writes
    exec(compile(example, page, "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES)
def test_every_path_it_names_exists(page):
    named = re.findall(r"`((?:tools|tests|recipes|mmagent)/[\w/.]+)`", (ROOT / page).read_text(encoding="utf-8"))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page} names {missing}"


def test_the_guides_settings_are_there():
    """Every ``key=value`` of its commands for the two stages resolves."""
    from mmagent.config import resolve
    from recipes import align_encoder, distill_encoder

    text = (ROOT / "recipes/ENCODER.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"-m recipes\.(distill_encoder|align_encoder) --preset (\w+) (.*)", text)
    assert {name for name, _, _ in commands} == {"distill_encoder", "align_encoder"}
    for name, preset, rest in commands:
        recipe = {"distill_encoder": distill_encoder, "align_encoder": align_encoder}[name]
        resolve(getattr(recipe, preset)(), rest.split())
    told = re.findall(r"`((?:objective|optim|average|mask|role_schedules|cache)\.[\w.]+=[\w.-]+)", text)
    assert len(told) >= 8
    for setting in told:
        recipe = align_encoder if "words" in setting else distill_encoder
        resolve(recipe.laptop(), [setting])
