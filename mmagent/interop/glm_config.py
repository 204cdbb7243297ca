"""``config.json`` of ``glm4_moe``, ``glm4v_moe`` and ``glm_ocr``, from our configuration and back.

What a stock class cannot express is refused by name: the file is read back by the class itself and compared with
ours. What changes no logits of the stock class but matters here (how the MTP modules are fed and shared, the chat)
stands under the key ``mmagent``, which the stock classes keep and never read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.glm import MODELS, agent_config
from mmagent.interop.glm_tower import comparable, tower_config
from mmagent.interop.processor_files import chat_fields, chat_from
from mmagent.models.agent_model import AgentModelConfig
from mmagent.models.decoder import DecoderConfig
from mmagent.models.mtp import MTPConfig
from mmagent.ops.rotary import default_sections
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.vocab import Vocab

CONFIG, OURS = "config.json", "mmagent"
CLASSES = {
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glm_ocr": "GlmOcrForConditionalGeneration",
}
MARKS = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip


def their_config(
    model: AgentModelConfig,
    model_type: str,
    vocab: Vocab,
    *,
    chat: ChatConfig | None = None,
    geometry: GeometryConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_positions: int = 0,
) -> dict[str, Any]:
    """The content of ``config.json`` for the stock class of ``model_type``.

    ``max_positions``: the longest context that servers allow; 0 for the model's own, or else the class's default.
    Raises ``ValueError`` naming every field of ours that the stock class cannot express.
    """
    if model_type not in MODELS:
        raise ValueError(f"model {model_type!r} is not one of {', '.join(MODELS)}")
    _require_expressible(model, model_type)
    text = _text_config(model.decoder, model_type) | {"vocab_size": model.vocab_size}
    text |= {"eos_token_id": list(vocab.stop_ids), "pad_token_id": vocab.pad_id}
    text["num_nextn_predict_layers"] = model.mtp.modules
    if max_positions or model.max_positions:
        text["max_position_embeddings"] = max_positions or model.max_positions
    theirs: dict[str, Any] = {"architectures": [CLASSES[model_type]], "model_type": model_type}
    theirs |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": model.decoder.tied_head}
    if model_type == "glm4_moe":
        theirs |= text
    else:
        kind = f"{model_type}_vision"
        theirs["text_config"] = text | {"model_type": f"{model_type}_text"}
        tower = tower_config(model.vision, model.projector, model.decoder.width, kind)
        theirs["vision_config"] = tower | {"model_type": kind}
        theirs |= {name: vocab.id(token) for name, token in MARKS.items()}
    theirs[OURS] = {"mtp": asdict(model.mtp), "chat": chat_fields(chat or ChatConfig())}
    if geometry is not None:
        theirs[OURS]["max_aspect"] = geometry.max_aspect
    _compare(model, theirs, model_type)
    return theirs


def read_config(folder: Path | str) -> Any:
    """The config object of a folder of one of :data:`~mmagent.interop.glm.MODELS`, however old its spelling.

    Raises ``ValueError`` for another model.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}: it is no model folder of transformers")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
    if kind not in MODELS:
        raise ValueError(f"{path}: model {kind!r} is not one of {', '.join(MODELS)}")
    ensure_torchvision()
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder))


def declared_mtp(theirs: Any) -> int:
    """How many MTP layers a config of theirs speaks of."""
    return int(getattr(_text(theirs), "num_nextn_predict_layers", 0) or 0)


def own_mtp(theirs: Any, modules: int) -> MTPConfig:
    """Our MTP config where their folder holds ``modules`` layers: the one that an export of ours noted, else one depth
    a layer, fed as released models are."""
    noted = getattr(theirs, OURS, None) or {}
    if "mtp" in noted:
        mtp = MTPConfig(**noted["mtp"])
        if mtp.modules == modules:
            return mtp
    return MTPConfig(depths=modules, tied=modules <= 1)


def own_chat(theirs: Any) -> ChatConfig | None:
    """The chat that an export of ours noted."""
    noted = getattr(theirs, OURS, None) or {}
    return chat_from(noted["chat"]) if "chat" in noted else None


def own_aspect(theirs: Any, geometry: GeometryConfig) -> GeometryConfig:
    """``geometry`` with the limit of the aspect ratio that an export of ours noted."""
    noted = getattr(theirs, OURS, None) or {}
    return replace(geometry, max_aspect=noted["max_aspect"]) if "max_aspect" in noted else geometry


def _text(theirs: Any) -> Any:
    return getattr(theirs, "text_config", None) or theirs


