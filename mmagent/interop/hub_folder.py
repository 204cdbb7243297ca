"""What stands beside the weights of a folder that brings its own code to transformers, and the same read back.

``FOLDER/config.json``             model, image geometry, chat; where the classes are
``FOLDER/model.safetensors``       every parameter and persistent buffer under our names; or numbered files and an index
``FOLDER/tokenizer.json``          the vocabulary, with ``tokenizer_config.json``, ``processor_config.json``,
``FOLDER/chat_template.jinja``     the chat format for whoever wants text, ``generation_config.json``
``FOLDER/README.md``               how to load it, for whoever finds it
``FOLDER/*.py``                    the model's code: :mod:`mmagent.interop.hub` and what it needs of this library

:func:`mmagent.interop.conversion.convert` makes such a folder and reads it; weights keep every bit. It loads by
``AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)``, ``AutoProcessor`` and ``AutoTokenizer``
where this library is not installed, and serves by ``transformers serve --trust-remote-code FOLDER``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mmagent
from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop import hub
from mmagent.interop.agent_folder import AgentConfig, check_fit
from mmagent.interop.chat_template import FILE as CHAT_TEMPLATE
from mmagent.interop.chat_template import chat_template
from mmagent.interop.flat_modules import flat_modules
from mmagent.interop.hub import MODEL_CLASS, MODEL_TYPE
from mmagent.interop.hub.plain import from_plain, to_plain
from mmagent.models.agent_model import AgentModelConfig
from mmagent.vocab import STOP_TOKENS, Vocab

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
HUB = hub.__name__
ENTRIES = {
    "AutoConfig": "configuration_mmagent.MMAgentConfig",
    "AutoModelForImageTextToText": f"modeling_mmagent.{MODEL_CLASS}",
    "AutoModelForMultimodalLM": f"modeling_mmagent.{MODEL_CLASS}",
    "AutoModelForCausalLM": f"modeling_mmagent.{MODEL_CLASS}",
    "AutoProcessor": "processing_mmagent.MMAgentProcessor",
    "AutoImageProcessor": "image_processing_mmagent.MMAgentImageProcessor",
    "AutoTokenizer": "tokenization_mmagent.MMAgentTokenizer",
}

NEEDS = ("torch", "transformers", "tokenizers", "numpy", "pillow")
"""What the code beside the weights imports, and what transformers opens pictures with."""


def write_hub(folder: Path, config: AgentConfig, vocab: Vocab, dtype: torch.dtype) -> None:
    """Everything but the weights, whose parameters are in ``dtype``."""
    vocab.save(folder / TOKENIZER)
    (folder / CHAT_TEMPLATE).write_text(chat_template(config.chat), encoding="utf-8")
    for name, content in _configs(config, vocab, dtype).items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(), encoding="utf-8")
    for name, text in _code().items():
        (folder / name).write_text(text, encoding="utf-8")


def _code() -> dict[str, str]:
    return flat_modules(sorted({f"{HUB}.{entry.partition('.')[0]}" for entry in ENTRIES.values()}))


def check_code(folder: Path) -> list[str]:
    """Lines for people about the code in ``folder``, which is compared and not run: what is not as this version writes
    it, what it does not write at all, and classes that others of its files send a loader to. Raises ``ValueError``
    naming the files without which the model does not load where this library is not."""
    code = {name: text.encode() for name, text in _code().items()}
    if missing := sorted(name for name in code if not (folder / name).is_file()):
        raise ValueError(f"{folder} lacks its code: {', '.join(missing)}")
    changed = [name for name, text in sorted(code.items()) if (folder / name).read_bytes() != text]
    strange = sorted(path.name for path in folder.glob("*.py") if path.name not in code)
    sent = sorted({f"{entry} ({file})" for file, entry in _entries(folder) if entry not in ENTRIES.values()})
    found = {"code of another version, or changed": changed, "code that this version does not write": strange}
    return [
        f"{what}: {', '.join(names)}" for what, names in (found | {"classes from elsewhere": sent}).items() if names
    ]


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    """Every class that an ``auto_map`` names, behind the file that does so."""
    for path in sorted(folder.glob("*config.json")):
        try:
            waiting = [json.loads(path.read_text(encoding="utf-8"))]
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        while waiting:
            told = waiting.pop()
            if isinstance(told, dict):
                waiting += told.values()
                named = told.get("auto_map")
                for entry in named.values() if isinstance(named, dict) else ():
                    yield from ((path.name, str(one)) for one in (entry if isinstance(entry, list) else [entry]) if one)


def is_hub(folder: Path) -> bool:
    """Whether ``folder`` is one of these, or what ``save_pretrained`` made of a model that was loaded from one."""
    return (folder / CONFIG).is_file() and _told(folder) is not None


def read_hub(folder: Path) -> tuple[AgentConfig, Vocab]:
    """What :func:`write_hub` wrote. Raises ``ValueError`` naming a file that is missing, a field that is unknown, or
    what does not fit."""
    told = _told(folder)
    if told is None:
        raise ValueError(f"{folder / CONFIG}: model_type is not {MODEL_TYPE!r}")
    parts = {"agent": AgentModelConfig, "geometry": GeometryConfig, "chat": ChatConfig}
    if missing := [name for name in parts if name not in told]:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}")
    try:
        model, geometry, chat = (from_plain(cls, told[name], name) for name, cls in parts.items())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    config, vocab = AgentConfig(model, geometry, chat), Vocab.load(folder / TOKENIZER)
    check_fit(config, vocab, str(folder))
    return config, vocab


def _told(folder: Path) -> dict[str, Any] | None:
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON object: {error}") from error
    return told if isinstance(told, dict) and told.get("model_type") == MODEL_TYPE else None


def _configs(agent: AgentConfig, vocab: Vocab, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """File names to what they hold."""
    geometry, chat = to_plain(agent.geometry), to_plain(agent.chat)
    config = {
        "architectures": [MODEL_CLASS],
        "auto_map": {auto: ENTRIES[auto] for auto in ENTRIES if auto.startswith(("AutoConfig", "AutoModel"))},
        "model_type": MODEL_TYPE,
        "transformers_version": version("transformers"),
        "dtype": str(dtype).removeprefix("torch."),
        "agent": to_plain(agent.model),
        "geometry": geometry,
        "chat": chat,
        "mtp_weight": 0.0,
    }
    generation = {
        "eos_token_id": list(vocab.stop_ids),
        "pad_token_id": vocab.pad_id,
        "suppress_tokens": list(vocab.barred(agent.model.vocab_size)),
    }
    tokenizer = {
        "tokenizer_class": "MMAgentTokenizer",
        "auto_map": {"AutoTokenizer": [ENTRIES["AutoTokenizer"], None]},
        "processor_class": "MMAgentProcessor",
        "eos_token": STOP_TOKENS[0],
        "pad_token": vocab.decode([vocab.pad_id]),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat": chat,
        "response_template": response_template(),
    }
    processor = {
        "processor_class": "MMAgentProcessor",
        "auto_map": {name: ENTRIES[name] for name in ("AutoProcessor", "AutoImageProcessor")},
        "image_processor": {
            "image_processor_type": "MMAgentImageProcessor",
            "auto_map": {"AutoImageProcessor": ENTRIES["AutoImageProcessor"]},
            "geometry": geometry,
        },
    }
    return {
        CONFIG: config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer,
        "processor_config.json": processor,
        "preprocessor_config.json": processor["image_processor"] | {"processor_class": "MMAgentProcessor"},
    }


def _card() -> str:
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [mmagent, custom_code]
---
An agent made with mmagent {mmagent.__version__}. Its code lies beside the weights, so mmagent need not be installed.
It needs {", ".join(NEEDS[:-1])} and {NEEDS[-1]} (for pictures), and was written for
transformers {version("transformers")}:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True, dtype="bfloat16")
content = [{{"type": "image", "path": "screenshot.png"}}, {{"type": "text", "text": "Where is the button?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
out = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`transformers serve FOLDER --trust-remote-code` serves it, once `pip install "transformers[serving]"` was run. In
mmagent, `python tools/convert.py FOLDER TARGET --to native` makes an agent folder of it again, bit for bit.
"""


def response_template() -> dict[str, Any]:
    """How ``tokenizer.parse_response`` and servers tell thoughts and calls from the answer. A prompt may have opened or
    closed the thoughts already: the turn begins behind what it closed."""
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"<\|assistant\|>(?:\s*(?:<think>)?</think>)?",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*(?P<name>[^<\n]+)",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
                },
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": r"\s*(?:<\|endoftext\|>|<\|user\|>|<\|observation\|>)", "content": "text"},
        },
    }
