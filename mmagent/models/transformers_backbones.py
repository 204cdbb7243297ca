"""The vision models of transformers as backbones: any with ``pixel_values`` in and a grid of features out, alone or as
the tower of an image-text model."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmagent.config import first_line
from mmagent.files import new_folder, require_own
from mmagent.geometry import CLIP_MEAN, CLIP_STD
from mmagent.models.backbone import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    GridFeatures,
    as_tokens,
    has_parameter,
    layout_of,
    native_size,
    probe,
    quietly,
    square_patch,
)
from mmagent.ops.torchvision_shim import ensure_torchvision

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
PATCHED = ("siglip2_vision_model",)
"""Towers that take rows of patches with their grids instead of images."""
_HALF = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model", "vit", "beit", "data2vec-vision", "bit")
_IMAGENET = (
    "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext", "convnext", "convnextv2", "resnet", "regnet",
    "swin", "swinv2", "deit", "focalnet", "pvt_v2", "hiera", "vit_msn", "ijepa", "internvl_vision", "efficientnet",
)  # fmt: skip
_CLIP = ("clip", "clip_vision_model", "mlcd_vision_model", "aimv2_vision_model", "chinese_clip_vision_model")
PIXELS = {
    **dict.fromkeys(_HALF, (HALF, HALF)),
    **dict.fromkeys(_IMAGENET, (IMAGENET_MEAN, IMAGENET_STD)),
    **dict.fromkeys(_CLIP, (CLIP_MEAN, CLIP_STD)),
}
"""Mean and deviation that the families were trained with, by ``model_type``: for models that come without a
preprocessor's config."""
_PROBE = 192  # pixels: a multiple of every reduction that hierarchical models have (32, 64)


@dataclass(frozen=True)
class TransformersCall:
    """Calls a model of transformers: ``prefix`` tokens in front of the grid, ``registers`` of them no class token;
    ``layout`` of its last hidden state; inputs that it ``takes``, in order; ``native`` pixels, its own size."""

    patch_size: int
    prefix: int
    registers: int
    layout: str
    takes: tuple[str, ...]
    native: tuple[int, int] | None

    def __call__(self, module: Any, pixels: Tensor, masked: Tensor | None, layers: Sequence[int] = ()) -> GridFeatures:
        kind = type(module).__name__
        inputs = _inputs(module, pixels, self.patch_size, self.takes, self.native)
        if masked is not None:
            inputs["bool_masked_pos"] = masked
        if layers:
            inputs["output_hidden_states"] = True
        output = module(**inputs)
        rows, cols = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        front, tokens = as_tokens(output.last_hidden_state, rows, cols, self.layout, self.prefix, kind)
        inner = {i: as_tokens(output.hidden_states[i + 1], rows, cols, "NLC", self.prefix, kind)[1] for i in layers}
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            summary = pooled.flatten(1)  # some pool to a map of one cell
        else:
            summary = front[:, 0] if self.prefix > self.registers else tokens.mean(dim=1)
        return GridFeatures(tokens, summary, inner)


def _inputs(
    module: Any, pixels: Tensor, patch: int, takes: Collection[str], native: tuple[int, int] | None
) -> dict[str, Any]:
    if module.config.model_type in PATCHED:
        images, channels, height, width = pixels.shape
        rows, cols = height // patch, width // patch
        cut = pixels.view(images, channels, rows, patch, cols, patch).permute(0, 2, 4, 3, 5, 1)
        grids = torch.tensor([[rows, cols]]).expand(images, 2)
        patches = cut.reshape(images, rows * cols, -1)
        return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": grids}
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if "interpolate_pos_encoding" in takes:
        inputs["interpolate_pos_encoding"] = tuple(pixels.shape[-2:]) != native
    return inputs


def is_transformers(module: nn.Module) -> bool:
    """Whether ``module`` is a pretrained-model class of transformers."""
    ensure_torchvision()
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def wrap_transformers(
    module: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, pool: str = "own"
) -> Backbone:
    """A backbone around a vision model of transformers, or the vision tower of an image-text model, measured by one
    forward of a tiny image."""
    module = vision_tower(module)
    any_module: Any = module
    config, kind = any_module.config, type(module).__name__
    if any_module.main_input_name != "pixel_values":
        raise ValueError(f"{kind} ({config.model_type}) cannot be a backbone: it takes no pixels")
    defaults = PIXELS.get(config.model_type, (None, None))
    mean, std = mean or defaults[0], std or defaults[1]
    if not mean or not std:
        raise ValueError(f"{kind} ({config.model_type}) does not say the mean and std of its pixels: give both")
    names = frozenset(inspect.signature(any_module.forward).parameters)
    native = native_size(getattr(config, "image_size", None))
    declared = getattr(config, "patch_size", None)
    nested = hasattr(config, "depths") or declared is None
    # windows are cut down for good by the first image that is smaller than they are: such models see one size only
    any_size = not hasattr(config, "window_size")
    patch = _reduction(module, names, native, any_size) if nested else square_patch(declared, kind)

    def look(pixels: Tensor) -> Any:
        return any_module(**_inputs(module, pixels, patch, names, native), output_hidden_states=True)

    seen = probe(module, look, patch, native, any_size)
    features = seen.output.last_hidden_state
    layout = layout_of(features, seen.rows, seen.cols, None, kind)
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    prefix = _prefix(features, seen.rows * seen.cols, registers, kind) if layout == "NLC" else 0
    _, tokens = as_tokens(features, seen.rows, seen.cols, layout, prefix, kind)
    takes = names & {"interpolate_pos_encoding"}
    if "bool_masked_pos" in names and has_parameter(module, "mask_token") and not nested:
        takes |= {"bool_masked_pos"}
    pooled = getattr(seen.output, "pooler_output", None)
    width = tokens.shape[-1]
    return Backbone(
        module,
        TransformersCall(patch, prefix, registers, layout, tuple(sorted(takes)), native),
        patch,
        width,
        width if pooled is None or pool == "mean" else pooled.flatten(1).shape[-1],
        tuple(mean),
        tuple(std),
        seen.fixed,
        _depth(seen.output, features, layout),
        pool,
        "bool_masked_pos" in takes,
    )


