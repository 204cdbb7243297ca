"""Every training recipe: its losses are the recorded ones, two ranks equal one, and a kill leaves no trace."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.documents import read_quarantine
from data_pipelines.held_out import HeldOut, ValidationConfig
from data_pipelines.stream import PackStream
from evals.local import LocalAgent
from mmagent.config import ConfigError, resolve
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.generation.block_decoding import BlockGenerator, WholeGenerator
from mmagent.geometry import WHITE_MEAN, GeometryConfig
from mmagent.interop.agent_folder import load_agent
from mmagent.interop.encoder_folder import load_encoder, save_encoder
from mmagent.objectives.block_policy import policy_objective
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.objectives.policy_gradient import PolicyGradientConfig
from mmagent.train.hooks import evaluate, read_jsonl
from mmagent.trajectories import Limits, Trajectory
from recipes import align_encoder, diffusion, own_ways, pretrain
from tests.data_pipelines.image_samples import encoded, pixels, write
from tests.engine_kit import ALONE
from tests.recipes.recipe_kit import BROKEN, RECIPES, STEPS, arguments, run_here, start, train_all

GOLDEN = Path(__file__).with_name("golden_losses.json")
"""``{recipe: loss after every step}``; ``MMAGENT_RECORD_GOLDEN=1 pytest tests/recipes/test_recipes.py`` writes it anew,
which is right only where a change of the losses is what was wanted."""
SLOW = {"teacher-siglip2", "teacher-dinov3", "sft", "diffusion"}  # the same code as others
SOME = [pytest.param(recipe, marks=pytest.mark.slow) if recipe in SLOW else recipe for recipe in RECIPES]


@pytest.fixture(scope="module")
def lineage(tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("lineage")
    return root, train_all(root)


@pytest.fixture(scope="module")
def golden(lineage) -> dict[str, list[float]]:
    if os.environ.get("MMAGENT_RECORD_GOLDEN") == "1":
        losses = {recipe: [round(row["loss"], 5) for row in rows] for recipe, rows in lineage[1].items()}
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_the_recorded_ones(lineage, golden, recipe):
    """Half a percent: other processors and torch releases sum in another order and Muon turns small gradients into
    whole steps, while a mistake in data, masks, rates or schedules moves these losses by more."""
    losses = [row["loss"] for row in lineage[1][recipe]]
    assert losses == pytest.approx(golden[recipe], rel=5e-3)


def test_alignment_learns_what_stands_where(lineage):
    """So that its recorded losses hold all its terms: every step shows some boxes."""
    for row in lineage[1]["align"]:
        assert row["loss/classes"] > 0
        assert row["loss/places"] > 0


@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_acceptance_is_logged_by_depth_and_by_context(lineage, recipe):
    """Of drafts behind an image of their document, and where there was only text."""
    root, rows = lineage
    depths = load_agent(root / recipe / "agent").model.config.mtp.depths
    contexts = ("accept", "accept_after_image", "accept_text_only")
    for name in (f"mtp_{depth}/{context}" for depth in range(1, depths + 1) for context in contexts):
        shares = [row[name] for row in rows[recipe] if name in row]
        assert shares, name
        assert all(0 <= share <= 1 for share in shares)
    assert depths >= 1


def test_a_run_keeps_its_bad_samples_in_its_own_folder(lineage):
    root, rows = lineage
    (line,) = read_quarantine(root / "align" / "quarantine" / "quarantine-0.jsonl")
    assert (line["source"], line["key"], line["reason"]) == ("boxes", BROKEN, "images")
    assert sum(row["data/quarantined"] for row in rows["align"]) == 1
    for name in ("align", "pretrain", "sft"):
        assert (root / name / "quarantine").is_dir()
        assert f"{root}/{name}/quarantine" in (root / name / "config.yaml").read_text()
        assert {row["data/torn_shards"] for row in rows[name]} == {0}


def test_every_recipe_leaves_what_the_next_one_opens(lineage):
    root = lineage[0]
    for name in ("distill", "align"):
        assert load_encoder(root / name / "encoder").model.width == 32
    for name in ("pretrain", "sft", "diffusion"):
        agent = load_agent(root / name / "agent")
        assert agent.vocab.image_id == agent.model.config.image_id
        assert agent.model.config.denoises == (4 if name == "diffusion" else 0)
    assert all([row["step"] for row in rows] == list(range(1, len(rows) + 1)) for rows in lineage[1].values())


def test_diffusion_learns_masks_and_then_edits_and_is_decoded_by_blocks(lineage):
    """The last half of the debug run has edited copies; the encoder and the MTP head are those it began with."""
    root, rows = lineage
    assert ["loss/edit" in row for row in rows["diffusion"]] == [False, False, True, True]
    before, after = (load_agent(root / name / "agent") for name in ("pretrain", "diffusion"))
    for role in ("encoder", "mtp"):
        same = zip(getattr(before.model, role).parameters(), getattr(after.model, role).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    player = LocalAgent.load(root / "diffusion" / "agent", device="cpu")
    assert isinstance(player.generator, BlockGenerator)
    asked = Trajectory("asked", "test")
    asked.extend(after.vocab.encode("what is drawn here"), trainable=False)
    (said,) = player.generator.generate([(asked, Limits(9, 0.0))])
    assert len(said.revealed) == len(said.ids)


def test_diffusion_at_once_is_learnt_kept_and_decoded(lineage, tmp_path):
    """The agent in the folder says so, its policy looks at all of it anew, and the next stage forgets it."""
    root = lineage[0]
    at_once = ("objective.noise.block=0", "objective.noise.span=16")
    run_here("diffusion", root, tmp_path / "whole", *at_once)
    agent = load_agent(tmp_path / "whole" / "agent")
    assert (agent.model.config.denoises, agent.model.config.bidirectional) == (16, True)
    player = LocalAgent.load(tmp_path / "whole" / "agent", device="cpu")
    assert isinstance(player.generator, WholeGenerator)
    asked = Trajectory("asked", "test")
    asked.extend(agent.vocab.encode("what is drawn here"), trainable=False)
    (said,) = player.generator.generate([(asked, Limits(9, 0.0))])
    assert len(said.revealed) == len(said.ids) == 9
    run_here("sft", root, tmp_path / "sft", f"init={tmp_path}/whole/agent", "phases.0.steps=1")
    assert not load_agent(tmp_path / "sft" / "agent").model.config.bidirectional
    with pytest.raises(ConfigError, match=r"noise\.span"):
        resolve(diffusion.debug(), ["objective.noise.block=0"])
    with pytest.raises(ValueError, match="teach it blocks"):
        policy_objective(agent.model, PolicyGradientConfig(), agent.vocab)
    with pytest.raises(ValueError, match="bidirectional is True"):
        run_here("own_ways", root, tmp_path / "ways", f"init={tmp_path}/whole/agent")


@pytest.mark.parametrize("learn", ["order", "speed"])
def test_an_agent_learns_from_its_own_ways_and_a_killed_run_goes_on(lineage, tmp_path, learn):
    """Killed between its two steps: the same questions, ways and weights as without."""
    root = lineage[0]
    for name, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        argv = ["own_ways", *arguments("own_ways", root, tmp_path / name)[1:], f"learn={learn}", f"steps={steps}"]
        with mock.patch.object(sys, "argv", argv):
            own_ways.main()
    rows, again = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    assert rows == again
    assert rows[0]["packs"] > 0  # where all ways of a step are as fast, there is nothing to learn from them
    assert "loss" in rows[0]
    whole, parts, before = (
        load_file(folder / "agent" / "model.safetensors")
        for folder in (tmp_path / "whole", tmp_path / "parts", root / "diffusion")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)
    assert load_agent(tmp_path / "whole" / "agent").model.config.denoises == 4


@pytest.mark.slow
def test_ranks_learn_from_the_ways_of_all(lineage, tmp_path):
    process = start("own_ways", lineage[0], tmp_path / "run", "learn=speed", ranks=2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-3000:]
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("recipe", "parallel"),
    [
        ("pretrain", "fsdp2"),
        pytest.param("pretrain", "ddp engine.expert_parallel=2", marks=pytest.mark.slow),
        pytest.param("pretrain", "fsdp2 engine.context_parallel=2", marks=pytest.mark.slow),
        *(pytest.param(recipe, "ddp", marks=pytest.mark.slow) for recipe in RECIPES),
        *(pytest.param(recipe, "fsdp2", marks=pytest.mark.slow) for recipe in ("distill", "align", "sft")),
    ],
)
def test_two_ranks_equal_one(lineage, tmp_path, recipe, parallel):
    """The same global batch: the first loss to rounding, the later ones to what rounding grows into."""
    root, rows = lineage
    process = start(recipe, root, tmp_path / "run", *f"engine.parallel={parallel}".split(), ranks=2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-3000:]
    two = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert two[0]["loss"] == pytest.approx(rows[recipe][0]["loss"], rel=1e-5)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in rows[recipe]], rel=2e-3)
    for part in ("agent", "encoder", "teacher"):
        if (root / recipe / part).is_dir():
            one, both = (load_file(base / part / "model.safetensors") for base in (root / recipe, tmp_path / "run"))
            assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in both.items()}


def kill_past_a_checkpoint(recipe: str, root: Path, output: Path, *overrides: str) -> None:
    process = start(recipe, root, output, *overrides)
    deadline = time.monotonic() + 120
    while len(read_jsonl(output / "log.jsonl")) < 3 and process.poll() is None:  # past the checkpoint of step 2
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed = process.poll() is None
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert killed, "it ended before it could be killed"


@pytest.mark.parametrize("recipe", SOME)
def test_a_killed_run_ends_as_if_nothing_had_been(lineage, tmp_path, recipe):
    root, rows = lineage
    output = tmp_path / "run"
    kill_past_a_checkpoint(recipe, root, output)
    again = run_here(recipe, root, output)
    assert again == rows[recipe]
    for part in ("agent", "encoder", "teacher"):
        if (root / recipe / part).is_dir():
            whole, resumed = (load_file(base / part / "model.safetensors") for base in (root / recipe, output))
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def held_out(root: Path, every: int) -> tuple[str, ...]:
    return (f"validate_every={every}", f"validation.folder={root}/data/validation", "validation.steps=2")


@pytest.fixture(scope="module")
def validated(lineage, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Pretraining with a validation every other step: at the end of a phase, and wherever it saves."""
    output = tmp_path_factory.mktemp("validated")
    return output, run_here("pretrain", lineage[0], output, *held_out(lineage[0], 2))


