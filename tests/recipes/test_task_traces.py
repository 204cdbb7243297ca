"""Conversations with right answers, from the tasks themselves and from rollouts, as records that fine-tuning reads."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from data_pipelines.shards import ShardSet
from mmagent.agent.store import save_trajectories
from mmagent.chat import ChatConfig, ToolCall
from mmagent.config import ConfigError
from mmagent.interop.agent_folder import new_agent, save_agent
from mmagent.models import presets
from mmagent.records import Record, from_sample
from mmagent.tasks import open_tasks
from mmagent.trajectories import Status, Trajectory
from recipes.task_traces import Config, main, write, written
from tests.agent_kit import GEOMETRY, tiny_vocab

COUNT, FUNCTIONS = "worlds/counting/objects/level-0", "functions/level-0"


def records(folder: Path) -> list[Record]:
    shards = ShardSet(folder)
    return [from_sample(shards.read(n)) for n in range(len(shards))]


def test_a_task_shows_what_its_answers_bring_about(tmp_path):
    counts = asyncio.run(write(Config(folder=str(tmp_path / "gold"), tasks=[COUNT, FUNCTIONS], per_task=2)))
    assert counts == {COUNT: 2, FUNCTIONS: 2}
    assert json.loads((tmp_path / "gold" / "traces.json").read_text()) == counts
    found = records(tmp_path / "gold")
    one = next(record for record in found if record.source == COUNT)
    assert [message.role for message in one.messages] == ["user", "assistant"]
    assert len(one.images) == 1
    many = next(record for record in found if record.source == FUNCTIONS)
    assert [message.role for message in many.messages] == ["user", "assistant", "observation", "assistant"]
    assert isinstance(many.messages[1].parts[0], ToolCall)  # a policy's own format, not JSON between words


def test_a_folder_holds_what_is_asked_for_or_is_refused(tmp_path):
    """It was taken for done, whatever had been asked for."""
    config = Config(folder=str(tmp_path / "gold"), tasks=[COUNT], per_task=1)
    assert not written(config)
    asyncio.run(write(config))
    assert written(replace(config, pages=2))
    with pytest.raises(ConfigError, match="holds other traces than are asked for"):
        written(replace(config, per_task=2))


def test_of_rollouts_right_answers_are_kept_and_played_again(tmp_path):
    """Two groups: one answered rightly twice and wrongly once, one never; a reward that was claimed is not believed."""
    vocab = tiny_vocab()
    model = presets.debug(vocab_size=vocab.size, image_id=vocab.image_id)
    agent = new_agent(model, vocab, GEOMETRY, ChatConfig())
    save_agent(tmp_path / "agent", agent.model, vocab, GEOMETRY, ChatConfig())

    async def items():
        async with open_tasks([COUNT]) as (task,):
            return [(item, next(task.gold(item))) for item in islice(task.items("train", 3), 4)]

    rows = []
    for number, (item, right) in enumerate(asyncio.run(items())[1:3]):
        for n, said in enumerate((right, right, "none at all")):
            row = Trajectory(f"{COUNT}/{item.key}#{n}", COUNT, f"{COUNT}/{item.key}")
            row.extend(vocab.encode("how many?"), trainable=False)
            ids = [*vocab.encode(said if number == 0 else "none at all"), vocab.stop_ids[0]]
            row.extend(ids, trainable=True, logprobs=[-1.0] * len(ids))
            row.status, row.reward = Status.FINISHED, 1.0 if n < 2 else 0.0
            rows.append(row)
    save_trajectories(tmp_path / "recorded" / "000000" / "rank-00000", rows)
    config = Config(folder=str(tmp_path / "own"), tasks=[COUNT], seed=3, rollouts=str(tmp_path / "recorded"))
    config = replace(config, answers="own", agent=str(tmp_path / "agent"))
    assert asyncio.run(write(config)) == {COUNT: 1, f"{COUNT}, not right": 1}
    (kept,) = records(tmp_path / "own")
    assert kept.messages[-1].parts[0].text == asyncio.run(items())[1][1]
    assert asyncio.run(write(replace(config, answers="gold", folder=str(tmp_path / "gold")))) == {COUNT: 2}
    with pytest.raises(ConfigError, match="no item of seed 4"):
        asyncio.run(write(replace(config, seed=4, folder=str(tmp_path / "none"))))
    assert not (tmp_path / "none").exists()


def test_what_was_written_is_said_and_not_written_again(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "gold"
    monkeypatch.setattr("sys.argv", ["task_traces", f"folder={folder}", f"tasks=[{COUNT}]", "per_task=1"])
    main()
    assert capsys.readouterr().out == f"{COUNT}: 1\n"
    main()
    assert capsys.readouterr().out.startswith(f"{folder}/traces.json is there already; ")
    (folder / "traces.json").write_text(json.dumps({f"{COUNT}, not right": 2}))
    main()
    assert f"no answer was right: {folder} holds no conversation\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"answers": "own"}, "of rollouts that are named"),
        ({"answers": "mine"}, "mine"),
        ({"per_task": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_named(settings, told):
    with pytest.raises(ConfigError, match=told):
        Config(**settings)