def _prefix(features: Tensor, cells: int, registers: int, kind: str) -> int:
    """Tokens in front of the patches: registers and at most two that stand for the whole image (DeiT has two)."""
    front = features.shape[1] - cells
    if front - registers not in (0, 1, 2):
        raise ValueError(
            f"{kind} cannot be a backbone: it returns {features.shape[1]} tokens for {cells} patches and {registers} "
            f"registers"
        )
    return front


def _depth(output: Any, features: Tensor, layout: str) -> int:
    """How many blocks give hidden states on the grid of the last one."""
    states = getattr(output, "hidden_states", None) or ()
    even = layout == "NLC" and all(isinstance(s, Tensor) and s.shape == features.shape for s in states)
    return len(states) - 1 if even and len(states) > 1 else 0


def _reduction(module: Any, names: frozenset[str], native: tuple[int, int] | None, any_size: bool) -> int:
    """Pixels on a side of a cell of a hierarchical model's last map, seen on a square picture."""
    kind, reasons = type(module).__name__, []
    for size in dict.fromkeys([(_PROBE, _PROBE) if any_size else None, native]):
        if size is None or size[0] != size[1]:
            continue

        def look(pixels: Tensor, size: tuple[int, int] = size) -> Any:
            return module(**_inputs(module, pixels, 1, names, native), output_hidden_states=True)

        try:
            output = quietly(module, look, size)
        except Exception as error:  # whatever a foreign model raises is why it cannot be used so
            reasons.append(f"{size[0]}x{size[1]} pixels: {type(error).__name__}: {error}")
            continue
        maps = [output.last_hidden_state]
        for states in ("reshaped_hidden_states", "hidden_states"):
            maps += (getattr(output, states, None) or ())[-1:]
        shapes = [tuple(found.shape[1:]) for found in maps if found.ndim == 4]
        sides = [side for one, side, last in shapes if side in (one, last)]  # in the middle of both layouts
        if sides and size[0] % sides[0] == 0:
            return size[0] // sides[0]
        reasons.append(f"{size[0]}x{size[1]} pixels give {[tuple(found.shape) for found in maps]}, no square map")
    raise ValueError(f"{kind} cannot be a backbone: {'; '.join(reasons) or 'it says no size of its images'}")


# ---------------------------------------------------------------------------------------------- from folder or hub


def load_transformers(source: str, dtype: torch.dtype) -> Backbone:
    """From a folder that transformers wrote, or a hub id. Raises ``ValueError`` where there is none, it is no vision
    model, or a weight is missing."""
    ensure_torchvision()
    from transformers import MODEL_MAPPING, AutoConfig, PreTrainedModel

    try:
        whole = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no teacher {source!r}: it must be the folder of a model (recipes.teachers leaves one in OUTPUT/teacher), "
            f"or a hub id that can be reached from here ({first_line(error)})"
        ) from error
    config = getattr(whole, "vision_config", whole)
    known = MODEL_MAPPING.get(type(config), None)
    kind: Any = known[0] if isinstance(known, tuple) else known
    if kind is None or not issubclass(kind, PreTrainedModel) or kind.main_input_name != "pixel_values":
        raise ValueError(f"{source} is a {whole.model_type!r} model, and transformers has no vision model of that type")
    pixels = _preprocessing(source)
    try:
        with _quiet_transformers():
            module = _load(kind, source, config, dtype) if config is whole else _load_tower(kind, source, config, dtype)
    except OSError as error:  # no weights, or none that can be read
        raise ValueError(f"{source} cannot be loaded: {first_line(error)}") from error
    return wrap_transformers(module, pixels.get("image_mean"), pixels.get("image_std"))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars, and its reports only where loading fails: then a note on the error. Bars of
    downloads stay as they were."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging as settings

    said, library = _Collected(), logging.getLogger("transformers")
    bars, downloads = settings.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    handlers, passes_on, level = library.handlers, library.propagate, library.level
    library.handlers, library.propagate = [said], False
    library.setLevel(logging.WARNING)  # the reports' own, whatever was set for people
    try:
        _show_bars(False, downloads)
        yield
    except Exception as error:
        if said.lines:
            error.add_note("\n".join(said.lines))
        raise
    finally:
        library.handlers, library.propagate = handlers, passes_on
        library.setLevel(level)
        _show_bars(bars, downloads)


