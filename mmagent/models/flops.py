"""Useful operations of one training step, for an honest share of the peak (MFU).

Counted: matrix products of *active* parameters (the chosen experts, the shared one, the router), attention by the true
lengths of documents and frames (causal: half of the square), the head on supervised rows only, the encoder by its
patches; times three, for a backward costs twice a forward (once where nothing below learns, none where all is frozen).
Not counted, though it takes time: padding, activations computed again, norms, softmax, the optimizer, attention inside
encoders that are no CogViT. A multiplication and an addition are two operations.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from mmagent.balance import CostWeights
from mmagent.models.agent_model import ROLES, AgentModel, AgentModelConfig
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.decoder import DecoderConfig
from mmagent.models.text_tower import TextTowerConfig
from mmagent.ops.shift import shift
from mmagent.types import IGNORE, PackedBatch

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class EncoderCost(NamedTuple):
    """What an encoder does with a patch: ``weights`` that it meets in matrix products, of them ``first`` before which
    nothing learns; operations of attention are ``attention`` times the square of a frame's patches."""

    weights: int
    first: int
    attention: int
    width: int
    merge_size: int

    @staticmethod
    def of(encoder: CogViTConfig | nn.Module) -> EncoderCost:
        """Of a CogViT or its configuration; of other encoders linear and convolutional layers alone are counted."""
        if isinstance(encoder, CogViT):
            encoder = encoder.config
        if isinstance(encoder, CogViTConfig):
            first, attention = encoder.patch_values * encoder.width, 4 * encoder.width * encoder.depth
            return EncoderCost(_encoder_weights(encoder), first, attention, encoder.width, encoder.merge_size)
        return EncoderCost(_matrices(encoder), 0, 0, int(encoder.width), int(encoder.merge_size))  # type: ignore[arg-type]

    def training(self, frames: Sequence[int], learns: bool = True) -> float:
        """Operations of forward and, where it ``learns``, backward over frames of so many patches."""
        forward = sum(frames) * 2 * self.weights + self.attention * sum(n * n for n in frames)
        return 3 * forward - sum(frames) * 2 * self.first if learns else forward  # pixels get no gradient


def head_flops(modules: nn.Module, rows: int) -> float:
    """Operations of forward and backward of the linear layers in ``modules``, each over ``rows`` rows."""
    return 6.0 * rows * _matrices(modules)


def text_flops(config: TextTowerConfig, lengths: Sequence[int]) -> float:
    """Operations of forward and backward of a text tower over captions of these lengths."""
    block = 4 * config.width**2 + 3 * config.width * config.ffn
    pairs = sum(n * (n + 1) // 2 if config.causal else n * n for n in lengths)
    return 3.0 * config.depth * (2 * sum(lengths) * block + 4 * config.width * pairs)


def _matrices(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, _PRODUCTS))


class Flops(NamedTuple):
    """Forward operations by part."""

    encoder: float
    encoder_attention: float
    projector: float
    decoder: float
    decoder_attention: float
    mtp: float
    mtp_attention: float
    head: float

    @property
    def forward(self) -> float:
        return float(sum(self))


def forward_flops(config: AgentModelConfig, batch: PackedBatch, encoder: EncoderCost | None = None) -> Flops:
    """Operations of one forward over ``batch``, loss included. Images that documents share are encoded once.
    ``encoder`` is that of the config unless given."""
    decoder, encoder = config.decoder, encoder or EncoderCost.of(config.vision)
    lengths = batch.segments.lengths[:-1] if batch.tail else batch.segments.lengths
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)  # a token sees itself and what came before it
    if batch.prefix_of is not None:
        whole = batch.segments.lengths
        pairs += sum(n * whole[p] for n, p in zip(lengths, batch.prefix_of, strict=False) if p >= 0)
    frames = () if batch.vision is None else batch.vision.segments.lengths
    attention = 4 * decoder.heads * decoder.head_dim  # scores and weighted values, a pair of tokens
    dense = decoder.layers - decoder.moe_layers
    sparse = decoder.moe_layers > 0
    depths = config.mtp.depths
    return Flops(
        encoder=sum(frames) * 2 * encoder.weights,
        encoder_attention=encoder.attention * sum(n * n for n in frames),
        projector=sum(frames) // encoder.merge_size**2 * 2 * _projector_weights(config, encoder),
        decoder=tokens
        * 2
        * (dense * layer_weights(decoder, sparse=False) + decoder.moe_layers * layer_weights(decoder, sparse=True)),
        decoder_attention=attention * decoder.layers * pairs,
        mtp=tokens * 2 * depths * (2 * decoder.width**2 + layer_weights(decoder, sparse)),
        mtp_attention=attention * depths * pairs,
        head=sum(_targets(batch, depth) for depth in range(1, depths + 2)) * 2 * decoder.width * config.vocab_size,
    )


