"""The quickstart's plan: what a browser changes in it, and what its hand-over checks open."""

from __future__ import annotations

from itertools import product

import pytest

from data_pipelines import build
from mmagent.config import resolve
from mmagent.vocab import SPECIAL_TOKENS, Vocab
from recipes import pretrain, quickstart_plan
from recipes.lineage import run_lineage
from recipes.quickstart_mix import BLIND, REST, SAMPLES

UNUSED = {*REST["pretrain"], *REST["sft"]}
FEW = {stage: {name: 0 if name in UNUSED else 4 for name in mix} for stage, mix in SAMPLES["debug"].items()}


def test_a_browser_changes_what_the_data_stage_is_told(tmp_path):
    blind, seeing = (quickstart_plan.plan(tmp_path, "debug", 1, browser)[0] for browser in (False, True))
    assert {"browser=none", "validation.screens=16", "validation.episodes=0"} <= set(blind.arguments)
    assert "browser=required" in seeing.arguments


def test_the_data_is_usable_once_every_source_has_shards(tmp_path):
    blind, seeing = (quickstart_plan.plan(tmp_path, "debug", 1, browser)[0] for browser in (False, True))
    data = tmp_path / "data"
    for stage, source in product(("pretrain", "validation"), BLIND):
        (data / stage / source).mkdir(parents=True)
        (data / stage / source / "0.tar").touch()
    with pytest.raises(ValueError, match="no tokenizer"):
        blind.check(data)
    Vocab.train(["click(1, 2)"], 256 + len(SPECIAL_TOKENS)).save(data)
    blind.check(data)
    with pytest.raises(
        ValueError, match=r"no shards of pretrain/screens, pretrain/tiles, .*sft/episodes, .*validation/pages$"
    ):
        seeing.check(data)
    (data / "pretrain" / "captions" / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"no shards of pretrain/captions$"):
        blind.check(data)


def test_pretraining_is_validated_on_what_the_data_stage_holds_out(tmp_path):
    data, *stages = quickstart_plan.plan(tmp_path, "laptop", 2, True)
    (told,) = [stage.arguments for stage in stages if stage.name == "pretrain"]
    config = resolve(pretrain.laptop(), [argument for argument in told if "=" in argument])
    assert config.validation.folder == f"{tmp_path}/data/validation"
    assert 2 <= sum(phase.steps for phase in config.phases) // config.validate_every <= 4
    held_out = resolve(build.laptop(), [argument for argument in data.arguments if "=" in argument]).validation
    assert {name for name, count in held_out.items() if count} == set(config.data.sources)


@pytest.mark.browser
@pytest.mark.slow
def test_with_a_browser_the_data_of_a_call_without_is_made_afresh(tmp_path, monkeypatch):
    monkeypatch.setitem(SAMPLES, "debug", FEW)
    for browser in (False, True):
        said: list[str] = []
        run_lineage([quickstart_plan.plan(tmp_path, "debug", 1, browser)[0]], tmp_path, said.append)
        assert "done before" not in said[-1]
        found = {path.parent.relative_to(tmp_path / "data").as_posix() for path in tmp_path.glob("data/*/*/*.tar")}
        wanted = {f"{stage}/{name}" for stage, mix in FEW.items() for name in mix if browser or name in BLIND}
        assert found == wanted - {f"{stage}/{name}" for stage in FEW for name in UNUSED}
