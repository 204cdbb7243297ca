"""A model spread over devices, host and disk says what it says in one place."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from mmagent.generation.dispatch import computes_on, spread
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.generation.local import LocalPolicy
from mmagent.generation.updates import WeightUpdate, buckets_of_state
from mmagent.models.agent_model import AgentModel
from mmagent.models.presets import on_meta
from mmagent.ops.state import save_weights
from mmagent.trajectories import Completion, Limits, Trajectory
from tests.agent_kit import picture, prompt, tiny_model, tiny_vocab


def model_bytes(model: AgentModel) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def said(model: AgentModel, **config) -> list[Completion]:
    """Prompts with pictures, in turns, so that caches are read as well."""
    generator = Generator(model, tiny_vocab(), GeneratorConfig(prefill_tokens=48, record_routing=True, **config))
    shared = picture(1)
    rows: list[Trajectory] = [
        prompt("click the red button", (shared,)),
        prompt("", (picture(2, 56, 56), shared)),
        prompt("words alone " * 4),
    ]
    out = []
    for turn in range(2):
        done = generator.generate([(row, Limits(7, 0.0 if n else 1.0, seed=turn)) for n, row in enumerate(rows)])
        out += done
        for row, completion in zip(rows, done, strict=True):
            row.extend(completion.ids, trainable=True, logprobs=completion.logprobs)
            row.extend(tiny_vocab().encode(" into"), trainable=False)
    return out


def assert_equal(ours: list[Completion], theirs: list[Completion]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.ids, one.logprobs, one.reason) == (other.ids, other.logprobs, other.reason)
        assert all(map(torch.equal, one.routed_experts, other.routed_experts))


def tied_model() -> AgentModel:
    config = tiny_model().config
    config.decoder.tied_head = True
    torch.manual_seed(1)
    model = AgentModel(config)
    with torch.no_grad():
        model.head_weight.mul_(20.0)
    return model


@pytest.mark.parametrize("share", [0.9, 0.6, 0.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("speculate", [0, 3])
def test_a_model_half_on_disk_says_the_same_bit_for_bit(tmp_path, share, tied, speculate):
    model = tied_model() if tied else tiny_model()
    plain = said(copy.deepcopy(model), speculate=speculate)
    placed = spread(model, {"cpu": int(share * model_bytes(model))}, tmp_path / "away")
    places = set(placed.hf_device_map.values())
    assert places == ({"cpu", "disk"} if share == 0.9 else {"disk"} if share == 0 else places)
    assert "disk" in places
    assert any(p.is_meta for p in placed.parameters())
    assert_equal(said(placed, speculate=speculate), plain)
    assert all(p.is_meta for p in placed.parameters()) or share
    assert computes_on(placed.embedding) == torch.device("cpu")


def test_a_steady_generator_is_steady_from_disk_as_well(tmp_path):
    model = tiny_model()
    plain = said(copy.deepcopy(model), steady=True)
    assert_equal(said(spread(model, {"cpu": model_bytes(model) // 2}, tmp_path / "away"), steady=True), plain)


def test_a_model_that_was_never_whole_is_read_where_it_goes(tmp_path):
    model = tiny_model()
    save_weights(model, tmp_path / "model.safetensors")
    placed = on_meta(model.config)
    with pytest.raises(ValueError, match=r"has no values: name the weights"):
        spread(placed)
    limits = {"cpu": int(0.8 * model_bytes(model))}
    with pytest.raises(ValueError, match=r"is torch.float32, in the model torch.bfloat16"):
        spread(on_meta(model.config).to(torch.bfloat16), limits, weights=tmp_path / "model.safetensors")
    spread(placed, limits, weights=tmp_path / "model.safetensors")
    assert {"disk"} <= set(placed.hf_device_map.values())
    for one, other in zip(said(placed), said(model), strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)  # files align weights otherwise than torch does


def test_a_folder_with_another_models_weights_is_not_taken_for_ours(tmp_path):
    first, second = tiny_model(0), tiny_model(1)
    spread(first, {"cpu": 0}, tmp_path / "away")
    with pytest.raises(ValueError, match="holds something"):
        spread(second, {"cpu": 0}, tmp_path / "away")
    with pytest.raises(ValueError, match="name an offload_folder"):
        spread(second, {"cpu": 0})


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"install accelerate: pip install 'mmagent\[serving\]'"):
        spread(tiny_model())


def test_a_spread_model_is_known_by_its_weights(tmp_path):
    """What rollouts were played under is told by content, wherever that lies."""
    here, there, other = (LocalPolicy(Generator(tiny_model(n), tiny_vocab())) for n in (0, 0, 1))
    spread(there.generator.model, {"cpu": 0}, tmp_path / "away")
    assert here.identity() == there.identity() != other.identity()


def test_weights_that_are_away_are_not_written_to(tmp_path):
    generator = Generator(spread(tiny_model(), {"cpu": 0}, tmp_path / "away"), tiny_vocab())
    with pytest.raises(ValueError, match=r"is offloaded, where nothing is written in place"):
        WeightUpdate(generator, buckets_of_state(tiny_model(1).state_dict(), 1).manifest)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_model_half_beside_the_accelerator_says_the_same(tmp_path, share):
    model = tiny_model()
    whole = said(copy.deepcopy(model).to("cuda"))
    size = model_bytes(model)
    placed = spread(model, {0: int(share * size), "cpu": size // 3}, tmp_path / "away")
    assert len(set(placed.hf_device_map.values())) > 1
    assert computes_on(placed.embedding).type == "cuda"
    for one, other in zip(said(placed), whole, strict=True):
        assert one.ids == other.ids
        # keys and values are bfloat16 in the kernel that reads block tables: its order of sums may differ by a call
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