def trained_alone(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("validation/")} for row in rows]


def test_validation_leaves_training_as_it_was(lineage, validated):
    root, rows = lineage
    output, found = validated
    assert trained_alone(found) == rows["pretrain"]
    plain, watched = (load_file(base / "agent" / "model.safetensors") for base in (root / "pretrain", output))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    timing = read_jsonl(output / "log.time.jsonl")
    for row, seconds in zip(found, timing, strict=True):
        names = {"validation/loss", "validation/loss/lm", "validation/loss/mtp_1", "time/validation"}
        assert names <= {*row, *seconds} if row["step"] % 2 == 0 else not names & {*row, *seconds}


def test_the_held_out_loss_is_that_of_the_weights_that_were_saved(lineage, validated, tmp_path):
    """Computed anew from the agent's folder, on the packs that any call and any process gives."""
    root, (output, rows) = lineage[0], validated
    agent = load_agent(output / "agent")
    data = replace(pretrain.debug().data, folder=str(root / "data" / "pretrain"))
    with closing(PackStream(data, agent.vocab, agent.geometry, agent.chat)) as training:
        packs = HeldOut(ValidationConfig(str(root / "data" / "validation"), steps=2), training)
        objective = LanguageModeling(agent.model, LanguageModelingConfig())
        optimizer = build_optimizer(agent.model, OptimConfig())
        engine = build_engine(objective, optimizer, EngineConfig("none"), ALONE)
        losses = evaluate(objective, packs(), ALONE, engine)
    assert {"loss", "loss/lm", "loss/mtp_1", "loss_by_source/text"} <= set(losses)
    assert losses == pytest.approx({name: rows[-1][f"validation/{name}"] for name in losses}, rel=1e-6)
    assert losses["loss/lm"] != pytest.approx(rows[-1]["loss/lm"], rel=1e-6)


