"""The tool that checks packing on a user's folder and shards, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_samples import record

from data_pipelines.shards import ShardWriter
from mmagent.chat import ChatConfig, user
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import save_agent
from mmagent.models.agent_model import AgentModel
from mmagent.models.presets import debug
from mmagent.records import Record
from mmagent.train.step import begun
from mmagent.vocab import Vocab
from tools import verify_packing

TOOL = Path(__file__).parents[2] / "tools" / "verify_packing.py"


def test_the_tool_passes_our_model_and_passes_over_bad_samples(tmp_path, capsys):
    vocab = Vocab.train(["question answer"], 300)
    torch.manual_seed(0)
    config = debug(vocab.size, vocab.image_id)
    geometry = GeometryConfig(patch_size=config.vision.patch_size, min_tokens=1, max_tokens=16)
    save_agent(tmp_path / "agent", AgentModel(config), vocab, geometry, ChatConfig())
    with ShardWriter(tmp_path / "shards") as writer:
        for n in range(5):
            writer.write(record(n))
        writer.write(Record("silent", "s", (user("no answer"),)))
    arguments = [str(tmp_path / "agent"), str(tmp_path / "shards"), "--documents", "6"]
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "5 documents" in done.stdout
    assert "ok   gradients" in done.stdout
    assert "passed over silent: messages: nothing to train on" in done.stderr
    begun.clear()
    with pytest.raises(ValueError, match="nope is no agent folder"):
        verify_packing.main(["nope", *arguments[1:]])
    assert not begun.is_set()  # an error of setting up
    assert verify_packing.main([*arguments, "--tolerance", "1e-12"]) == 1
    assert begun.is_set()
    assert "DIFF" in capsys.readouterr().out
