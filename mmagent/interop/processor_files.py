"""What stands beside the weights of an exported folder so that a processor of transformers loads it: tokenizer,
chat template, image sizes, token ids for generation; and the same read back.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mmagent.chat import ChatConfig, Generation
from mmagent.geometry import GeometryConfig
from mmagent.interop.chat_template import FILE as CHAT_TEMPLATE
from mmagent.interop.chat_template import chat_template
from mmagent.models.cogvit import CogViTConfig
from mmagent.vocab import PAD_TOKEN, SPECIAL_TOKENS, Vocab

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PREPROCESSOR, VIDEO_PREPROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json"
GENERATION = "generation_config.json"
PROCESSOR = "Glm46VProcessor"
"""It writes a video as this library's chat does: every group of frames an image, with its seconds behind it."""


def image_processor(geometry: GeometryConfig) -> dict[str, Any]:
    """Sizes and normalisation as image processors of the family keep them: limits in pixels of both frames of a still
    image."""
    token = geometry.temporal_patch * geometry.unit**2
    return {
        "image_mean": list(geometry.mean), "image_std": list(geometry.std), "patch_size": geometry.patch_size,
        "temporal_patch_size": geometry.temporal_patch, "merge_size": geometry.merge_size,
        "size": {"shortest_edge": geometry.min_tokens * token, "longest_edge": geometry.max_tokens * token},
    }  # fmt: skip


def read_geometry(folder: Path | str, vision: CogViTConfig) -> GeometryConfig:
    """Sizes of an encoder, with normalisation and limits of the image processor in ``folder`` (or hub id) where there
    is one."""
    from transformers.utils import cached_file

    sizes = {"patch_size": vision.patch_size, "temporal_patch": vision.temporal_patch, "merge_size": vision.merge_size}
    told: dict[str, Any] = {}
    for name in (PREPROCESSOR, "processor_config.json"):
        found = cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False)
        if found:
            read = json.loads(Path(found).read_text(encoding="utf-8"))
            told = read if name == PREPROCESSOR else read.get("image_processor") or {}
            break
    known: dict[str, Any] = {
        k: tuple(told[v]) for k, v in {"mean": "image_mean", "std": "image_std"}.items() if v in told
    }
    token = vision.temporal_patch * (vision.patch_size * vision.merge_size) ** 2
    size = told.get("size") or {}
    if "shortest_edge" in size:
        known["min_tokens"] = max(int(size["shortest_edge"]) // token, 1)
    if "longest_edge" in size:
        known["max_tokens"] = max(int(size["longest_edge"]) // token, 1)
    return GeometryConfig(**sizes, **known)


def check_numbers(vocab: Vocab, where: str) -> None:
    """Raises ``ValueError``, headed by ``where``, for a vocabulary that transformers would number otherwise: control
    tokens whose ids leave holes in the file are numbered anew when its library reads it."""
    read = Tokenizer.from_str(vocab.definition)
    for token in vocab.control_tokens:
        if read.token_to_id(token) != vocab.id(token):
            raise ValueError(
                f"{where}: {token} is {vocab.id(token)} in the vocabulary, but tokenizers reads it as "
                f"{read.token_to_id(token)}: control tokens must follow the other ids without a hole"
            )


def write_processor(
    folder: Path, vocab: Vocab, chat: ChatConfig, geometry: GeometryConfig | None, rows: int | None = None
) -> None:
    """Everything but weights and ``config.json``; ``geometry`` None for a model that only reads text. ``rows`` of the
    model's table (default: as many as ids), of which those that a policy can never sample are told to generation."""
    vocab.save(folder / TOKENIZER)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": PAD_TOKEN,
        "extra_special_tokens": list(SPECIAL_TOKENS), "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # what ``apply_chat_template(..., sanitize_control_tokens=True)`` keeps users from saying
        "chat_control_tokens": list(vocab.control_tokens),
    }  # fmt: skip
    _write(folder / TOKENIZER_CONFIG, tokenizer)
    _write(folder / GENERATION, generation(vocab, vocab.size if rows is None else rows))
    (folder / CHAT_TEMPLATE).write_text(chat_template(chat), encoding="utf-8")
    if geometry is not None:
        steps = {"do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True}
        processor = image_processor(geometry) | steps | {"rescale_factor": 1 / 255, "processor_class": PROCESSOR}
        _write(folder / PREPROCESSOR, processor | {"image_processor_type": "Glm46VImageProcessor"})
        _write(folder / VIDEO_PREPROCESSOR, processor | {"video_processor_type": "Glm46VVideoProcessor"})


def read_chat(folder: Path, noted: ChatConfig | None = None) -> ChatConfig | None:
    """The chat whose template is the one in ``folder``: ``noted``, if it is that one's, for it says more than any
    template. None where the template is another, or there is none."""
    text = read_template(folder)
    plain = [ChatConfig(*parts) for parts in product(Generation, (False, True), (False, True))]
    return next((chat for chat in ([noted] if noted else []) + plain if chat_template(chat) == text), None)


def generation(vocab: Vocab, rows: int) -> dict[str, Any]:
    """``generation_config.json`` of a model with a table of ``rows``."""
    barred = vocab.barred(rows)
    return {"eos_token_id": list(vocab.stop_ids), "pad_token_id": vocab.pad_id, "suppress_tokens": list(barred)}


def other_generation(folder: Path, ours: dict[str, Any]) -> list[str]:
    """What ``generation_config.json`` says and ``ours``, of :func:`generation`, does not: how to sample, as a rule."""
    if not (folder / GENERATION).is_file():
        return []
    told = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    usual = {"use_cache": True, "output_attentions": False, "output_hidden_states": False} | ours
    said = {name: value for name, value in sorted(told.items()) if value is not None and usual.get(name) != value}
    return [f"{name} {value!r}" for name, value in said.items() if name not in _WRITERS]


_WRITERS = ("transformers_version", "_from_model_config")
"""Who wrote the file, and from what."""


def read_template(folder: Path) -> str | None:
    """The text of the chat template in ``folder``: a file of its own, or within the tokenizer's configuration, where
    of several that for no special use counts. None where there is none."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    told = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    template = told.get("chat_template") if isinstance(told, dict) else None
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def chat_fields(chat: ChatConfig) -> dict[str, Any]:
    """``chat`` as JSON holds it."""
    return asdict(chat) | {"generation": chat.generation.value}


def chat_from(fields: dict[str, Any]) -> ChatConfig:
    """The reverse of :func:`chat_fields`."""
    return ChatConfig(**(fields | {"generation": Generation(fields["generation"])}))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
