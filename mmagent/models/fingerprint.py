"""Who a frozen model is: three digests that are equal in every process that builds it alike, wherever it was loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmagent.models.backbone import Backbone
from mmagent.models.feature_cache import content_key

_MACHINERY = frozenset(vars(nn.Module()))
_PROVENANCE = frozenset(
    {"name_or_path", "_is_hf_initialized", "_output_capturing_hooks_installed"}
    | {"pretrained_cfg", "default_cfg", "pretrained_model_args"}
)
"""What transformers and timm note of where a model came from and which of their hooks it has: it decides no output."""


class Fingerprint(NamedTuple):
    """Hexadecimal sha256 of ``weights`` (parameters and buffers with their names and dtypes, and the preprocessing),
    of ``settings`` (layers, configuration and every other value that a layer holds), and of the ``versions`` of the
    libraries that compute with them."""

    weights: str
    settings: str
    versions: str


def fingerprint(backbone: Backbone) -> Fingerprint:
    """Reads all weights once. Raises ``ValueError`` for a ``call`` that is neither a function nor a dataclass: nothing
    tells such a one from another."""
    call, module = backbone.call, backbone.module
    if not has_name(call):
        raise ValueError(f"{type(call).__name__}: what calls a model must be a function or a dataclass to have a name")
    tensors = sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items())
    pixels = (backbone.patch_size, backbone.mean, backbone.std)
    weights = content_key(spelled(pixels), *(part for pair in tensors for part in pair))
    config = getattr(module, "config", None)
    layers = [(path, spelled(type(part)), spelled(_held(part))) for path, part in module.named_modules()]
    settings = (spelled(call), backbone.pool, backbone.fixed, backbone.maskable, _configured(config), layers)
    kind = type(module)
    return Fingerprint(
        weights,
        content_key(repr(module), spelled(settings)),
        content_key(f"{kind.__module__}.{kind.__qualname__} {_version(kind)} {torch.__version__}"),
    )


def has_name(call: object) -> bool:
    """Whether :func:`spelled` tells ``call`` from others: a function or a dataclass."""
    return is_dataclass(call) or hasattr(call, "__qualname__")


def _held(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name not in _MACHINERY | _PROVENANCE}


def _configured(config: Any) -> str:
    """The whole configuration of a model of transformers, but for its path and the library's version."""
    if not hasattr(config, "to_json_string"):
        return ""
    values = json.loads(config.to_json_string(use_diff=False))
    kept = {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}
    return json.dumps([kept, str(getattr(config, "_attn_implementation", ""))], sort_keys=True)


def spelled(value: Any) -> str:
    """``value`` as a text that is the same in every process: no address, and no order of a hash.

    Numbers, texts, tensors, containers of them, dataclasses, functions and classes are spelled out; of any other object
    its class is all that counts.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Enum):
        return f"{spelled(type(value))}.{value.name}"
    if isinstance(value, Tensor):
        return content_key(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{spelled(k)}: {spelled(v)}' for k, v in value.items()))}}}"
    if isinstance(value, AnySet):
        return f"set({', '.join(sorted(map(spelled, value)))})"
    if isinstance(value, Sequence):
        return f"({', '.join(map(spelled, value))})"
    if isinstance(value, partial):
        return f"partial{spelled((value.func, value.args, value.keywords))}"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{spelled(type(value))}{spelled({f.name: getattr(value, f.name) for f in fields(value)})}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"


def _version(kind: type) -> str:
    """Of the installed package that ``kind`` comes from; nothing for a class of the user's own."""
    try:
        return version(kind.__module__.partition(".")[0])
    except PackageNotFoundError:
        return ""
