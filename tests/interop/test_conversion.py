"""Whole models between released folders and ours: bit for bit, piece by piece, and nothing is written for what is not
sound. The released folders come from the stock classes, never from the code under test."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmagent.chat import ChatConfig, Generation
from mmagent.geometry import GeometryConfig
from mmagent.interop import conversion
from mmagent.interop.agent_folder import Agent, load_agent, save_agent
from mmagent.interop.chat_template import chat_template
from mmagent.interop.conversion import check, convert, export_model, load_into
from mmagent.interop.encoder_folder import save_encoder
from mmagent.interop.glm import from_transformers
from mmagent.interop.model_source import open_source
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel, AgentModelConfig, logits
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.decoder import DecoderConfig
from mmagent.models.layers import initialise
from mmagent.models.moe import MoEConfig
from mmagent.models.mtp import MTPConfig
from mmagent.models.projector import ProjectorConfig
from mmagent.ops import tensor_files
from mmagent.vocab import Vocab
from tests.conversion_kit import (
    KINDS,
    PREFIX,
    read,
    released,
    same,
    split_files,
    stock_model,
    vocabulary,
    words,
    write_index,
)
from tests.glm_kit import randomise, their_inputs
from tools.convert import main

VISION = CogViTConfig(width=32, depth=2, heads=2, ffn=64, pooling="attention", mask_token=True)


def agent_of(kind: str, *, mtp: MTPConfig | None = None, **decoder) -> Agent:
    """A small agent that the stock class of ``kind`` can express, random everywhere."""
    options: dict = {"width": 48, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 64, "rope_base": 1e4}
    vision = VISION
    if kind == "glm_ocr":
        options |= {"sandwich_norm": True, "interleaved_rotary": True, "qkv_bias": False, "rotary_fraction": 1.0}
    else:
        options |= {"moe": MoEConfig(experts=4, top_k=2, ffn=24, scale=2.5)}
    if kind == "glm4v_moe":
        vision = CogViTConfig(
            width=32, depth=2, heads=2, ffn=48, bias=False, qk_norm=False, embedding_norm=True, position_table=4
        )
    vocab = vocabulary()
    config = AgentModelConfig(
        vocab_size=vocab.size + 3, image_id=vocab.image_id, vision=vision, projector=ProjectorConfig(ffn=144),
        decoder=DecoderConfig(**(options | decoder)), mtp=mtp or MTPConfig(depths=1),
    )  # fmt: skip
    model = AgentModel(config)
    randomise(model)
    geometry = GeometryConfig(min_tokens=4, max_tokens=64, max_aspect=50.0)
    return Agent(model, vocab, geometry, ChatConfig(Generation.GLM47, thinking=True))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A released glm4v_moe folder in two files."""
    folder = tmp_path_factory.mktemp("released") / "sound"
    released(folder, "glm4v_moe")
    split_files(folder, 2)
    return folder


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS)
def test_a_released_folder_goes_through_ours_bit_for_bit(tmp_path, kind):
    """Two MTP layers with their copies, bfloat16 with a float32 router bias; shards on both sides, of other borders."""
    released(tmp_path / "released", kind, mtp=2)
    before = json.loads((tmp_path / "released" / "config.json").read_text())
    before.get("text_config", before)["max_position_embeddings"] = 777_216  # no class's default
    (tmp_path / "released" / "config.json").write_text(json.dumps(before))
    split_files(tmp_path / "released", 3)
    notes = convert(tmp_path / "released", tmp_path / "ours", "native", shard_size=40_000)
    assert kind == "glm_ocr" or "experts one by one" in notes
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    ours = read(tmp_path / "ours")
    seen = {name: t.dtype for name, t in ours.items() if not name.startswith(("encoder.", "projector."))}
    assert all(dtype == (torch.float32 if n.endswith("router.bias") else torch.bfloat16) for n, dtype in seen.items())
    convert(tmp_path / "ours", tmp_path / "back", kind, shard_size=70_000)
    assert all(f.stat().st_size < 80_000 for f in (tmp_path / "back").glob("model-*.safetensors"))
    same(read(tmp_path / "released"), read(tmp_path / "back"))
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told.get("text_config", told)["max_position_embeddings"] == 777_216
    assert told["dtype"] == "bfloat16"
    assert told.get("text_config", told)["num_nextn_predict_layers"] == 2


