"""Vision towers of the GLM-V family on disk: taken out of a released checkpoint, and written as a folder of their own.

Only the tower's tensors are read, shard by shard, whatever the size of the language model beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmagent.files import new_folder, require_own
from mmagent.geometry import GeometryConfig
from mmagent.interop.glm_vision import TOWERS, vision_adapter, vision_configs
from mmagent.interop.processor_files import PREPROCESSOR, image_processor, read_geometry
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.projector import Projector, ProjectorConfig
from mmagent.ops.state import save_weights
from mmagent.ops.tensor_files import INDEX, WEIGHTS, Stored, TensorFiles, WeightsError, read_index
from mmagent.ops.torchvision_shim import ensure_torchvision

PREFIXES = ("model.visual.", "visual.", "")
"""What the tower's tensors begin with in a whole model, in older ones, and in a folder of the tower alone."""


class Tower(nn.Module):
    """An encoder and the merger behind it, with the geometry of its images."""

    def __init__(self, encoder: CogViT, projector: Projector, geometry: GeometryConfig):
        super().__init__()
        self.encoder, self.projector, self.geometry = encoder, projector, geometry


def load_tower(source: str | Path) -> Tower:
    """The tower of a folder or hub id of ``glm_ocr``, ``glm5_next``, ``glm4v`` or ``glm4v_moe``, or of a tower alone;
    in evaluation mode on the CPU, in float32.

    Raises ``ValueError`` for another kind of model, and naming tensors that are missing, unknown, misshapen or not
    finite.
    """
    ensure_torchvision()
    from transformers import AutoConfig
    from transformers.utils import cached_file

    raw = json.loads(Path(cached_file(str(source), "config.json")).read_text(encoding="utf-8"))
    if raw.get("model_type") in TOWERS:  # a tower's own type is not registered with AutoConfig
        theirs = _tower_class(raw["model_type"])[0](**raw)
    else:
        theirs = getattr(AutoConfig.from_pretrained(str(source)), "vision_config", None)
        if theirs is None:
            raise ValueError(f"{source} is a {raw.get('model_type')!r} model without a vision tower")
    vision, projector = vision_configs(theirs)
    geometry = read_geometry(source, vision)
    width = theirs.out_hidden_size
    tower = Tower(CogViT(vision), Projector(projector, vision.width, vision.merge_size, width), geometry)
    vision_adapter(vision, projector, width).load(tower, _tensors(str(source)))
    return tower.eval()