def _text_config(decoder: DecoderConfig, model_type: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": decoder.rope_base}
    rope["partial_rotary_factor"] = decoder.rotary_fraction
    if model_type != "glm4_moe":
        rope["mrope_section"] = list(decoder.rotary_sections or default_sections(decoder.rotary_pairs))
    text: dict[str, Any] = {
        "hidden_size": decoder.width, "intermediate_size": decoder.ffn, "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads, "num_key_value_heads": decoder.kv_heads, "head_dim": decoder.head_dim,
        "hidden_act": "silu", "rms_norm_eps": decoder.norm_eps, "rope_parameters": rope, "attention_dropout": 0.0,
        "tie_word_embeddings": decoder.tied_head,
    }  # fmt: skip
    if model_type == "glm_ocr":
        return text
    moe = decoder.moe
    text |= {
        "attention_bias": decoder.qkv_bias, "moe_intermediate_size": moe.ffn, "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.shared, "n_routed_experts": moe.experts, "routed_scaling_factor": moe.scale,
        "n_group": moe.groups, "topk_group": moe.kept_groups, "norm_topk_prob": moe.normalise,
        "first_k_dense_replace": decoder.layers - decoder.moe_layers,
    }  # fmt: skip
    # vLLM reads it of glm4v_moe as well, whose stock class has no such norm
    return text | {"use_qk_norm": decoder.qk_norm and model_type == "glm4_moe"}


def _require_expressible(model: AgentModelConfig, model_type: str) -> None:
    """What needs words of its own; all else is found by :func:`_compare`."""
    decoder = model.decoder
    if model_type != "glm_ocr" and decoder.moe_layers and not decoder.moe.shared:
        raise ValueError(f"{model_type} always has a shared expert; this model has none (decoder.moe.shared is 0)")
    if model_type == "glm4v_moe" and not model.vision.position_table:
        raise ValueError("glm4v_moe always has a table of positions; this model has none (vision.position_table is 0)")
    if model_type == "glm_ocr" and decoder.moe_layers:
        raise ValueError(f"glm_ocr is dense; this model has {decoder.moe_layers} layers of experts")
    if model_type != "glm_ocr" and decoder.sandwich_norm:
        raise ValueError(f"{model_type} has no norms after attention and FFN (decoder.sandwich_norm)")


def _compare(model: AgentModelConfig, theirs: dict[str, Any], model_type: str) -> None:
    """Raises ``ValueError`` naming every field that does not come back when the stock class reads ``theirs``."""
    ensure_torchvision()
    from transformers import AutoConfig

    kept: dict[str, Any] = {"mtp": model.mtp}
    if model_type == "glm4_moe":
        kept |= {"vision": model.vision, "projector": model.projector, "image_id": model.image_id}
    back = agent_config(AutoConfig.for_model(**json.loads(json.dumps(theirs))), **kept)
    wrong = list(_differences(_plain(model, model_type), _plain(back, model_type), ""))
    if wrong:
        told = "; ".join(f"{name} {ours!r}, there {there!r}" for name, ours, there in wrong[:6])
        raise ValueError(f"{model_type} cannot express this model: {told}")


def _plain(model: AgentModelConfig, model_type: str) -> AgentModelConfig:
    """With one spelling for what computes the same, and without what a model without experts does not use."""
    decoder = model.decoder
    sections = () if model_type == "glm4_moe" else decoder.rotary_sections or default_sections(decoder.rotary_pairs)
    dense = decoder.layers - decoder.moe_layers
    moe = decoder.moe if decoder.moe_layers else DecoderConfig().moe
    if decoder.moe_layers and moe.groups == moe.kept_groups:
        moe = replace(moe, groups=1, kept_groups=1)
    decoder = replace(decoder, rotary_sections=tuple(sections), dense_layers=dense, moe=moe)
    return replace(model, decoder=decoder, vision=comparable(model.vision), max_positions=0)


def _differences(ours: Any, theirs: Any, path: str) -> Any:
    for field in fields(ours):
        a, b, name = getattr(ours, field.name), getattr(theirs, field.name), path + field.name
        if is_dataclass(a):
            yield from _differences(a, b, f"{name}.")
        elif a != b:
            yield name, a, b


def not_kept(theirs: Any, ours: dict[str, Any]) -> list[str]:
    """What the config object of their folder says otherwise than ``ours``, which :func:`their_config` makes of it, as
    ``name theirs (not ours)``: fields that change nothing here, such as a dropout."""
    from transformers import AutoConfig

    there, here = (_flat(config.to_dict()) for config in (theirs, AutoConfig.for_model(**json.loads(json.dumps(ours)))))
    changed = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    shown = [name for name in changed if name.split(".")[0] != OURS and name.split(".")[-1] not in _TOLD_ELSEWHERE]
    return [f"{name} {there.get(name)!r} (not {here.get(name)!r})" for name in shown]


_TOLD_ELSEWHERE = ("transformers_version", "_name_or_path", "dtype", "num_nextn_predict_layers")
"""Who wrote the file, and what is told of the weights themselves."""


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + str(name): value}
    return flat


def write_config(path: Path, theirs: dict[str, Any]) -> None:
    """``theirs`` as ``config.json``."""
    path.write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")


def wrote_config(path: Path) -> bool:
    """Whether the ``config.json`` at ``path`` is one of :func:`their_config`."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
    return isinstance(told, dict) and OURS in told
