"""The ablation of MTP: its runs differ in the mode alone, and its report says what the logs say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipelines.build import BuildConfig, build
from mmagent.config import resolve, to_yaml
from mmagent.models.mtp import MODES, MTPConfig
from mmagent.train.hooks import read_jsonl
from recipes import ablate_merging, ablate_mtp, mtp_report, pretrain
from recipes.ablate_mtp import DEPTHS, SIZES, plan


def configs(root: Path) -> dict[str, pretrain.Config]:
    out = {}
    for stage in plan(root, Path("quickstart"), 2, 40, 2, tuple(SIZES)):
        module, _, preset, *told = stage.arguments
        assert module == "recipes.pretrain"
        out[stage.name] = resolve(getattr(pretrain, preset)(), told)
    return out


@pytest.mark.parametrize("recipe", [ablate_mtp, ablate_merging])
def test_a_plan_needs_no_quickstart_and_a_run_says_what_it_lacks_before_anything_else(
    tmp_path, monkeypatch, capsys, recipe
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ablate", "--quickstart", "nowhere", "--plan"])
    assert recipe.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4
    assert all(" -m recipes.pretrain " in line and " encoder=nowhere/align/encoder " in line for line in lines)
    monkeypatch.setattr("sys.argv", ["ablate", "--quickstart", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    told = "nowhere/align/encoder, nowhere/data/pretrain, nowhere/data/validation missing: run `python -m recipes.quick"
    assert (stop.value.code, told in capsys.readouterr().err, list(tmp_path.iterdir())) == (2, True, [])


def test_runs_of_a_seed_and_size_differ_in_the_mode_alone():
    found = configs(Path("out"))
    assert len(found) == 2 * len(SIZES) * len(MODES)
    for size in SIZES:
        for seed in (0, 1):
            alike = set()
            for mode in MODES:
                config = found[f"{size}-{mode}-{seed}"]
                assert (config.model.mtp.mode, config.model.mtp.depths, config.model.mtp.tied) == (mode, DEPTHS, True)
                assert config.seed == config.data.seed == seed  # the same documents in the same order
                assert sum(phase.steps for phase in config.phases) == 40
                model = replace(config.model, mtp=MTPConfig())
                alike.add(str(asdict(replace(config, output="", model=model))))
            assert len(alike) == 1
    assert found["wide-shared-0"].model.decoder.width > found["laptop-shared-0"].model.decoder.width


def write_run(folder: Path, config: pretrain.Config, main: float, mtp: float) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    rows, times = [], []
    for step in range(1, 21):
        row = {"step": step, "loss/lm": main + 1 / step, "visual_share": 0.5, "tokens": 1024.0}
        row |= {f"loss/mtp_{k}": mtp + 1 / step + 0.1 * (step % 2) for k in (1, 2, 3)}
        rows.append(row)
        times.append({"step": step, "time/step": 2.0 if step > 1 else 50.0})
    found = {"loss/lm": main, "stage_bytes": 77.0}
    for k in (1, 2, 3):
        found |= {f"loss/mtp_{k}": mtp + k, f"mtp_{k}/accept": 0.9 / k}
        for where, share in (("after_image", 0.8), ("text_only", 0.3)):
            found |= {f"mtp_{k}/accept_{where}": share / k, f"mtp_{k}/loss_{where}": mtp + share}
    (folder / "judged.json").write_text(json.dumps(found))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.time.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))


def test_the_report_compares_modes_within_a_seed(tmp_path):
    """Seeds move all modes together; fused lies 0.2 above shared in every seed, so that difference is sure."""
    found = configs(tmp_path)
    for seed, level in enumerate((1.0, 2.0)):
        for mode, above in {"shared": 0.0, "fused": 0.2, "masked": 0.1}.items():
            config = found[f"laptop-{mode}-{seed}"]
            write_run(tmp_path / "laptop" / f"{mode}-{seed}", config, level, level + above)
    table = mtp_report.write(tmp_path, ("laptop",), 2)
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    columns = [name.strip() for name in rows[""].strip("|").split("|")]
    cells = [cell.strip() for cell in rows["MTP loss"].strip("|").split("|")]
    assert cells[columns.index("fused - shared")] == "+0.200 [+0.200, +0.200]"
    assert cells[columns.index("shared")].startswith("3.500 ")  # (1 + 2) / 2 + (1 + 2 + 3) / 3
    # the saw of 0.1 is the MTP loss's own: nine changes of +-0.1 in turn, whose mean is not quite 0
    assert " 0.099 [" in rows["unsteadiness"]
    assert " 2.000 [" in rows["seconds a step"]  # the first step, which warms up, does not count
    assert " 77.000 [" in rows["bytes a token into the last stage"]
    assert json.loads((tmp_path / "ablation.json").read_text())["runs"]["laptop"]["fused"]["main loss"] == [1.0, 2.0]
    for name in ("ablation.svg", "curves.svg"):
        assert (tmp_path / name).read_text().startswith("<svg")


def test_an_agent_is_judged_as_its_run_validated_it(tmp_path):
    """The run's own last validation, from the agent that it left; both in float32, so alike to rounding."""
    data = tmp_path / "data"
    counts = {"captions": 30, "text": 20}
    build(BuildConfig(folder=str(data), pretrain=counts, validation=counts, browser="none", vocab_size=600))
    told = (
        *(f"data.folder={data}/pretrain", f"tokenizer={data}/tokenizer.json", f"validation.folder={data}/validation"),
        *("validate_every=2", "validation.steps=1", "phases.0.steps=1", "phases.1.steps=1", f"output={tmp_path}/run"),
        *("model.mtp.mode=fused", "data.prefetch=0"),
    )
    pretrain.train(resolve(pretrain.debug(), told), "test")
    last = read_jsonl(tmp_path / "run" / "log.jsonl")[-1]
    found = mtp_report.judged(tmp_path / "run")
    for name in ("loss/lm", "loss/mtp_1", "mtp_1/accept"):
        assert found[name] == pytest.approx(last[f"validation/{name}"], rel=1e-5)
    width, share = 32, found["visual_share"]  # no document of these begins with its image
    assert found["stage_bytes"] == pytest.approx(share * width * 2, rel=1e-6)
    assert mtp_report.judged(tmp_path / "run") == found  # and it is kept
