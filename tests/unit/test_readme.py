"""What the README shows runs as it stands there."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_custom_encoder_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {"__name__": "readme"})


def test_every_path_it_names_exists():
    root = README.parent
    named = re.findall(r"`((?:tools|tests|recipes|mmagent)/[\w/.]+)`", README.read_text(encoding="utf-8"))
    missing = [path for path in named if not (root / path).exists()]
    assert not missing, f"the README names {missing}"