def test_what_has_no_place_in_ours_is_said(tmp_path):
    """Fields of the config that nothing here reads, and how to sample."""
    released(tmp_path / "released", "glm4v_moe")
    for name, part, said in (
        ("config.json", "text_config", {"router_aux_loss_coef": 0.25}),
        ("config.json", "vision_config", {"initializer_range": 0.5}),
        ("generation_config.json", "", {"temperature": 0.7, "top_p": 0.6, "do_sample": True, "pad_token_id": None}),
    ):
        path = tmp_path / "released" / name
        told = json.loads(path.read_text()) if path.exists() else {}
        (told[part] if part else told).update(said)
        path.write_text(json.dumps(told))
    notes = convert(tmp_path / "released", tmp_path / "ours", "native")
    (config,) = [note for note in notes if note.startswith("config.json: not kept")]
    assert "text_config.router_aux_loss_coef 0.25 (not " in config
    assert "vision_config.initializer_range 0.5" in config
    assert "generation_config.json: not kept: do_sample True, temperature 0.7, top_p 0.6" in notes
    assert not [note for note in convert(tmp_path / "ours", tmp_path / "back", "glm4v_moe") if "not kept" in note]


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path):
    agent = agent_of("glm4v_moe")
    whole = (agent.model, agent.vocab, agent.geometry, agent.chat)
    save_agent(tmp_path / "agent", *whole)
    save_agent(tmp_path / "agent", *whole)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    with pytest.raises(ValueError, match=r"is no agent folder: it is not replaced \(it holds chapter\.txt\)"):
        save_agent(tmp_path / "thesis", *whole)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"


def test_a_model_of_somebody_is_replaced_only_by_a_conversion_that_is_told_to(tmp_path):
    """What was downloaded, and an agent beside which somebody keeps notes."""
    agent = agent_of("glm4v_moe")
    released(tmp_path / "theirs", "glm4v_moe")
    save_agent(tmp_path / "ours", *agent[:4], shard_size=40_000)
    save_agent(tmp_path / "ours", *agent[:4])
    (tmp_path / "ours" / "notes.md").write_text("years")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(ValueError, match=r"theirs holds a model that was not written here: it is not replaced"):
        export_model(tmp_path / "theirs", agent, "glm4v_moe")
    with pytest.raises(ValueError, match=r"theirs is no agent folder: it is not replaced \(it holds chat_template"):
        save_agent(tmp_path / "theirs", *agent[:4])
    with pytest.raises(ValueError, match=r"ours is no agent folder: it is not replaced \(it holds notes\.md\)"):
        save_agent(tmp_path / "ours", *agent[:4])
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    (tmp_path / "ours" / "notes.md").unlink()
    convert(tmp_path / "ours", tmp_path / "theirs", "glm4v_moe", overwrite=True)
    export_model(tmp_path / "theirs", agent, "glm4v_moe")


