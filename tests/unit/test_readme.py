"""What the README and the encoder's guide show runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

from mmagent.interop.agent_folder import save_agent
from mmagent.interop.conversion import export_model
from mmagent.records import encode_image
from mmagent.sandbox import SandboxUnavailable
from tests.interop.hub_kit import tiny_agent

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": 6, "recipes/ENCODER.md": 1, "recipes/RL.md": 1}
"""And how many examples in Python each has."""


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_in_python_run(page, tmp_path, monkeypatch):
    """In order; commands before the README's have left a folder ``exported`` and an agent, and there is a picture."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == PAGES[page]
    monkeypatch.chdir(tmp_path)  # what they write
    if page == "README.md":
        agent = tiny_agent()
        export_model(tmp_path / "exported", agent, "hub")
        save_agent(tmp_path / "runs/mine/agent", agent.model, agent.vocab, agent.geometry, agent.chat)
        screen = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
        (tmp_path / "screen.png").write_bytes(encode_image(screen).data)
    for example in examples:
        try:
            exec(compile(example, page, "exec"), {"__name__": "readme"})
        except SandboxUnavailable as error:  # of the machine, and told as the page says
            pytest.skip(str(error))


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