def test_the_last_step_is_validated(lineage, tmp_path):
    rows = run_here("sft", lineage[0], tmp_path / "run", "phases.0.steps=3", *held_out(lineage[0], 2))
    assert [row["step"] for row in rows if "validation/loss/lm" in row] == [2, 3]


@pytest.mark.slow
def test_two_ranks_validate_as_one(lineage, validated, tmp_path):
    """With sharded weights, which are saved after a validation and frozen anew after another."""
    root, rows = lineage[0], validated[1]
    told = ("engine.parallel=fsdp2", *held_out(root, 2))
    process = start("pretrain", root, tmp_path / "run", *told, ranks=2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-3000:]
    two = read_jsonl(tmp_path / "run" / "log.jsonl")
    for name in ("loss", "validation/loss", "validation/loss/lm", "validation/loss/mtp_1"):
        expected = [row[name] for row in rows if name in row]
        assert [row[name] for row in two if name in row] == pytest.approx(expected, rel=2e-3)


def test_a_killed_run_that_validates_ends_as_if_nothing_had_been(lineage, validated, tmp_path):
    root, rows = lineage[0], validated[1]
    kill_past_a_checkpoint("pretrain", root, tmp_path / "run", *held_out(root, 2))
    assert run_here("pretrain", root, tmp_path / "run", *held_out(root, 2)) == rows