def test_a_hub_folder_without_its_code_is_not_sound(tmp_path):
    agent = agent_of("glm4v_moe")
    save_agent(tmp_path / "agent", agent.model, agent.vocab, agent.geometry, agent.chat)
    convert(tmp_path / "agent", tmp_path / "hub", "hub")
    assert not [note for note in check(tmp_path / "hub") if "code" in note]
    code = tmp_path / "hub" / "modeling_mmagent.py"
    code.write_text(code.read_text() + "\n# mine\n")
    assert "code of another version, or changed: modeling_mmagent.py" in check(tmp_path / "hub")
    (tmp_path / "hub" / "mine.py").write_text("print('hello')\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        told = json.loads((tmp_path / "hub" / name).read_text())
        told["auto_map"][key] = "somebody/else--mine.Class" if key == "AutoConfig" else ["mine.Class", None]
        (tmp_path / "hub" / name).write_text(json.dumps(told))
    assert check(tmp_path / "hub")[-2:] == [
        "code that this version does not write: mine.py",
        "classes from elsewhere: mine.Class (tokenizer_config.json), somebody/else--mine.Class (config.json)",
    ]
    code.unlink()
    with pytest.raises(ValueError, match=r"lacks its code: modeling_mmagent\.py"):
        check(tmp_path / "hub")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mtp", [MTPConfig(depths=3, mode="fused"), MTPConfig(depths=2, tied=False, mode="masked")])
def test_ours_goes_through_theirs_bit_for_bit(tmp_path, kind, mtp):
    """Configuration as well: what the stock class does not know is noted beside it."""
    agent = agent_of(kind, mtp=mtp)
    save_agent(tmp_path / "ours", agent.model, agent.vocab, agent.geometry, agent.chat)
    notes = convert(tmp_path / "ours", tmp_path / "theirs", kind)
    assert any("'fused'" in note or "'masked'" in note for note in notes)
    convert(tmp_path / "theirs", tmp_path / "back", "native")
    back, before = load_agent(tmp_path / "back"), agent.model.state_dict()
    lost = {n for n in before if n.startswith(("encoder.pool.", "encoder.mask_token"))}
    assert bool(lost) == (kind != "glm4v_moe")
    if kind == "glm4_moe":
        lost |= {n for n in before if n.startswith(("encoder.", "projector."))}
    after = {n: t for n, t in back.model.state_dict().items() if n in set(before) - lost}
    same({n: t for n, t in before.items() if n not in lost}, after)
    assert back.model.config.mtp == mtp
    assert back.chat == agent.chat
    assert kind == "glm4_moe" or back.geometry == agent.geometry
    assert any("left behind" in note for note in notes) == (kind != "glm4v_moe")
    model = agent.model.config
    assert any("merger" in note for note in notes) == (kind == "glm_ocr" and model.projector.ffn != model.decoder.ffn)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_classes_load_an_export(tmp_path, kind):
    """Nothing missing and nothing unexpected but the MTP layer, logits equal ours, and what they save comes back."""
    agent = agent_of(kind)
    export_model(tmp_path / "theirs", agent, kind, shard_size=50_000)
    import transformers

    name = json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    layer = f"{PREFIX[kind]}layers.3."
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not [key for key in info["unexpected_keys"] if not key.startswith(layer)]
    document, pack = words(kind)
    got = logits(agent.model, agent.model(pack).hidden)
    # fp32 on both sides; only the order of sums differs
    wanted = theirs.eval()(**their_inputs(kind, document)).logits[0]
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "saved")
    vocabulary().save(tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"missing: .*{layer}eh_proj\.weight; .*--without-mtp"):
        check(tmp_path / "saved")
    assert check(tmp_path / "saved", without_mtp=True)
    notes = convert(tmp_path / "saved", tmp_path / "back", "native", without_mtp=True)
    assert "config.json names 1 MTP layers, the files hold 0: that counts" in notes
    back = load_agent(tmp_path / "back").model.state_dict()
    trunk = {n: t for n, t in agent.model.state_dict().items() if n.startswith(("decoder.", "embedding.", "head."))}
    same(trunk, {n: back[n] for n in trunk})
    assert not [n for n in back if n.startswith("mtp.")]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_never_samples_what_the_policy_cannot(tmp_path, kind):
    """By the folder's own defaults, where the weights point at ids of images, of padding and of empty rows."""
    agent = agent_of(kind)
    vocab, rows = agent.vocab, agent.model.config.vocab_size
    with torch.no_grad():
        agent.model.head.weight.zero_()
        # the stream's last state decides alone: one of the two signs is the greater, whatever the state is
        barred = [vocab.image_id, vocab.pad_id, vocab.id("<|video|>"), rows - 1]
        for n, token in enumerate(barred):
            agent.model.head.weight[token] = 100.0 * (-1) ** n
    export_model(tmp_path / "theirs", agent, kind)
    import transformers

    name = json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "theirs").eval()
    prompt = torch.tensor([vocab.encode("click(1, 2) click")])
    free = int(theirs(input_ids=prompt).logits[0, -1].argmax())
    assert free in barred
    torch.manual_seed(0)
    for sample in (False, True):
        out = theirs.generate(prompt, do_sample=sample, max_new_tokens=4, min_new_tokens=4)[0, prompt.shape[1] :]
        assert not set(out.tolist()) & set(vocab.barred(rows)), sample