def _show_bars(bars: bool, downloads: bool) -> None:
    """Transformers' switch turns the one of downloads as well."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging as settings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a variable of the environment has the last word
        (settings.enable_progress_bar if bars else settings.disable_progress_bar)()
        (hub.enable_progress_bars if downloads else hub.disable_progress_bars)()


class _Collected(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _load(kind: Any, source: str, config: Any, dtype: torch.dtype) -> nn.Module:
    module, missing = _read(kind, source, config, dtype)
    optional = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    if missing and optional and all(name.startswith("pooler.") for name in missing):
        module, missing = _read(kind, source, config, dtype, add_pooling_layer=False)  # published without its pooler
    if missing:
        raise ValueError(f"{source} lacks the weights {', '.join(missing[:8])}")
    return module


def _read(kind: Any, source: str, config: Any, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, list[str]]:
    module, report = kind.from_pretrained(
        source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    return module, sorted(report["missing_keys"])


def _load_tower(kind: Any, source: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """The vision tower of an image-text model: alone if its weights are named so, else out of the whole model."""
    module, missing = _read(kind, source, config, dtype)
    if not missing:
        return module
    from transformers import AutoModel

    whole, report = AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True, output_loading_info=True)
    tower = vision_tower(whole)
    path = next(path for path, part in whole.named_modules() if part is tower)
    if lacking := sorted(name for name in report["missing_keys"] if name.startswith(f"{path}.")):
        raise ValueError(f"{source} lacks the weights {', '.join(lacking[:8])}")
    return tower


def vision_tower(module: nn.Module) -> nn.Module:
    """The part of an image-text model that sees; a vision model itself. Raises ``ValueError`` if there is none."""
    from transformers import PreTrainedModel

    config = getattr(module.config, "vision_config", None)
    if config is None:
        return module
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and type(part.config) is type(config):
            return part
    raise ValueError(f"{type(module).__name__} cannot be a backbone: it holds no vision tower")


def _preprocessing(source: str) -> dict[str, Any]:
    """What the preprocessor's config beside the weights says of images; nothing where there is none."""
    from transformers.utils import cached_file

    for name in PREPROCESSORS:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found:
            values = json.loads(Path(found).read_text(encoding="utf-8"))
            values = values.get("image_processor", values)
            if "image_mean" in values:
                return values
    return {}


def save_transformers(backbone: Backbone, folder: Path) -> None:
    """A folder that transformers itself and :func:`load_transformers` read. Raises ``ValueError`` where one holds
    anything else."""
    weights, beside_them = "model*.safetensors", ("model.safetensors.index.json", PREPROCESSORS[0])
    require_own(folder, "folder of a backbone", ("config.json", weights), beside_them)
    module: Any = backbone.module
    pixels = {"image_mean": list(backbone.mean), "image_std": list(backbone.std)}
    with new_folder(folder) as beside, _quiet_transformers():
        module.save_pretrained(beside)
        (beside / PREPROCESSORS[0]).write_text(json.dumps(pixels, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- architecture


def transformers_architecture(module: Any) -> dict[str, Any]:
    """``model``, ``config``, ``attention`` and ``arguments`` that build ``module`` again. Raises ``ValueError`` for a
    class that transformers does not hold."""
    import transformers

    kind = type(module)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ValueError(f"{kind.__name__} cannot be described: transformers has no such class of its own")
    options = inspect.signature(kind.__init__).parameters
    arguments: dict[str, bool] = {}
    if "add_pooling_layer" in options:
        arguments["add_pooling_layer"] = getattr(module, "pooler", None) is not None
    if "use_mask_token" in options:
        arguments["use_mask_token"] = has_parameter(module, "mask_token")
    return {
        "model": kind.__name__,
        "config": json.loads(module.config.to_json_string(use_diff=False)),
        "attention": module.config._attn_implementation,
        "arguments": arguments,
    }


def build_transformers(described: Mapping[str, Any]) -> nn.Module:
    """What :func:`transformers_architecture` described, with random weights."""
    ensure_torchvision()
    import transformers

    kind = getattr(transformers, described["model"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{described['model']!r} is no model class of transformers")
    module = kind(kind.config_class.from_dict(described["config"]), **described["arguments"])
    module.set_attn_implementation(described["attention"])
    return module


def transformers_blocks(module: Any) -> tuple[nn.Module, ...]:
    """The modules that transformers itself would not split over devices, outermost ones only."""
    names = set(module._no_split_modules or ())
    found: list[tuple[str, nn.Module]] = []
    for path, part in module.named_modules():
        if type(part).__name__ in names and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, part))
    return tuple(part for _, part in found)