def test_validation_without_held_out_data_stops_before_training(lineage, tmp_path):
    with pytest.raises(ValueError, match=r"validation\.folder: is empty, so there are no"):
        run_here("pretrain", lineage[0], tmp_path / "run", "validate_every=2")
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        (("validation.folder=held_out",), r"validation\.folder: would not be looked at; add validate_every=50"),
        (("validation.paths.text=held_out",), r"validation\.paths\.text: would not be looked at"),
        (("validate_every=-1", "validation.folder=held_out"), "validate_every: -1 is negative"),
        (("validate_every=2", "validation.paths.text="), r"validation\.paths\.text: is empty"),
    ],
)
def test_what_cannot_be_validated_is_refused_with_the_configuration(told, problem):
    with pytest.raises(ConfigError, match=problem):
        resolve(pretrain.debug(), told)


def test_a_model_sees_images_as_its_encoder_learned_to(lineage, tmp_path):
    """Whatever geometry pretraining is told, that of the encoder's folder counts: its weights belong to it."""
    root, strange = lineage[0], GeometryConfig(mean=WHITE_MEAN, std=(0.5, 0.4, 0.3), max_tokens=64)
    save_encoder(tmp_path / "encoder", load_encoder(root / "align" / "encoder").model, strange)
    run_here("pretrain", root, tmp_path / "run", f"encoder={tmp_path}/encoder", "phases=[]")
    assert load_agent(tmp_path / "run" / "agent").geometry == strange


def test_alignment_refuses_shards_that_it_would_not_look_at(tmp_path):
    """Weight 0 leaves them out on purpose: they need not even be there."""
    with pytest.raises(ConfigError, match=r"sources\.screens has no weight .* add mix\.screens="):
        align_encoder.Config(sources={"screens": str(tmp_path)})
    assert align_encoder.Config(sources={"screens": str(tmp_path)}, mix={"scenes": 1.0, "screens": 0.0}).sources


