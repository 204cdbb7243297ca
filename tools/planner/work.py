"""What one micro-batch computes: a model by its kinds of layers, a pack by its lengths, and operations of both.

:mod:`mmagent.models.flops` counts operations of our models, and these counts equal its own (by test); here they stand
layer kind by layer kind, because kinds differ in how fast they run, and for published models that we do not have.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import NormalDist

from mmagent.models.agent_model import AgentModelConfig
from mmagent.models.decoder import DecoderConfig
from mmagent.models.flops import layer_weights
from mmagent.ops.cross_entropy import HELD_BYTES


@dataclass(frozen=True)
class Layer:
    """One kind of layer; weights are those of one layer, ``times`` how often a micro-batch passes such a layer.

    ``attention``: its projections. ``dense``: what every token meets besides (FFN, shared experts, router). ``chosen``:
    of the experts that a token chooses; ``experts``: of all routed ones. ``queries`` and ``keys``: values a token has
    of each; ``pair``: operations a pair of tokens costs. ``inner`` and ``expert_inner``: inner widths, ``top_k`` and
    ``routes``: experts a token, and in all. ``other``: parameters in no matrix product. ``stored``: copies there are.
    """

    role: str
    times: int
    stored: int
    width: int
    attention: int
    dense: int
    chosen: int
    experts: int
    queries: int
    keys: int
    pair: int
    inner: int
    expert_inner: int = 0
    top_k: int = 0
    routes: int = 0
    other: int = 0
    causal: bool = True
    joined: int = 0  # weights of the projection that joins hidden state and embedding in an MTP module

    @property
    def active(self) -> int:
        """Weights that a token meets in matrix products."""
        return self.attention + self.dense + self.chosen + self.joined

    @property
    def parameters(self) -> int:
        return self.attention + self.dense + self.experts + self.joined + self.other


@dataclass(frozen=True)
class Model:
    """``layers`` of all kinds, encoder included. ``embedding`` counts parameters of the table, ``head`` weights of the
    output matrix, used ``terms`` times a token (next token, MTP depths). ``patch``: weights that a patch meets outside
    layers, ``visual``: those that a visual token meets in the projector, ``merge`` patches each. ``root``: parameters
    of neither layers nor tables."""

    name: str
    layers: tuple[Layer, ...]
    width: int
    vocabulary: int
    embedding: int
    head: int
    terms: int = 1
    patch: int = 0
    visual: int = 0
    merge: int = 4
    root: int = 0

    @property
    def parameters(self) -> int:
        return sum(layer.stored * layer.parameters for layer in self.layers) + self.embedding + self.head + self.root

    @property
    def active(self) -> int:
        """Weights that a text token meets, head included: the N of ``6 N`` operations."""
        return sum(layer.times * layer.active for layer in self.layers if layer.role == "decoder") + self.head


def decoder_layers(config: DecoderConfig) -> list[Layer]:
    """Dense layers, then sparse ones; kinds that there are none of are left out."""
    found = []
    for sparse, times in ((False, config.layers - config.moe_layers), (True, config.moe_layers)):
        if times:
            found.append(_decoder_layer(config, sparse, "decoder", times, times))
    return found


def _decoder_layer(config: DecoderConfig, sparse: bool, role: str, times: int, stored: int) -> Layer:
    queries, keys, moe = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.moe
    attention = config.width * (2 * queries + 2 * keys)
    chosen = 3 * config.width * moe.ffn * moe.top_k if sparse else 0
    norms = 2 * config.width * (2 if config.sandwich_norm else 1) + 2 * config.head_dim * config.qk_norm
    return Layer(
        role=role,
        times=times,
        stored=stored,
        width=config.width,
        attention=attention,
        dense=layer_weights(config, sparse) - attention - chosen,
        chosen=chosen,
        experts=3 * config.width * moe.ffn * moe.experts if sparse else 0,
        queries=queries,
        keys=keys,
        pair=4 * queries,
        inner=moe.shared * moe.ffn if sparse else config.ffn,
        expert_inner=moe.ffn if sparse else 0,
        top_k=moe.top_k if sparse else 0,
        routes=moe.experts if sparse else 0,
        other=norms + (queries + 2 * keys) * config.qkv_bias,
    )


def model_of(name: str, config: AgentModelConfig) -> Model:
    """One of our models; its parameters equal those of the real one, by test."""
    decoder, vision, mtp = config.decoder, config.vision, config.mtp
    layers, width = decoder_layers(decoder), decoder.width
    if mtp.depths:
        block = _decoder_layer(decoder, decoder.moe_layers > 0, "mtp", mtp.depths, mtp.modules)
        extra = {"joined": 2 * width * width, "other": block.other + 3 * width}
        layers.append(Layer(**(vars(block) | extra)))
    layers.append(_encoder_layer(config))
    linear = config.projector.merge == "linear"
    merged = vision.width * vision.merge_size**2
    if linear:
        visual = merged * width + width**2 + 3 * width * config.projector.ffn
        projector = visual + 3 * width
    else:
        visual = vision.width * config.projector.ffn + config.projector.ffn * width
        projector = visual + 2 * vision.width + config.projector.ffn + width
    patch = vision.patch_values * vision.width
    alone = vision.width * (2 + vision.embedding_norm + vision.mask_token + vision.position_table**2)
    pool = 0
    if vision.pooling == "attention":
        pool = vision.width * (3 * vision.width + 5 + 3 * vision.ffn) + 2 * vision.ffn + vision.width
    table = config.vocab_size * width
    return Model(
        name=name,
        layers=tuple(layers),
        width=width,
        vocabulary=config.vocab_size,
        embedding=table,
        head=0 if decoder.tied_head else table,
        terms=1 + mtp.depths,
        patch=patch,
        visual=visual,
        merge=vision.merge_size**2,
        root=patch + alone + pool + projector + width,
    )


def _encoder_layer(config: AgentModelConfig) -> Layer:
    vision = config.vision
    width, matrices = vision.width, 3 if vision.mlp == "swiglu" else 2
    biases = (4 * width + (matrices - 1) * vision.ffn + width) * vision.bias
    return Layer(
        role="encoder",
        times=vision.depth,
        stored=vision.depth,
        width=width,
        attention=4 * width * width,
        dense=matrices * width * vision.ffn,
        chosen=0,
        experts=0,
        queries=width,
        keys=width,
        pair=4 * width,
        inner=vision.ffn,
        other=2 * width + 2 * (width // vision.heads) * vision.qk_norm + biases,
        causal=False,
    )


@dataclass(frozen=True)
class Load:
    """One micro-batch: lengths of its documents, patches of its frames, and the share of its tokens with a target."""

    lengths: tuple[int, ...]
    frames: tuple[int, ...] = ()
    supervised: float = 1.0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def patches(self) -> int:
        return sum(self.frames)

    @property
    def pairs(self) -> float:
        """Of tokens that see one another: each sees itself and what came before it in its document."""
        return sum(n * (n + 1) / 2 for n in self.lengths)

    @property
    def frame_pairs(self) -> float:
        return float(sum(n * n for n in self.frames))

    def resized(self, factor: float) -> Load:
        """The same mix of documents and frames in ``factor`` times as many tokens and patches (at least one token)."""
        tokens, count = max(round(self.tokens * factor), 1), max(round(len(self.lengths) * factor), 1)
        weights = [float(sorted(self.lengths)[int((n + 0.5) * len(self.lengths) / count)]) for n in range(count)]
        patches = round(self.patches * factor)
        frames = _even(patches, max(self.frames)) if patches else ()
        return Load(_shares(tokens, weights), frames, self.supervised)

    @staticmethod
    def of(
        tokens: int, mean: int, spread: float = 0.0, patches: int = 0, frame: int = 0, supervised: float = 1.0
    ) -> Load:
        """``tokens`` in documents of ``mean`` length whose logarithm has the standard deviation ``spread`` (quantiles:
        nothing is drawn), and ``patches`` in frames of ``frame`` each."""
        if tokens < 1 or mean < 1:
            raise ValueError(f"a micro-batch of {tokens} tokens in documents of {mean}: both must be at least 1")
        if patches and not frame:
            raise ValueError(f"{patches} patches need the size of a frame")
        lengths = quantiles(max(round(tokens / mean), 1), spread)
        return Load(_shares(tokens, lengths), _even(patches, frame) if patches else (), supervised)


def quantiles(count: int, spread: float) -> list[float]:
    """``count`` equally likely values of a log-normal distribution of median 1, in order."""
    normal = NormalDist()
    return [math.exp(spread * normal.inv_cdf((n + 0.5) / count)) for n in range(count)]


def _shares(total: int, weights: list[float]) -> tuple[int, ...]:
    """Whole numbers that add up to ``total``, each at least 1, as near to ``weights`` as can be."""
    scale, cut, out = total / sum(weights), 0.0, []
    for weight in weights:
        cut += weight * scale
        out.append(max(round(cut) - sum(out), 1))
    out[-1] += total - sum(out)
    return tuple(out) if out[-1] > 0 else (total,)


def _even(total: int, size: int) -> tuple[int, ...]:
    return (size,) * (total // size) + ((total % size,) if total % size else ())


@dataclass(frozen=True)
class Passes:
    """How often a part is computed: ``useful`` (forward, gradients of inputs and of weights) and ``again`` (recomputed
    in the backward). ``attention`` has no weights, but gradients of both of its inputs."""

    useful: int
    attention: int
    again: int


def passes(frozen: Collection[str] = (), recompute: Collection[str] = ()) -> dict[str, Passes]:
    """Of every role, as :func:`mmagent.models.flops.training_flops` counts the useful ones."""
    learns = {role: role not in frozen for role in ("encoder", "projector", "embedding", "decoder", "mtp", "head")}
    below_decoder = learns["encoder"] or learns["projector"] or learns["embedding"]
    below = {
        "encoder": learns["encoder"],
        "projector": learns["encoder"],
        "decoder": below_decoder,
        "mtp": below_decoder or learns["decoder"],
        "head": below_decoder or learns["decoder"] or learns["mtp"],
    }
    found = {}
    for role, under in below.items():
        useful = 1 + learns[role] + under
        graph = learns[role] or under
        found[role] = Passes(useful, 3 if graph else 1, int(graph and role in recompute))
    return found


@dataclass(frozen=True)
class Operations:
    """Of one micro-batch, forward only, by what runs them and by role."""

    dense: dict[str, float] = field(default_factory=dict)
    experts: dict[str, float] = field(default_factory=dict)
    attention: dict[str, float] = field(default_factory=dict)

    @property
    def forward(self) -> float:
        return float(sum(sum(part.values()) for part in (self.dense, self.experts, self.attention)))

    def training(self, times: dict[str, Passes], pixels: float = 0.0) -> float:
        """Useful operations of a step; ``pixels``: those of a gradient that nobody needs."""
        products = sum(times[role].useful * ops for part in (self.dense, self.experts) for role, ops in part.items())
        return products + sum(times[role].attention * ops for role, ops in self.attention.items()) - pixels


def operations(model: Model, load: Load) -> Operations:
    """Forward operations of one micro-batch; a multiplication and an addition are two."""
    found = Operations()
    for layer in model.layers:
        vision = layer.role == "encoder"
        rows, pairs = (load.patches, load.frame_pairs) if vision else (load.tokens, load.pairs)
        for part, ops in (
            (found.dense, 2.0 * rows * (layer.attention + layer.dense + layer.joined)),
            (found.experts, 2.0 * rows * layer.chosen),
            (found.attention, pairs * layer.pair),
        ):
            part[layer.role] = part.get(layer.role, 0.0) + layer.times * ops
    found.dense["encoder"] = found.dense.get("encoder", 0.0) + 2.0 * load.patches * model.patch
    found.dense["projector"] = 2.0 * (load.patches // model.merge) * model.visual
    targets = sum(max(load.tokens - depth * len(load.lengths), 0) for depth in range(1, model.terms + 1))
    found.dense["head"] = 2.0 * load.supervised * targets * model.width * model.vocabulary
    return found


def head_passes(model: Model, useful: int, element: int) -> float:
    """Products a target costs in the head: terms whose gradients are not held form their logits twice
    (:mod:`mmagent.ops.cross_entropy`)."""
    held = min(model.terms, max(1, HELD_BYTES // (model.vocabulary * model.width * element)))
    return useful + (model.terms - held) / model.terms if useful > 1 else useful
