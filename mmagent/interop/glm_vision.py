"""Vision towers of the GLM-V family in transformers, and CogViT with its projector.

``glm_ocr`` and ``glm5_next`` (the 403M tower), and ``glm4v_moe`` / ``glm4v`` (the older tower of GLM-4.1V and GLM-4.5V:
learned positions, a norm after the patch embedding, no biases and no query-key norm).
"""

from __future__ import annotations

from typing import Any

from mmagent.interop.weights import Adapter, Rule, rename, stack
from mmagent.models.cogvit import CogViTConfig
from mmagent.models.projector import ProjectorConfig

TOWERS = ("glm_ocr_vision", "glm5_next_vision", "glm4v_moe_vision", "glm4v_vision")


def vision_configs(theirs: Any) -> tuple[CogViTConfig, ProjectorConfig]:
    """Our configs of a tower of theirs. Raises ``ValueError`` for a family or an option that is not ours."""
    kind = theirs.model_type
    if kind not in TOWERS:
        raise ValueError(f"vision tower {kind!r} is not one of {', '.join(TOWERS)}")
    if theirs.hidden_act != "silu" or theirs.attention_dropout:
        raise ValueError(
            f"{kind}: hidden_act {theirs.hidden_act!r} and dropout {theirs.attention_dropout} are not ours"
        )
    old = kind.startswith("glm4v")
    limit = float(getattr(theirs, "swiglu_limit", 0.0))
    vision = CogViTConfig(
        width=theirs.hidden_size,
        depth=theirs.depth,
        heads=theirs.num_heads,
        ffn=theirs.out_hidden_size if old else theirs.intermediate_size,
        patch_size=theirs.patch_size,
        temporal_patch=theirs.temporal_patch_size,
        merge_size=theirs.spatial_merge_size,
        norm_eps=theirs.rms_norm_eps,
        rope_base=theirs.rope_parameters["rope_theta"],
        bias=theirs.attention_bias,
        qk_norm=not old,
        swiglu_limit=limit,
        embedding_norm=old,
        position_table=theirs.image_size // theirs.patch_size if old else 0,
    )
    inner = {"glm_ocr_vision": theirs.out_hidden_size * theirs.in_channels}.get(kind, theirs.intermediate_size)
    return vision, ProjectorConfig(ffn=getattr(theirs, "projection_intermediate_size", inner), swiglu_limit=limit)


def vision_rules(
    vision: CogViTConfig,
    projector: ProjectorConfig,
    decoder_width: int,
    encoder_prefix: str = "encoder",
    projector_prefix: str = "projector",
    theirs: str = "",
) -> list[Rule]:
    """Rules between our encoder and projector, under their prefixes, and a tower whose names start with ``theirs``.

    Raises ``ValueError`` for an encoder or a projector that no tower of theirs has.
    """
    if vision.mlp != "swiglu" or projector.merge != "linear" or vision.temporal_patch != 2:
        raise ValueError(
            f"no tower of the GLM-V family has mlp {vision.mlp!r}, merge {projector.merge!r} and "
            f"temporal_patch {vision.temporal_patch}: it has swiglu, linear and 2"
        )
    width, merge = vision.width, vision.merge_size
    e, p = encoder_prefix, projector_prefix
    both = ("weight", "bias") if vision.bias else ("weight",)
    patch = (width, 3, vision.temporal_patch, vision.patch_size, vision.patch_size)
    rules = [
        Rule(f"{e}.embed.weight", (f"{theirs}patch_embed.proj.weight",), permute=(0, 1, 2, 3, 4), their_shape=patch),
        *rename(f"{e}.embed", f"{theirs}patch_embed.proj", ("bias",)),
        *rename(f"{e}.norm", f"{theirs}post_layernorm"),
        Rule(
            f"{p}.merge.weight",
            (f"{theirs}downsample.weight",),
            permute=(0, 2, 3, 1),  # a window of patches, row by row, each with all its channels
            their_shape=(decoder_width, width, merge, merge),
        ),
        *rename(f"{p}.merge", f"{theirs}downsample", ("bias",)),
        *rename(f"{p}.project", f"{theirs}merger.proj"),
        *rename(f"{p}.norm", f"{theirs}merger.post_projection_norm", ("weight", "bias")),
        *stack(
            f"{p}.ffn.gate_up",
            (f"{theirs}merger.gate_proj", f"{theirs}merger.up_proj"),
            (projector.ffn, projector.ffn),
        ),
        *rename(f"{p}.ffn.down", f"{theirs}merger.down_proj"),
    ]
    if vision.embedding_norm:
        rules += rename(f"{e}.embed_norm", f"{theirs}post_conv_layernorm")
    if vision.position_table:
        rules += rename(f"{e}.positions", f"{theirs}embeddings.position_embedding")
    for n in range(vision.depth):
        ours, block = f"{e}.blocks.{n}", f"{theirs}blocks.{n}"
        rules += rename(f"{ours}.attention_norm", f"{block}.norm1") + rename(f"{ours}.ffn_norm", f"{block}.norm2")
        rules += rename(f"{ours}.attention.qkv", f"{block}.attn.qkv", both)
        rules += rename(f"{ours}.attention.out", f"{block}.attn.proj", both)
        if vision.qk_norm:
            rules += rename(f"{ours}.attention.q_norm", f"{block}.attn.q_norm")
            rules += rename(f"{ours}.attention.k_norm", f"{block}.attn.k_norm")
        halves = (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
        rules += stack(f"{ours}.ffn.gate_up", halves, (vision.ffn, vision.ffn), both)
        rules += rename(f"{ours}.ffn.down", f"{block}.mlp.down_proj", both)
    return rules


def vision_adapter(vision: CogViTConfig, projector: ProjectorConfig, decoder_width: int, theirs: str = "") -> Adapter:
    """For a module with children ``encoder`` and ``projector`` (an AgentModel), and a tower alone."""
    return Adapter(vision_rules(vision, projector, decoder_width, theirs=theirs))