def model_flops(model: AgentModel, batch: PackedBatch, mtp: bool = True) -> float:
    """:func:`training_flops` of ``model`` as it is frozen now, with the encoder that it has; without its MTP modules
    where they do not take part."""
    parts = {role: part for role in ROLES if (part := getattr(model, role)) is not None}
    frozen = [role for role, part in parts.items() if not any(p.requires_grad for p in part.parameters())]
    config = model.config if mtp else replace(model.config, mtp=replace(model.config.mtp, depths=0))
    return training_flops(config, batch, frozen, EncoderCost.of(model.encoder))


def training_flops(
    config: AgentModelConfig, batch: PackedBatch, frozen: Collection[str] = (), encoder: EncoderCost | None = None
) -> float:
    """Operations of forward and backward. ``frozen``: roles as :meth:`AgentModel.freeze` takes them. ``encoder`` is
    that of the config unless given.

    A frozen encoder costs its forward alone, and so does a frozen projector behind it. A frozen part with something
    that learns below it still passes gradients through: twice a forward.
    """
    encoder = encoder or EncoderCost.of(config.vision)
    flops = forward_flops(config, batch, encoder)
    learns = {role: role not in frozen for role in ROLES}

    def factor(role: str, below: bool) -> int:
        return 1 + learns[role] + below

    below_projector = learns["encoder"]
    below_decoder = below_projector or learns["projector"] or learns["embedding"]
    below_head = below_decoder or learns["decoder"]
    frames = () if batch.vision is None else batch.vision.segments.lengths
    total = encoder.training(frames, learns["encoder"])
    total += flops.projector * factor("projector", below_projector)
    total += flops.decoder * factor("decoder", below_decoder)
    total += flops.decoder_attention * (3 if below_head else 1)
    total += flops.mtp * factor("mtp", below_head)
    total += flops.mtp_attention * (3 if below_head or learns["mtp"] else 1)
    return total + flops.head * factor("head", below_head or learns["mtp"])


def cost_weights(
    config: AgentModelConfig,
    frozen: Collection[str] = (),
    recompute: Collection[str] = (),
    encoder: EncoderCost | None = None,
) -> CostWeights:
    """What a pack costs in operations, by its four terms: :func:`training_flops`, and one more forward of the roles in
    ``recompute`` (no useful work, but a rank waits for it). Every token counts as supervised, for what is learnt of a
    pack is not known before it is made; that adds the same to packs that are equally full.

    The projector works on visual tokens, so it is counted with patches.
    """
    encoder, decoder = encoder or EncoderCost.of(config.vision), config.decoder
    learns = {role: role not in frozen for role in ROLES}
    again = {role: int(role in recompute) for role in ROLES}
    below_decoder = learns["encoder"] or learns["projector"] or learns["embedding"]
    below_head = below_decoder or learns["decoder"]
    below_mtp = below_head or learns["mtp"]
    encodings = 3 + again["encoder"] if learns["encoder"] else 1
    attention = 3 + again["decoder"] if below_head else 1
    mtp_attention = 3 + again["mtp"] if below_mtp else 1
    decoder_passes = 1 + learns["decoder"] + below_decoder + again["decoder"] * below_head
    mtp_passes = 1 + learns["mtp"] + below_head + again["mtp"] * below_mtp
    sparse, depths = decoder.moe_layers, config.mtp.depths
    layers = (decoder.layers - sparse) * layer_weights(decoder, sparse=False) + sparse * layer_weights(decoder, True)
    mtp = depths * (2 * decoder.width**2 + layer_weights(decoder, sparse > 0))
    head = (depths + 1) * decoder.width * config.vocab_size * (1 + learns["head"] + below_mtp)
    projector = _projector_weights(config, encoder) * (1 + learns["projector"] + learns["encoder"])
    pairs = 4 * decoder.heads * decoder.head_dim / 2  # causal: a token sees half of its document
    return CostWeights(
        patches_squared=encoder.attention * encodings,
        patches=2 * (encoder.weights * encodings - encoder.first * learns["encoder"])
        + 2 * projector / encoder.merge_size**2,
        tokens_squared=pairs * (decoder.layers * attention + depths * mtp_attention),
        tokens=2 * (layers * decoder_passes + mtp * mtp_passes + head),
    )


def layer_weights(config: DecoderConfig, sparse: bool) -> int:
    """Weights of one layer that a token meets in matrix products."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = config.width * (2 * queries + 2 * keys)
    if not sparse:
        return attention + 3 * config.width * config.ffn
    moe = config.moe
    return attention + config.width * (3 * moe.ffn * (moe.top_k + moe.shared) + moe.experts)


def _encoder_weights(config: CogViTConfig) -> int:
    matrices = 3 if config.mlp == "swiglu" else 2
    return config.patch_values * config.width + config.depth * (
        4 * config.width**2 + matrices * config.width * config.ffn
    )


def _projector_weights(config: AgentModelConfig, encoder: EncoderCost) -> int:
    width, ffn = config.decoder.width, config.projector.ffn
    if config.projector.merge == "average":
        return encoder.width * ffn + ffn * width
    return encoder.merge_size**2 * encoder.width * width + width**2 + 3 * width * ffn


def _targets(batch: PackedBatch, depth: int) -> int:
    return int((shift(batch.labels, depth, batch.segments) != IGNORE).sum())
