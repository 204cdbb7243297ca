"""The scripts of the two commands: they parse, fail clearly, and their pins agree with setup.py."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SCRIPTS = (*sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.sh")), ".ci/run")


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "tools" / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonical(n): v for n, _, v in (line.partition("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def setup_arguments() -> dict[str, object]:
    call = next(n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if getattr(n, "keywords", None))
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("install_requires", "extras_require")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_name_no_host(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert not re.search(r"https?://|--index-url|--extra-index|\.org\b|\.com\b", (ROOT / script).read_text())


def test_entry_points_can_be_run():
    for script in SCRIPTS:
        assert os.access(ROOT / script, os.X_OK), script


def test_every_requirement_is_pinned_inside_its_range():
    arguments = setup_arguments()
    runtime, tests, bench = (pins(f"requirements{kind}.txt") for kind in ("", "-test", "-bench"))
    wanted = [(r, runtime) for r in arguments["install_requires"]]
    wanted += [(r, runtime | tests) for r in arguments["extras_require"]["dev"]]
    wanted += [(r, bench) for r in arguments["extras_require"]["bench"]]
    for text, pinned in wanted:
        requirement = Requirement(text)
        version = pinned.get(canonical(requirement.name))
        assert version, f"{requirement.name} of setup.py has no pin"
        assert requirement.specifier.contains(Version(version)), f"{text} of setup.py, pinned to {version}"
    assert not runtime.keys() & tests.keys()
    assert not (runtime | tests).keys() & bench.keys()


def test_no_fitting_python_is_said_clearly(tmp_path):
    environment = {**os.environ, "PYTHON": "/nonexistent/python", "MMAGENT_VENV": str(tmp_path / "venv")}
    result = subprocess.run(
        ["bash", str(ROOT / "tools/quickstart.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 found (PYTHON=/nonexistent/python)" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_failing_install_shows_why_and_leaves_no_stamp(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    fake = venv / "bin" / "python"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *--version*) exit 0;;\n"
        "  *install*) echo 'ERROR: No matching distribution found for torch'; exit 1;;\n"
        "esac\n"
    )
    fake.chmod(0o755)
    result = subprocess.run(
        ["bash", str(ROOT / "tools/test.sh")],
        env={**os.environ, "MMAGENT_VENV": str(venv)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode != 0
    assert "No matching distribution" in result.stderr
    assert "could not install" in result.stderr
    assert not list(venv.glob(".mmagent-*"))


def make_vllm(tmp_path: Path, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools/vllm_environment.sh"), str(tmp_path / name)],
        env={**os.environ, "MMAGENT_VENV": str(tmp_path / "project"), **variables},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["project", "full", "another"])
def test_vllm_gets_a_folder_of_its_own(tmp_path, name):
    """Never the project's environment, nor another one, nor a folder that holds something else."""
    for folder, file in (("full", "thesis.txt"), ("another", "pyvenv.cfg")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("years")
    # should a guard fail, no interpreter is found, and nothing is lost
    result = make_vllm(tmp_path, name, PYTHON="/nonexistent/python")
    assert result.returncode != 0
    assert ("the project's environment" if name == "project" else "was not made by this script") in result.stderr
    assert not (tmp_path / "project").exists()
    assert (tmp_path / "another" / "pyvenv.cfg").read_text() == "years"


@pytest.mark.parametrize("mark", [None, "", ".mmagent-vllm", ".mmagent-vllm-folder"])
def test_vllm_goes_on_in_a_new_empty_or_interrupted_folder(tmp_path, mark):
    """As far as making it anew, by an interpreter that notes what it is asked and fails: the mark is there by then."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *"-m venv"*) ls -A "$MMAGENT_SEEN"; echo "$*"; exit 1;; esac\nexit 0\n')
    fake.chmod(0o755)
    if mark is not None:
        (tmp_path / "vllm").mkdir()
    if mark:
        (tmp_path / "vllm" / mark).write_text("")
        (tmp_path / "vllm" / "half").mkdir()
    result = make_vllm(tmp_path, "vllm", PYTHON=str(fake), MMAGENT_SEEN=str(tmp_path / "vllm"))
    assert "could not make" in result.stderr, result.stderr
    assert [path.name for path in (tmp_path / "vllm").iterdir()] == [".mmagent-vllm-folder"]
    assert ".mmagent-vllm-folder" in result.stdout
    assert "--clear" not in result.stdout
    assert "could not make" in make_vllm(tmp_path, "vllm", PYTHON=str(fake), MMAGENT_SEEN=str(tmp_path)).stderr