@pytest.mark.parametrize("kind", ["hub", *KINDS])
def test_a_vocabulary_that_others_would_number_otherwise_is_refused_before_anything_is_written(
    tmp_path, kind, monkeypatch
):
    parsed = json.loads(vocabulary().definition)
    parsed["added_tokens"].append(
        parsed["added_tokens"][-1] | {"id": vocabulary().size + 1, "content": "<|behind_a_hole|>"}
    )
    agent = agent_of("glm_ocr" if kind == "hub" else kind)._replace(vocab=Vocab(json.dumps(parsed)))
    monkeypatch.setattr(conversion, "write_files", lambda *args, **options: pytest.fail("weights are written"))
    with pytest.raises(ValueError, match=r"<\|behind_a_hole\|> is \d+ in the vocabulary, but tokenizers reads it as"):
        export_model(tmp_path / "theirs", agent, kind)
    assert not any(tmp_path.iterdir())


def test_the_mode_of_the_chat_is_told_from_the_template_wherever_it_stands(tmp_path):
    """In a file of its own or in the tokenizer's configuration; a guess is noted, the want of any template too."""
    folder = tmp_path / "released"
    released(folder, "glm_ocr")
    (folder / "chat_template.jinja").unlink()

    def opened(template) -> tuple[ChatConfig, str]:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
        with open_source(folder) as source:
            return source.config.chat, "".join(note for note in source.notes if note.startswith("chat"))

    exact = ChatConfig(Generation.GLM47, thinking=True, preserve_thinking=True)
    assert opened(chat_template(exact)) == (exact, "")
    foreign, guess = "{% if enable_thinking %}<think>{% endif %}", ChatConfig(Generation.GLM47, thinking=True)
    noted = (guess, "chat: glm47, thinking on, guessed by its template")
    assert opened(foreign) == noted
    named = [{"name": "tool_use", "template": "/nothink"}, {"name": "default", "template": foreign}]
    assert opened(named) == noted
    assert opened(None) == (ChatConfig(), "chat: glm45, thinking off, guessed: no template")


@pytest.mark.parametrize("kind", ["glm4_moe", "glm4v_moe"])
def test_packed_experts_come_in_as_well(tmp_path, kind):
    """As a stock class holds them in memory, and as some tools save them."""
    model = stock_model(kind)
    model.save_pretrained(tmp_path / "each")
    shutil.copytree(tmp_path / "each", tmp_path / "packed")
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "packed" / "model.safetensors")
    states = []
    for name, note in (("each", "experts one by one"), ("packed", "experts packed in two tensors a layer")):
        vocabulary().save(tmp_path / name)
        assert note in convert(
            tmp_path / name, tmp_path / f"{name}-ours", "native", without_mtp=kind == "glm4_moe"
        )  # the class declares a layer that it has not
        states.append(read(tmp_path / f"{name}-ours"))
    same(*states)
    direct = from_transformers(model).state_dict()
    if kind == "glm4_moe":  # the encoder beside a text model starts fresh
        direct = {n: t for n, t in direct.items() if not n.startswith(("encoder.", "projector."))}
    same(direct, {n: states[0][n] for n in direct})


def test_a_tied_head_is_stored_once_and_may_be_repeated(tmp_path):
    released(tmp_path / "released", "glm_ocr", tied=True)
    assert "lm_head.weight" not in read(tmp_path / "released")
    convert(tmp_path / "released", tmp_path / "ours", "native")
    assert load_agent(tmp_path / "ours").model.head is None
    convert(tmp_path / "ours", tmp_path / "back", "glm_ocr")
    same(read(tmp_path / "released"), read(tmp_path / "back"))
    tensors = read(tmp_path / "released")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "released" / "model.safetensors")
    convert(tmp_path / "released", tmp_path / "again", "native")
    same(read(tmp_path / "ours"), read(tmp_path / "again"))
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "released" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* should repeat .*embed_tokens\.weight"):
        convert(tmp_path / "released", tmp_path / "wrong", "native")