def _tensors(source: str) -> dict[str, Tensor]:
    """The tower's tensors in float32, under the names they have in a tower alone. Of a hub id only the files that hold
    some are fetched."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        with TensorFiles(source) as files:
            return _of_tower(files, _prefix(files))
    index = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
    if not index:
        with TensorFiles(cached_file(source, WEIGHTS)) as files:
            return _of_tower(files, _prefix(files))
    places = read_index(Path(index))
    prefix, tensors = _prefix(places), {}
    for shard in sorted({file for name, file in places.items() if name.startswith(prefix)}):
        with TensorFiles(cached_file(source, shard)) as files:
            if lost := [name for name, file in places.items() if file == shard and name not in files]:
                raise WeightsError(f"{lost[0]} is not in {shard} of {source}, where {INDEX} says")
            tensors |= _of_tower({name: files[name] for name in files if places.get(name) == shard}, prefix)
    return tensors


def _prefix(names: Iterable[str]) -> str:
    names = list(names)
    return next(prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names))


def _of_tower(files: Mapping[str, Stored], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in files.items():
        if name.startswith(prefix):
            if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
                raise WeightsError(f"{name} in {entry.place} is {entry.dtype}, no plain floating point")
            tensor = entry.whole()
            entry.require_finite(tensor)
            tensors[name.removeprefix(prefix)] = tensor.float()
    return tensors


def save_tower(folder: Path | str, tower: Tower) -> str:
    """Write a folder that the stock class of transformers reads with ``from_pretrained``; returns that class's name.

    Raises ``ValueError`` where no stock class has this architecture, and for a folder that holds anything but a tower.
    """
    require_own(Path(folder), "folder of a tower", ("config.json", WEIGHTS), (PREPROCESSOR,))
    ensure_torchvision()
    encoder, projector, geometry = tower.encoder, tower.projector, tower.geometry
    width = (projector.down if projector.average else projector.project).out_features
    inner = (projector.down if projector.average else projector.ffn.down).in_features
    sizes = ProjectorConfig(inner, encoder.config.swiglu_limit, "average" if projector.average else "linear")
    kind = _kind(encoder.config, sizes, width)
    config_class, model_class = _tower_class(kind)
    theirs = config_class(**tower_config(encoder.config, sizes, width, kind))
    assert vision_configs(theirs) == (comparable(encoder.config), sizes), "the config does not come back"
    state = vision_adapter(encoder.config, sizes, width).to_theirs(tower.state_dict())
    with new_folder(Path(folder)) as beside:
        save_weights(state, beside / "model.safetensors")
        theirs.architectures = [model_class.__name__]
        theirs.save_pretrained(beside)
        (beside / PREPROCESSOR).write_text(json.dumps(image_processor(geometry), indent=1) + "\n", encoding="utf-8")
    return model_class.__name__


def new_merger(encoder: CogViT, width: int) -> Projector:
    """A merger that has learnt nothing, of the sizes that ``glm_ocr`` gives one into ``width``."""
    return Projector(ProjectorConfig(3 * width, encoder.config.swiglu_limit), encoder.width, encoder.merge_size, width)


def comparable(config: CogViTConfig) -> CogViTConfig:
    """Without what a tower of theirs does not know: how images are summed up, and the mask token."""
    plain = CogViTConfig()
    return replace(config, pooling=plain.pooling, mask_token=plain.mask_token)


def _kind(vision: CogViTConfig, projector: ProjectorConfig, width: int) -> str:
    if projector.merge != "linear" or vision.mlp != "swiglu" or vision.temporal_patch != 2:
        raise ValueError("no tower of the GLM-V family has this merger, mlp or temporal_patch")
    old = (vision.embedding_norm, bool(vision.position_table), vision.qk_norm)
    if old == (True, True, False) and vision.ffn == width:
        return "glm4v_moe_vision"
    if old == (False, False, True):
        if vision.swiglu_limit:
            return "glm5_next_vision"
        if projector.ffn == 3 * width:
            return "glm_ocr_vision"
    if vision.position_table and vision.qk_norm:
        raise ValueError(
            "no tower of the GLM-V family has both a position table and query-key norms, as the laptop preset does: "
            "train the encoder with vision.position_table=0"
        )
    raise ValueError(
        f"no tower of the GLM-V family has embedding_norm {vision.embedding_norm}, position_table "
        f"{vision.position_table}, qk_norm {vision.qk_norm}, ffn {vision.ffn} and a "
        f"merger of {projector.ffn} into {width}"
    )


def tower_config(vision: CogViTConfig, projector: ProjectorConfig, width: int, kind: str) -> dict[str, Any]:
    """Their config of a tower of ``kind`` with a merger into ``width``, as far as it can be told in their words."""
    theirs: dict[str, Any] = {
        "hidden_size": vision.width, "depth": vision.depth, "num_heads": vision.heads, "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch, "spatial_merge_size": vision.merge_size,
        "rms_norm_eps": vision.norm_eps, "attention_bias": vision.bias, "out_hidden_size": width,
        "intermediate_size": vision.ffn, "rope_parameters": {"rope_theta": vision.rope_base, "rope_type": "axial"},
    }  # fmt: skip
    if kind == "glm4v_moe_vision":
        theirs |= {"intermediate_size": projector.ffn, "image_size": vision.position_table * vision.patch_size}
    if kind == "glm5_next_vision":
        theirs |= {"projection_intermediate_size": projector.ffn, "swiglu_limit": vision.swiglu_limit}
    return theirs


def _tower_class(kind: str) -> tuple[Any, Any]:
    """Config and model class of a tower of theirs."""
    if kind == "glm_ocr_vision":
        from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionConfig, GlmOcrVisionModel

        return GlmOcrVisionConfig, GlmOcrVisionModel
    if kind == "glm5_next_vision":
        from transformers.models.glm5_next.modeling_glm5_next import Glm5NextVisionConfig, Glm5NextVisionModel

        return Glm5NextVisionConfig, Glm5NextVisionModel
    if kind == "glm4v_vision":
        from transformers.models.glm4v.modeling_glm4v import Glm4vVisionConfig, Glm4vVisionModel

        return Glm4vVisionConfig, Glm4vVisionModel
    from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionConfig, Glm4vMoeVisionModel

    return Glm4vMoeVisionConfig, Glm4vMoeVisionModel
