"""The ablation of RL: its stages are commands that resolve, arms differ where they should, and a report by hand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmagent.chat import ChatConfig
from mmagent.config import parse_cli
from mmagent.interop.agent_folder import new_agent, save_agent
from mmagent.models import presets
from recipes import ablate_rl, ablate_rl_report, ablate_rl_tasks, judge_tasks, language_stage, rl, sft, task_traces
from recipes.ablate_rl import PARTS, Plan, plan
from recipes.ablate_rl_report import interference
from recipes.ablate_rl_tasks import JOINT, MINIWOB, NARROW, SIZES
from tests.agent_kit import GEOMETRY, tiny_vocab

PRESETS = {
    "recipes.rl": {"laptop": rl.laptop, "debug": rl.debug},
    "recipes.sft": {"laptop": sft.laptop, "debug": sft.debug},
    "recipes.task_traces": {"laptop": task_traces.Config},
    "recipes.judge_tasks": {"laptop": judge_tasks.Config},
}


def configs(part: str, size: str = "laptop") -> dict:
    stages = plan(part, Plan(Path("out"), Path("agent"), SIZES[size], 1), 2)
    assert len({stage.name for stage in stages}) == len(stages)
    return {s.name: parse_cli(PRESETS[s.arguments[0]], "", s.arguments[1:]) for s in stages}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_stage_is_a_command_that_its_recipe_takes(part, size):
    found = configs(part, size)
    for name, config in found.items():
        if name.startswith("judge-") and not name.endswith("-before"):
            assert config.init == f"out/{name.removeprefix('judge-')}/agent"
            assert any(getattr(other, "output", "") == str(Path(config.init).parent) for other in found.values())


def test_enough_is_asked():
    assert len(JOINT) >= 30
    assert len(MINIWOB) >= 20
    assert set(NARROW) <= set(JOINT)


def test_arms_of_a_seed_differ_in_what_is_compared_alone():
    found = configs("joint")
    one, other = found["joint-rl-0"], found["joint-rl-1"]
    assert replace(one, seed=1, output=other.output) == other
    tuned = found["joint-sft-0"]
    assert (tuned.optim.lr, tuned.optim.weight_decay, tuned.init) == (one.optim.lr, one.optim.weight_decay, one.init)
    assert set(tuned.phases[0].freeze) == set(one.freeze)
    assert found["traces-all-0"].seed == one.seed  # the same stream of items
    assert found["traces-base"].seed not in (one.seed, other.seed)
    rvpo, absolute = (configs("visual")[f"visual-{arm}-0"] for arm in ("rvpo", "absolute"))
    assert replace(rvpo.collector, rewards=absolute.collector.rewards) == absolute.collector


def test_fine_tuning_reads_its_own_answers_and_no_other():
    """A recipe mixes all sources of its folder, of other seeds and of other parts as well, if they lie there."""
    for part, mixes in {
        "joint": {"base": ["base"], "joint-sft-1": ["all-1"]},
        "narrow": {"base": ["base"], "only-sft-counting-1": ["counting-1"]},
        "experts": {"base": ["base"], "experts-1": ["own-counting-1", "own-spatial-relation-1"]},
    }.items():
        found = {name: config for each in (part, "joint") for name, config in configs(each).items()}
        folders = [Path(config.folder) for name, config in found.items() if name.startswith("traces-")]
        for name, mix in mixes.items():
            root = Path(found[name].data.folder)
            assert sorted(folder.name for folder in folders if root == folder.parent) == mix
            assert not found[name].data.sources


def test_interference_by_hand():
    before = {"a": [1.0, 0.0], "b": [0.5, 0.5], "c": [1.0, 1.0], "d": [0.0, 0.0]}
    after = {"a": [0.5, 0.0], "b": [0.5, 0.5], "c": [1.0, 0.0], "d": [1.0, 1.0]}
    found = interference(before, after)
    assert found == {"change": (-0.25 - 0.5 + 1) / 4, "categories that fall": 2 / 3, "what falls": 0.75 / 4}
    assert interference(before, after, ["d"])["change"] == -0.25


def test_a_report_says_what_is_missing_and_compares_seed_by_seed(tmp_path):
    def judge(who: str, value: float) -> None:
        folder = tmp_path / "judged" / who
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps({task: [value, value] for task in JOINT.values()}))

    judge("base", 0.5)
    for seed, level in enumerate((0.0, 0.1)):
        judge(f"joint-rl-{seed}", 0.6 + level)
        if seed == 0:
            with pytest.raises(ValueError, match="joint-rl-1"):
                ablate_rl_report.write("joint", tmp_path, 2)
        judge(f"joint-sft-{seed}", 0.4 + level)
    told = ablate_rl_report.write("joint", tmp_path, 2)
    rows = {line.split(" | ")[0].strip("| "): line for line in told.splitlines()}
    assert "+0.200 [+0.200, +0.200]" in told  # RL lies so much above fine-tuning in every seed
    assert rows["math"].split(" | ")[1:] == ["0.500", "+0.150", "-0.050 |"]
    assert (tmp_path / "joint.svg").read_text().startswith("<svg")
    assert json.loads((tmp_path / "joint.json").read_text())["figures"]["joint SFT"]["categories that fall"] == [
        1.0,
        0.0,
    ]


@pytest.mark.slow
def test_it_runs_as_a_whole_and_goes_on(tmp_path, monkeypatch, capsys):
    """Parts without a browser, on two categories, every stage in this process."""
    vocab = tiny_vocab()
    config = presets.debug(vocab_size=vocab.size, image_id=vocab.image_id)
    save_agent(
        tmp_path / "q/sft/agent", new_agent(config, vocab, GEOMETRY, ChatConfig()).model, vocab, GEOMETRY, ChatConfig()
    )
    for module in (ablate_rl, ablate_rl_report):
        monkeypatch.setattr(module, "JOINT", {name: JOINT[name] for name in NARROW})
    ran = []

    def run_here(stages, root):
        for stage in stages:
            try:
                stage.check(stage.output)
            except (ValueError, OSError):
                ran.append(stage.name)
                module, *told = stage.arguments
                run_stage(module, parse_cli(PRESETS[module], "", told))
                if not stage.name.startswith("traces-own"):
                    stage.check(stage.output)

    monkeypatch.setattr(ablate_rl, "run_or_exit", run_here)
    command = ["ablate", "--quickstart", f"{tmp_path}/q", "--output", f"{tmp_path}/out", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--size", "debug", "--parts", "joint", "narrow"])
    assert ablate_rl.main() == 0
    assert "RL on counting alone" in capsys.readouterr().out
    assert "only-sft-spatial-relation-1" in ran
    done = len(ran)
    assert ablate_rl.main() == 0
    assert len(ran) == done  # nothing is done twice


def run_stage(module: str, config) -> None:
    if module == "recipes.rl":
        asyncio.run(rl.train(config))
    elif module == "recipes.sft":
        language_stage.train(config, "sft")
    elif module == "recipes.task_traces":
        asyncio.run(task_traces.write(config))
    else:
        judge_tasks.judge(config)


def test_sizes_are_named_as_the_command_names_them():
    assert set(ablate_rl_tasks.SIZES) == {"laptop", "evening", "debug"}


def test_fewer_steps_of_rl_are_fewer_of_fine_tuning():
    size = ablate_rl_tasks.SIZES["evening"]
    assert (size.of(10).steps, size.of(10).fitted, size.of(10).asked) == (10, 10 * size.fitted // size.steps, 200)
    assert size.of(0) is size