def test_dtype_is_cast_when_asked_and_never_the_router_bias(tmp_path, sound):
    convert(sound, tmp_path / "wide", "native", dtype=torch.float32)
    wide = read(tmp_path / "wide")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    convert(tmp_path / "wide", tmp_path / "back", "glm4v_moe", dtype=torch.bfloat16)
    same(read(sound), read(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    half = load_agent(tmp_path / "wide", dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} == {torch.float32}


def test_a_text_model_sees_with_what_it_is_given(tmp_path):
    released(tmp_path / "released", "glm4_moe")
    tower = CogViT(VISION)
    initialise(tower)
    geometry = GeometryConfig(min_tokens=4, max_tokens=32)
    save_encoder(tmp_path / "encoder", tower, geometry)
    notes = convert(tmp_path / "released", tmp_path / "ours", "native", encoder=str(tmp_path / "encoder"))
    assert any("a projector that knows nothing" in note for note in notes)
    agent = load_agent(tmp_path / "ours")
    assert (agent.model.config.vision, agent.geometry) == (VISION, geometry)
    same(dict(tower.state_dict()), agent.model.encoder.state_dict())
    assert agent.model.projector.ffn.down.weight.isfinite().all()
    convert(tmp_path / "released", tmp_path / "again", "native", encoder=str(tmp_path / "encoder"))
    same(read(tmp_path / "ours"), read(tmp_path / "again"))  # what starts fresh does so by a seed
    assert load_agent(tmp_path / "ours").model(words("glm4v_moe")[1]).hidden.isfinite().all()
    with pytest.raises(ValueError, match="an encoder of its own"):
        convert(tmp_path / "ours", tmp_path / "x", "native", encoder=str(tmp_path / "encoder"))


def test_custom_encoders_stay_ours(tmp_path, monkeypatch):
    """A text export leaves one behind; a class that sees has no place for it."""
    agent = agent_of("glm4v_moe")
    custom = agent._replace(encoder="tests.interop.test_conversion:any_encoder")
    with pytest.raises(ValueError, match="glm4v_moe has no place for the encoder tests"):
        export_model(tmp_path / "theirs", custom, "glm4v_moe")
    notes = export_model(tmp_path / "text", custom, "glm4_moe")
    assert notes == ["left behind, for glm4_moe has no place for it: encoder, projector"]
    assert not [name for name in read(tmp_path / "text") if "visual" in name]


CALLED: list[str] = []


def any_encoder() -> CogViT:
    CALLED.append("any_encoder")
    return CogViT(VISION)


def test_code_that_a_folder_names_is_not_run_without_consent(tmp_path, capsys):
    """Neither an agent's encoder, nor that of an encoder folder which a text model shall see with."""
    agent, path = agent_of("glm4_moe"), "tests.interop.test_conversion:any_encoder"
    save_agent(tmp_path / "ours", agent.model, agent.vocab, agent.geometry, agent.chat, encoder=path)
    save_encoder(tmp_path / "encoder", CogViT(VISION), agent.geometry, custom=path)
    released(tmp_path / "text", "glm4_moe")
    called = importlib.import_module("tests.interop.test_conversion").CALLED  # as the path names it
    called.clear()
    for attempt in (
        lambda: convert(tmp_path / "ours", tmp_path / "text-only", "glm4_moe"),
        lambda: convert(tmp_path / "text", tmp_path / "seeing", "native", encoder=str(tmp_path / "encoder")),
        lambda: check(tmp_path / "ours"),
        lambda: load_into(agent.model, tmp_path / "ours"),
    ):
        with pytest.raises(ValueError, match=rf"names the encoder {path}, which is imported and called"):
            attempt()
    assert main([str(tmp_path / "ours"), "--check"]) == 1
    assert path in capsys.readouterr().err
    assert called == []
    assert main([str(tmp_path / "ours"), "--check", "--trust-code"]) == 0
    assert called
    load_into(agent.model, tmp_path / "ours", trust_code=True)
    load_agent(tmp_path / "ours")  # folders of one's own


def test_weights_go_from_any_folder_into_a_live_or_a_meta_model(tmp_path, sound):
    convert(sound, tmp_path / "ours", "native", shard_size=50_000)
    wanted = load_agent(tmp_path / "ours").model
    for folder in (sound, tmp_path / "ours"):
        live, meta = AgentModel(wanted.config), presets.on_meta(wanted.config)
        load_into(live, folder)
        load_into(meta, folder)
        for model in (live, meta):
            same(wanted.state_dict(), model.state_dict())
            assert all(p.requires_grad for p in model.parameters())
    other = AgentModel(presets.debug(wanted.config.vocab_size, 1))
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit AgentModel: .* missing"):
        load_into(other, sound)
    same(before, other.state_dict())


# ---------------------------------------------------------------------------------------------- what is not sound


def spoil(folder: Path, change) -> None:
    """``change`` gets all tensors of the one file of ``folder``."""
    tensors = read(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MLP = "model.language_model.layers.1.mlp"
FAULTS = {
    "missing": (lambda t: t.pop(f"{MLP}.experts.3.up_proj.weight"), r"1 missing: .*experts\.3\.up_proj\.weight"),
    "no bias": (lambda t: t.pop(f"{MLP}.gate.e_score_correction_bias"), r"1 missing: .*e_score_correction_bias"),
    "no mtp norm": (
        lambda t: t.pop("model.language_model.layers.3.hnorm.weight"), r"1 missing: .*layers\.3\.hnorm\.weight"
    ),
    "extra": (lambda t: t.update(stray=torch.zeros(2)), r"1 unknown: stray \(model\.safetensors\)"),
    "a ninth expert": (
        lambda t: t.update({f"{MLP}.experts.8.up_proj.weight": torch.zeros(24, 48)}), r"unknown: .*experts\.8\.up_proj"
    ),
    "misshapen": (
        lambda t: t.update({f"{MLP}.experts.0.down_proj.weight": torch.zeros(24, 48)}),
        r"experts\.0\.down_proj\.weight \(model\.safetensors\) has shape \(24, 48\), expected \(48, 24\)",
    ),
    "turned convolution": (
        lambda t: t.update({"model.visual.downsample.weight": torch.zeros(48, 2, 2, 32)}),
        r"downsample\.weight .* has shape \(48, 2, 2, 32\), expected \(48, 32, 2, 2\)",
    ),
    "integers": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}), r"lm_head\.weight .* is int8, no"
    ),
    "quantised": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
        r"lm_head\.weight .* is float8_e4m3fn",
    ),
    "mixed": (
        lambda t: t.update({f"{MLP}.experts.1.up_proj.weight": t[f"{MLP}.experts.1.up_proj.weight"].float()}),
        r"experts\.gate_up would mix dtypes: .*experts\.0\.gate_proj\.weight torch\.bfloat16",
    ),
    "nan": (
        lambda t: t[f"{MLP}.experts.5.gate_proj.weight"].__setitem__((3, 4), float("nan")),
        r"layers\.1\.mlp\.experts\.5\.gate_proj\.weight in .*model\.safetensors is not finite",
    ),
    "infinite": (
        lambda t: t["model.visual.downsample.weight"].__setitem__((3, 4, 1, 1), float("inf")),
        r"is not finite",
    ),
    "another head in the MTP layer": (
        lambda t: t["model.language_model.layers.3.shared_head.head.weight"].__setitem__((9, 9), 1.0),
        r"layers\.3\.shared_head\.head\.weight in .* should repeat lm_head\.weight",
    ),
    "another table in the MTP layer": (
        lambda t: t["model.language_model.layers.3.embed_tokens.weight"].__setitem__((9, 9), 1.0),
        r"layers\.3\.embed_tokens\.weight in .* should repeat model\.language_model\.embed_tokens\.weight",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "whole"
    released(folder, "glm4v_moe")
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_and_nothing_written(tmp_path, whole, fault):
    change, said = FAULTS[fault]
    shutil.copytree(whole, tmp_path / "theirs")
    spoil(tmp_path / "theirs", change)
    for attempt in (
        lambda: convert(tmp_path / "theirs", tmp_path / "ours", "native"),
        lambda: check(tmp_path / "theirs"),
    ):
        with pytest.raises(ValueError, match=said):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_swapped_experts_would_show(tmp_path, whole):
    """What makes the round trips above a proof: two experts swapped are another model."""
    shutil.copytree(whole, tmp_path / "theirs")

    def swap(tensors: dict) -> None:
        one, other = (f"{MLP}.experts.{n}.up_proj.weight" for n in (1, 2))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    spoil(tmp_path / "theirs", swap)
    convert(whole, tmp_path / "a", "native")
    convert(tmp_path / "theirs", tmp_path / "b", "native")
    one, other = read(tmp_path / "a"), read(tmp_path / "b")
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["decoder.blocks.1.moe.experts.gate_up"]


def test_faults_of_files_and_index(tmp_path, sound):
    def fault(change, said: str) -> None:
        folder = tmp_path / "theirs"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        change(folder)
        with pytest.raises(ValueError, match=said):
            convert(folder, tmp_path / "ours", "native")
        assert not (tmp_path / "ours").exists()

    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = json.loads((sound / "model.safetensors.index.json").read_text())["weight_map"]
    moved = next(name for name, file in names.items() if file == second)

    def cut(folder: Path) -> None:
        (folder / second).write_bytes((folder / second).read_bytes()[:-1000])

    def twice(folder: Path) -> None:
        both = read(folder)
        save_file({n: both[n] for n in names if names[n] == first or n == moved}, folder / first)

    fault(cut, rf"{second} is torn")
    fault(lambda f: (f / second).unlink(), rf"index\.json names files that are not there: {second}")
    fault(twice, rf"{moved} is in two files: .*{first} and .*{second}")
    fault(lambda f: write_index(f, names | {moved: first}), rf"{moved} is in .*{second}, but .* says {first}")
    fault(lambda f: write_index(f, names | {"ghost": first}), rf"ghost is not in .*{first}, nor in any other file")
    fault(lambda f: write_index(f, {n: v for n, v in names.items() if n != moved}), rf"{moved} in .* is not in .*index")
    fault(lambda f: (f / "model.safetensors.index.json").write_text("{"), r"index\.json is no index")
    fault(lambda f: write_index(f, names | {moved: "../elsewhere.safetensors"}), r"must name files of its own folder")
    fault(lambda f: (f / "model.safetensors.index.json").unlink(), r"but no model\.safetensors\.index\.json")
    fault(lambda f: shutil.copy(f / first, f / "model-00003-of-00003.safetensors"), r"does not name it")
    fault(lambda f: shutil.copy(f / first, f / "model.safetensors"), r"holds both")
    fault(lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer at")
    fault(lambda f: (f / "config.json").unlink(), r"holds no config\.json")
    fault(lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), r"model 'llama' is not one of")

    def pickled(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")

    fault(pickled, r"pickled weights \(pytorch_model\.bin\).* save them as safetensors")


def test_mtp_layers_that_disagree_with_the_configuration(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["text_config"]["num_nextn_predict_layers"] = 3
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json names 3 MTP layers, the files hold 1"):
        convert(tmp_path / "theirs", tmp_path / "ours", "native")
    with pytest.raises(ValueError, match="holds 1 MTP layers: without_mtp is for folders that lost them"):
        convert(whole, tmp_path / "ours", "native", without_mtp=True)


def test_a_cast_says_what_it_cannot_keep(tmp_path):
    """Values too large are the cast's fault, not the source's; values that become zero are counted."""
    agent = agent_of("glm_ocr")
    with torch.no_grad():
        agent.model.embedding.weight[5, :7] = 1e-9
    save_agent(tmp_path / "ours", *agent[:4])
    small = "7 values are too small for torch.float16 and became zero, in 1 tensors: embedding.weight"
    assert small in convert(tmp_path / "ours", tmp_path / "half", "native", dtype=torch.float16)
    assert small in export_model(tmp_path / "live", agent, "glm_ocr", dtype=torch.float16)
    assert not convert(tmp_path / "ours", tmp_path / "same", "native")
    with torch.no_grad():
        agent.model.embedding.weight[5, 7] = -1e5
    save_agent(tmp_path / "ours", *agent[:4])
    said = r"embedding\.weight in .*ours.* holds 1e\+05, which is too large for torch\.float16: the cast from"
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "ours", tmp_path / "large", "native", dtype=torch.float16)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda told: "{", r"config\.json is no JSON object"),
        (lambda told: "[]", r"config\.json"),
        (lambda told: told["text_config"].update(hidden_size="wide"), r"config\.json: .*hidden_size"),
        (lambda told: told["text_config"].update(num_attention_heads=None), r"config\.json: .*num_attention_heads"),
        (lambda told: told.update(mmagent={"mtp": {"bogus": 1}}), r"config\.json: .*bogus"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, whole, change, said):
    shutil.copytree(whole, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    told = json.loads(path.read_text())
    text = change(told)
    path.write_text(text if isinstance(text, str) else json.dumps(told))
    with pytest.raises(ValueError, match=said):
        check(tmp_path / "theirs")


def test_the_place_of_a_target_is_looked_at_first(tmp_path, sound, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    for target, said in (
        (tmp_path / "full", "is there already"), (sound, "is the source"), (sound / "inside", "or inside it")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            convert(sound, target, "native")
    with pytest.raises(ValueError, match="no model folder: it is not replaced"):
        convert(sound, tmp_path / "full", "native", overwrite=True)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match=r"needs .* GB, the disk has 0\.0 GB"):
        convert(sound, tmp_path / "ours", "native")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_only_a_model_is_replaced(tmp_path):
    """Not the folder that holds the source, not a run's (its config.yaml makes it no model), not anyone's files."""
    agent, run = agent_of("glm4_moe"), tmp_path / "run"
    save_agent(run / "agent", *agent[:4])
    (run / "config.yaml").write_text("steps: 7")
    save_agent(tmp_path / "model", *agent[:4])
    for name in ("other", "thesis", "more"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "config.yaml").write_text("steps: 7")
    (tmp_path / "thesis" / "thesis").write_text("years")
    save_agent(tmp_path / "more", *agent[:4])
    (tmp_path / "more" / "checkpoints").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"run holds the source .*run/agent: it is not replaced"):
        convert(run / "agent", run, "native", overwrite=True)
    for name, said in (
        ("run", "missing"), ("other", "missing"), ("thesis", "missing"), ("more", "the folder checkpoints"),
    ):  # fmt: skip
        for attempt in (
            lambda name=name: convert(tmp_path / "model", tmp_path / name, "native", overwrite=True),
            lambda name=name: export_model(tmp_path / name, agent, "native"),
        ):
            with pytest.raises(ValueError, match=rf"{name} is no model folder: it is not replaced .*{said}"):
                attempt()
    assert sorted(tmp_path.rglob("*")) == before
    export_model(tmp_path / "model", agent, "glm4_moe")
    export_model(tmp_path / "model", agent, "hub")
    convert(run / "agent", tmp_path / "model", "native", overwrite=True)
    (tmp_path / "empty").mkdir()
    export_model(tmp_path / "empty", agent, "native")


def test_an_interrupted_conversion_leaves_what_was_there(tmp_path, sound):
    convert(sound, tmp_path / "ours", "native")
    before = read(tmp_path / "ours")

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sound, tmp_path / "ours", "native", dtype=torch.float32, overwrite=True, watch=interrupt)
    same(before, read(tmp_path / "ours"))
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_pieces_are_small_and_each_is_read_once(tmp_path, sound, monkeypatch):
    """Memory: what is read at a time is at most the chunk, however large tensors and files are; and the bytes read are
    those of the model (with a second look at what must repeat), so that the cost grows with its size and no faster."""
    monkeypatch.setattr(tensor_files, "CHUNK", 500)
    sizes: list[int] = []
    fill = tensor_files._fill
    monkeypatch.setattr(tensor_files, "_fill", lambda d, out, at, f: (sizes.append(out.nbytes), fill(d, out, at, f))[1])
    convert(sound, tmp_path / "ours", "native", shard_size=20_000)
    tensors = read(sound)
    whole_reads = max(t.nbytes for n, t in tensors.items() if t.ndim > 2)  # convolutions are turned in memory
    assert max(sizes) <= max(1000, whole_reads)
    turned = sum(t.nbytes * (t.numel() // 500) for t in tensors.values() if t.ndim > 2)
    copies = sum(t.nbytes for n, t in tensors.items() if n.endswith((".embed_tokens.weight", "head.weight")))
    assert sum(sizes) <= sum(t.nbytes for t in tensors.values()) + turned + 2 * copies


@pytest.mark.parametrize("to", [*KINDS, "hub"])
def test_a_model_that_says_blocks_is_no_stock_class(tmp_path, to):
    agent = agent_of(KINDS[0])
    agent.model.config.denoises = 4
    save_agent(tmp_path / "ours", agent.model, agent.vocab, agent.geometry, agent.chat)
    assert load_agent(tmp_path / "ours").model.config.denoises == 4
    with pytest.raises(ValueError, match="learnt blocks of 4"):
        convert(tmp_path / "ours", tmp_path / "theirs", to)
    assert not (tmp_path / "theirs").exists()
