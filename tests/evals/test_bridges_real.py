"""The real lmms-eval and VLMEvalKit, offline, each by its own command: our suites and models there score as in our own
run, to the item. They are left out without the environment of ``tools/harness_environment.sh``."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bridge_kit import SOURCE, Scripted, scripted, serving

from evals.bridges.export import write_lmms, write_vlmeval
from evals.endpoint import EndpointAgent, EndpointConfig
from evals.local import LocalAgent
from evals.runner import Options, evaluate_now
from evals.store import Run
from evals.suite import Agent
from evals.summary import summarise
from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import Agent as Folder
from mmagent.interop.agent_folder import save_agent
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.vocab import SPECIAL_TOKENS, Vocab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each imports thousands of modules first
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def theirs() -> Path:
    """The interpreter that has them: ``MMAGENT_HARNESSES``, or ``.harnesses`` of the project."""
    folder = Path(os.environ.get("MMAGENT_HARNESSES", ROOT / ".harnesses"))
    if not (folder / ".mmagent-harnesses").is_file():
        pytest.skip(f"no lmms-eval in {folder}; `bash tools/harness_environment.sh {folder}` makes it")
    return folder / "bin" / "python"


@pytest.fixture
def server() -> Iterator[Scripted]:
    with serving(scripted(SOURCE)) as made:
        yield made


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    vocab = Vocab.train(["How far does it get? Answer with a number, in m. 17"], 256 + len(SPECIAL_TOKENS) + 10)
    torch.manual_seed(0)
    model = AgentModel(presets.debug(vocab.size, vocab.image_id)).eval()
    save_agent(tmp_path / "agent", **Folder(model, vocab, GeometryConfig(min_tokens=1), ChatConfig())._asdict())
    return tmp_path / "agent"


def ours(agent: Agent, folder: Path) -> Run:
    return evaluate_now(SOURCE.build(), agent, folder, Options(limit=SOURCE.limit, progress=False))


def command(python: Path, cwd: Path, *argv: object, **variables: str) -> str:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(cwd / "hf"),
        **variables,
    }
    done = subprocess.run(
        [str(python), *map(str, argv)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def lmms(python: Path, folder: Path, who: str) -> tuple[float, dict[str, dict]]:
    """The score that lmms-eval prints, and its samples by our keys."""
    write_lmms(SOURCE, folder / "questions")
    command(
        python, folder, "-m", "lmms_eval", "--model", "mmagent", "--model_args", who, "--include_path", "questions",
        "--tasks", "mmagent_worlds", "--log_samples", "--output_path", "out", "--process_with_media",
    )  # fmt: skip
    (results,) = (folder / "out").rglob("*_results.json")
    (samples,) = (folder / "out").rglob("*_samples_mmagent_worlds.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    score = json.loads(results.read_text())["results"]["mmagent_worlds"]["score,none"]
    return score, {row["score"]["key"]: row for row in rows}


def plain(text: str) -> str:
    """Without control tokens, which rows keep of an answer that was cut, and environments are never told."""
    return re.sub("|".join(map(re.escape, SPECIAL_TOKENS)), "", text).strip()


def test_an_endpoint_in_lmms_eval(theirs, server, tmp_path):
    run = ours(EndpointAgent(EndpointConfig(server.url, "m")), tmp_path / "ours")
    assert {row.value for row in run.rows} == {0.0, 1.0}
    score, samples = lmms(theirs, tmp_path, f"url={server.url},model=m")
    assert score == pytest.approx(summarise(run.rows).score.mean, abs=1e-12)
    assert {key: row["score"]["score"] for key, row in samples.items()} == {row.key: row.value for row in run.rows}


def test_a_checkpoint_in_lmms_eval(theirs, checkpoint, tmp_path):
    """Random weights: what is written must be the same, letter by letter, from the end of its thinking on."""
    run = ours(LocalAgent.load(checkpoint, device="cpu"), tmp_path / "ours")
    score, samples = lmms(theirs, tmp_path, f"checkpoint={checkpoint},device=cpu")
    assert score == pytest.approx(summarise(run.rows).score.mean, abs=1e-12)
    said = {row.key: plain(row.steps[0].said or row.steps[0].action) for row in run.rows}
    theirs_said = {key: plain(row["filtered_resps"]) for key, row in samples.items()}
    assert theirs_said.keys() == said.keys()
    for key, text in theirs_said.items():
        assert len(text) > 20
        assert said[key].endswith(text)


def test_an_endpoint_in_vlmeval(theirs, server, tmp_path):
    run = ours(EndpointAgent(EndpointConfig(server.url, "m")), tmp_path / "ours")
    write_vlmeval(SOURCE, tmp_path / "data")
    command(
        theirs, tmp_path, "-m", "evals.bridges.vlmeval", "--url", server.url, "--name", "m", "--data", "mmagent_worlds",
        "--work-dir", tmp_path / "out", LMUData=str(tmp_path / "data"),
    )  # fmt: skip
    (scored,) = (path for path in (tmp_path / "out").rglob("*_scored.json") if not path.is_symlink())
    rows = json.loads(scored.read_text())
    values = {row["key"]: row["score"] for row in rows}
    assert values == {row.key: row.value for row in run.rows}
    (status,) = (path for path in (tmp_path / "out").rglob("*status*.json") if not path.is_symlink())
    assert f"{100 * summarise(run.rows).score.mean:.4f}"[:6] in status.read_text()