def test_alignment_on_plain_images_needs_texts_and_no_kinds(lineage, tmp_path):
    """A user's masks are no widgets: they stop nothing, and teach nothing."""
    for n in range(8):
        write(tmp_path / "mine" / f"{n}.png", encoded(pixels("red", n)))
        write(tmp_path / "mine" / f"{n}.mask.png", encoded(np.full((30, 44), 200, np.uint8)))
    mine = (f"sources.mine={tmp_path}/mine", "mix.mine=1", "mix.scenes=0", "mix.panels=0", "mix.captions=0")
    few = (*mine, "mix.boxes=0", "steps=1", "save_every=1")
    with pytest.raises(ConfigError, match=r"sources\.mine: .*mine: has no captions; put captions of IMAGE"):
        run_here("align", lineage[0], tmp_path / "refused", *few)
    for n in range(8):
        write(tmp_path / "mine" / f"{n}.txt", f"number {n % 2}")
    (row,) = run_here("align", lineage[0], tmp_path / "run", *few)
    assert row["data/quarantined"] == 0
    assert row["data/distinct_captions"] == 2 / 8
    assert "loss/classes" not in row  # nothing was known


def test_distillation_at_native_aspect(lineage, tmp_path):
    """Both teachers follow the student's grids, which are no squares."""
    for n, size in enumerate([(60, 150), (150, 60), (90, 90), (40, 200)] * 2):
        write(tmp_path / "mine" / f"{n}.png", encoded(pixels("red", n, size)))
    mine = (f"sources.mine={tmp_path}/mine", "mix.mine=1", "mix.scenes=1", "mix.panels=0", "mix.scientific=0")
    rows = run_here("distill", lineage[0], tmp_path / "run", *mine, "crop.shape=native")
    assert len(rows) == STEPS
    for row in rows:
        for name in ("siglip2", "dinov3"):
            assert np.isfinite(row[f"loss/{name}_patches"])
            assert np.isfinite(row[f"loss/{name}_summary"])
    load_encoder(tmp_path / "run" / "encoder")


def test_the_adapter_phase_leaves_the_encoder_alone(lineage, tmp_path):
    root = lineage[0]
    run_here("pretrain", root, tmp_path / "run", "phases.1.steps=0")
    before, after = load_encoder(root / "align" / "encoder").model, load_agent(tmp_path / "run" / "agent").model
    start, adapted = before.state_dict(), after.encoder.state_dict()
    assert all(torch.equal(start[name], adapted[name]) for name in start)
    trained = load_agent(root / "pretrain" / "agent").model.encoder.state_dict()
    assert not all(torch.equal(start[name], trained[name]) for name in start)


def test_a_custom_encoder_goes_from_stage_to_stage(lineage, tmp_path):
    """By its import path, which every agent's folder keeps."""
    root, few = lineage[0], ("save_every=1", "phases.0.steps=2")
    path = "encoder=tests.interop.test_agent_folder:NotCogViT"
    run_here("pretrain", root, tmp_path / "pretrain", path, *few, "phases.1.steps=0")
    rows = run_here("sft", root, tmp_path / "sft", f"init={tmp_path}/pretrain/agent", *few)
    assert [row["step"] for row in rows] == [1, 2]
    agent = load_agent(tmp_path / "sft" / "agent")
    assert f"encoder={agent.encoder}" == path
    assert type(agent.model.encoder).__name__ == "NotCogViT"


def test_a_custom_encoder_that_does_not_fit_stops_before_training(lineage, tmp_path):
    path = "encoder=tests.interop.test_agent_folder:NotCogViT"
    with pytest.raises(ValueError, match="merge_size is 2, the image geometry's 3"):
        run_here("pretrain", lineage[0], tmp_path / "run", path, "geometry.merge_size=3")
    assert not (tmp_path / "run" / "log.jsonl").exists()
