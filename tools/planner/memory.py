"""Bytes that one rank holds at its fullest moment, by role: parameters, gradients, optimizer, what is gathered, what
the backward keeps, and buffers.

State follows the engines: float32 parameters and gradients, two float32 moments for AdamW's, one for Muon's; FSDP2 cuts
every parameter along its first dimension (experts along the first that divides), gathers a block at a time in
bfloat16 and reduces gradients in float32, after every micro-batch. What autograd keeps is counted layer by layer as the
library's own operations save it (``ctx.save_for_backward`` of mmagent.ops), with a flash kernel's query, key, value
and result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmagent.models.agent_model import AgentModelConfig
from mmagent.ops.cross_entropy import CHUNK_VALUES, HELD_BYTES
from tools.planner.inventory import Weight
from tools.planner.mesh import Mesh
from tools.planner.work import Load

CONTEXT_BYTES = 1.5 * 2**30
"""Of the driver, its libraries and the communicator's buffers: an allowance, not measured here."""

FRAGMENTATION = 0.06
"""Of what comes and goes within a step, lost between blocks of the allocator: an allowance, not measured here."""

GRADIENTS = 0.25
"""Gradients that the backward of a layer holds at one time, over what the layer keeps: as measured, with a margin."""

BUCKET = 1 << 28
"""Elements that :class:`mmagent.engine.zero_engine.ZeroEngine` lets DeepSpeed reduce together, in float32."""


@dataclass(frozen=True)
class Settings:
    """How a rank trains, beside its mesh. ``dtype`` as the engines name it; ``accumulation`` micro-batches a step;
    ``recompute``, ``offload`` and ``chunk_patches`` are those of :class:`~mmagent.models.memory.MemoryConfig`; ``hot``:
    rows of the fullest rank's experts over the mean."""

    dtype: str = "bfloat16"
    recompute: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    muon: bool = True
    accumulation: int = 1
    offload: frozenset[str] = frozenset()
    chunk_patches: int = 0
    hot: float = 1.0

    @property
    def low(self) -> int:
        """Bytes of a value in matrix products."""
        return 2 if self.dtype == "bfloat16" else 4

    def chunked(self, patches: int) -> frozenset[str]:
        """Roles that are computed again because images pass in chunks."""
        away = "encoder" in self.offload
        return frozenset({"encoder", "projector"} if 0 < self.chunk_patches < patches and not away else ())


KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered": "gathered blocks",
    "reducing": "gradients on their way",
    "copies": "16-bit copies of parameters",
    "kept": "kept for the backward",
    "working": "at work (a layer, logits, or the optimizer's matrices)",
    "batch": "this micro-batch and the next",
    "fragmentation": "fragmentation (allowed)",
    "context": "driver and communicator (allowed)",
}
"""What memory is taken by, in the order and the words of a report."""


@dataclass
class Memory:
    """``moments``: bytes by kind (those of :data:`KINDS`) at each moment of a step that may be the fullest.
    ``state``: parameters, gradients and optimizer between backward and step. ``roles``: state, and what the
    backward keeps, by role."""

    state: dict[str, float]
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    roles: dict[str, float] = field(default_factory=dict)

    @property
    def fullest(self) -> str:
        """The moment at which most is held."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> float:
        return sum(self.moments[self.fullest].values())

    def kinds(self) -> dict[str, float]:
        """For people: what is held at the fullest moment."""
        held = self.moments[self.fullest]
        return {words: held[kind] for kind, words in KINDS.items() if held.get(kind)}


def local_size(weight: Weight, mesh: Mesh) -> int:
    """Elements that rank 0 holds of one such parameter: no rank holds more."""
    shape, expert = list(weight.shape), weight.expert and mesh.expert > 1
    if expert:
        shape[0] //= mesh.expert
    if not mesh.sharded:
        return math.prod(shape)
    if mesh.deepspeed:
        return -(-math.prod(shape) // mesh.share)
    ranks = mesh.share // mesh.expert if expert else mesh.share
    cut = next((dim for dim, n in enumerate(shape) if n % ranks == 0), 0) if expert else 0
    shape[cut] = -(-shape[cut] // ranks)
    return math.prod(shape)


def state(weights: Sequence[Weight], mesh: Mesh, settings: Settings) -> dict[str, dict[str, float]]:
    """By role, bytes of parameters, gradients and optimizer of rank 0, after a step in which everything not frozen
    had a gradient."""
    roles: dict[str, dict[str, float]] = {}
    for weight in weights:
        learns = weight.role not in settings.frozen
        sizes = _state_bytes(weight, local_size(weight, mesh), mesh, settings)
        held = roles.setdefault(weight.role, dict.fromkeys(("parameters", "gradients", "optimizer"), 0.0))
        for kind, size in zip(held, sizes, strict=True):
            held[kind] += weight.count * size * (learns or kind == "parameters")
    return roles


def _state_bytes(weight: Weight, size: int, mesh: Mesh, settings: Settings) -> tuple[float, float, float]:
    """Of one parameter: itself, its gradient and its optimizer's state."""
    muon = weight.muon and settings.muon
    moments = 4 * size if muon else 8 * size + 4  # AdamW counts its steps in a float of its own
    if not mesh.deepspeed:
        return 4 * size, 4 * size, moments
    part = weight.size / mesh.ranks  # ZeRO keeps its part of float32 parameters a second time, to step on
    gradients = 4 * (weight.size if mesh.parallel == "zero1" else part)
    return 4 * (size + part), gradients, (4 if muon else 8) * part


@dataclass
class Moving:
    """Bytes that come and go while blocks are computed. ``root``: gathered from forward to backward; ``blocks``:
    the one at work and the next, on its way; ``reducing``: a block's gradients and what is sent of them;
    ``root_reducing``: the same of the root; ``copies``: parameters in 16 bits by role."""

    root: float = 0.0
    blocks: float = 0.0
    reducing: float = 0.0
    root_reducing: float = 0.0
    copies: dict[str, float] = field(default_factory=dict)


def moving(weights: Sequence[Weight], mesh: Mesh, settings: Settings) -> Moving:
    """What is gathered, reduced and copied beside the state."""
    found, low = Moving(), settings.low
    units = _units(weights, mesh, settings)
    root = units.pop("root", _Unit())
    learning = root.gradients + sum(unit.gradients * unit.count for unit in units.values())
    if mesh.sharded:
        found.root = root.gathered
        found.blocks = 2 * max((unit.gathered for unit in units.values()), default=0.0)
        found.reducing = (low + 4) * max((unit.gradients for unit in units.values()), default=0.0)
        found.root_reducing = (low + 4) * root.gradients
    elif low == 2:
        for weight in weights:  # tables are looked up, or multiplied chunk by chunk
            if len(weight.shape) > 1 and weight.role not in ("embedding", "head"):
                again = weight.role in settings.recompute
                if not (again and weight.expert):  # autocast keeps its casts until the forward ends, but not of experts
                    size = 2.0 * weight.count * local_size(weight, mesh)
                    found.copies[weight.role] = found.copies.get(weight.role, 0.0) + size
    if mesh.deepspeed:
        found.reducing = found.root_reducing = min(BUCKET, learning) * 2.0 * 4
    return found


@dataclass
class _Unit:
    """``gathered`` bytes, elements of ``gradients``, and how often the unit occurs."""

    gathered: float = 0.0
    gradients: float = 0.0
    count: int = 1


def _units(weights: Sequence[Weight], mesh: Mesh, settings: Settings) -> dict[str, _Unit]:
    found: dict[str, _Unit] = {}
    for weight in weights:
        expert = weight.expert and mesh.expert > 1
        name = f"{weight.unit}.experts" if expert else weight.unit
        if settings.chunk_patches and weight.role == "encoder":
            name = "root"  # ranks may have unequal numbers of chunks
        unit = found.setdefault(name, _Unit(count=1 if name == "root" else weight.count))
        size = weight.size // mesh.expert if expert else weight.size
        times = weight.count if name == "root" else 1
        unit.gathered += times * size * (4 if weight.full or mesh.deepspeed else settings.low)
        unit.gradients += times * size * (weight.role not in settings.frozen)
    return found


def stepping(weights: Sequence[Weight], mesh: Mesh, settings: Settings) -> float:
    """Bytes that Muon works with at one time: a batch of whole matrices, its update and three of its products' size; of
    matrices that ranks share out also what is sent, what comes, and what goes back."""
    if not settings.muon:
        return 0.0
    batch = 1 << 24
    largest = 0.0
    for weight in weights:
        if weight.muon and weight.role not in settings.frozen:
            own = weight.expert and not mesh.deepspeed
            size = local_size(weight, mesh) if own else weight.size
            copies = 5 if own or mesh.gpus == 1 else 9
            largest = max(largest, copies * min(max(size, batch), size * weight.count))
    return 2.0 * largest


def kept(
    config: AgentModelConfig, load: Load, settings: Settings, mesh: Mesh
) -> tuple[dict[str, float], dict[str, float]]:
    """By role, bytes that the backward keeps of one micro-batch, and what its largest layer works with beside them."""
    residual = (
        settings.low if mesh.sharded and not mesh.deepspeed else 4
    )  # gathered tables give 16-bit embeddings; autocast widens none
    tokens = -(-load.tokens // mesh.context)
    patches = -(-load.patches // mesh.context)
    learns = {"encoder", "projector", "embedding", "decoder", "mtp", "head"} - settings.frozen
    found: dict[str, float] = {}
    working: dict[str, float] = {}
    if "encoder" in learns and patches:
        found["encoder"], working["encoder"] = _encoder(config, patches, settings)
    if learns & {"encoder", "projector"} and patches:
        found["projector"], working["projector"] = _projector(config, patches, settings)
    trunk = learns & {"encoder", "projector", "embedding", "decoder"}
    if trunk:
        found["decoder"], working["decoder"] = _decoder(config, tokens, settings, residual)
    if (trunk or "mtp" in learns) and config.mtp.depths:
        found["mtp"], working["mtp"] = _mtp(config, tokens, settings, residual)
    if trunk or learns & {"mtp", "head"}:
        found["head"], working["head"] = _head(config, tokens, load, settings, mesh)
    return found, working


def _attention(tokens: int, queries: int, keys: int, heads: int, norm: bool, low: int) -> float:
    """Queries and keys turned, the stacked projection (values are a view of it), result, and a number a head."""
    scales = 4 * (heads + heads * keys // queries) if norm else 0
    return tokens * (low * (2 * queries + keys + queries + 2 * keys) + 4 * heads + scales)


def decoder_layer(
    config: AgentModelConfig, tokens: int, low: int, residual: int, sparse: bool, hot: float = 1.0
) -> float:
    """Bytes that one decoder layer keeps where nothing is recomputed."""
    decoder, moe = config.decoder, config.decoder.moe
    width, queries, keys = decoder.width, decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    size = tokens * (2 * (residual * width + 4) + low * width)  # both norms' inputs, what the projections read
    if decoder.sandwich_norm:
        size += tokens * 2 * (low * width + 4)
    size += _attention(tokens, queries, keys, decoder.heads, decoder.qk_norm, low)
    size += tokens * low * width  # what the second norm gives
    if not sparse:
        return size + tokens * low * 3 * decoder.ffn
    router = (4 * width if low == 2 else 0) + 12 * moe.experts + moe.top_k * (8 + 4 + 4 + 4) + 8
    rows = moe.top_k * (low * (width + 3 * moe.ffn) * hot + low * width + 2 * 8)
    return size + tokens * (router + rows + low * 3 * moe.shared * moe.ffn)


def _decoder(config: AgentModelConfig, tokens: int, settings: Settings, residual: int) -> tuple[float, float]:
    decoder = config.decoder
    dense = decoder.layers - decoder.moe_layers
    low, hot = settings.low, settings.hot
    each = {sparse: decoder_layer(config, tokens, low, residual, sparse, hot) for sparse in (False, True)}
    rotation = tokens * 8 * decoder.rotary_pairs
    final = tokens * (residual * decoder.width + 4)
    largest = max(each[False] if dense else 0.0, each[True] if decoder.moe_layers else 0.0)
    if "decoder" in settings.recompute:
        return decoder.layers * tokens * residual * decoder.width + rotation + final, (1 + GRADIENTS) * largest
    return dense * each[False] + decoder.moe_layers * each[True] + rotation + final, GRADIENTS * largest


def _mtp(config: AgentModelConfig, tokens: int, settings: Settings, residual: int) -> tuple[float, float]:
    width, low = config.decoder.width, settings.low
    layer = decoder_layer(config, tokens, low, low, config.decoder.moe_layers > 0, settings.hot)
    again = "mtp" in settings.recompute
    block = tokens * low * width if again else layer
    around = tokens * (2 * residual * width + 2 * low * width + low * width + 16)  # two norms, joined, before the last
    whole = config.mtp.depths * (block + around + tokens * 8 * config.decoder.rotary_pairs)
    return whole, (again + GRADIENTS) * layer


def encoder_layer(config: AgentModelConfig, patches: int, low: int) -> float:
    """Bytes that one layer of the encoder keeps; its residual stream is float32."""
    vision = config.vision
    size = patches * (2 * (4 * vision.width + 4) + 2 * low * vision.width)
    size += _attention(patches, vision.width, vision.width, vision.heads, vision.qk_norm, low)
    return size + patches * low * (3 if vision.mlp == "swiglu" else 2) * vision.ffn


def _encoder(config: AgentModelConfig, patches: int, settings: Settings) -> tuple[float, float]:
    """In chunks nothing is kept but what goes in, and the backward works with all layers of one chunk."""
    vision, low = config.vision, settings.low
    chunk = settings.chunk_patches
    layer = encoder_layer(config, min(patches, chunk or patches), low)
    around = patches * ((low * vision.patch_values if low == 2 else 0) + 4 * vision.width + 8)
    around += patches * 8 * (vision.width // vision.heads // 2)
    again, away = "encoder" in settings.recompute, "encoder" in settings.offload
    if 0 < chunk < patches:
        share = chunk / patches
        inner = vision.depth * (chunk * 4 * vision.width if again else layer)
        return 0.0, (1 + GRADIENTS) * layer if away else inner + share * around + (again + GRADIENTS) * layer
    if away:
        return 0.0, (1 + GRADIENTS) * layer
    if again:
        return vision.depth * patches * 4 * vision.width + around, (1 + GRADIENTS) * layer
    return vision.depth * layer + around, GRADIENTS * layer


def _projector(config: AgentModelConfig, patches: int, settings: Settings) -> tuple[float, float]:
    low, width, ffn, encoder = settings.low, config.decoder.width, config.projector.ffn, config.vision.width
    block = config.vision.merge_size**2
    at_once = min(patches, settings.chunk_patches or patches)
    each = low * (block * encoder + 3 * width + 3 * ffn) + 4 * 2 * width
    if config.projector.merge == "average":
        each = 4 * encoder + low * (encoder + 2 * ffn)
    whole = at_once // block * each
    if at_once < patches or "projector" in settings.offload:
        return 0.0, (1 + GRADIENTS) * whole
    if "projector" in settings.recompute:
        return patches * low * encoder, (1 + GRADIENTS) * whole
    return whole, GRADIENTS * whole


def _head(config: AgentModelConfig, tokens: int, load: Load, settings: Settings, mesh: Mesh) -> tuple[float, float]:
    """Rows with a target and, of held terms, their gradients and the head's; a chunk of logits is at work."""
    width, vocabulary, low = config.decoder.width, config.vocab_size, settings.low
    terms = 1 + config.mtp.depths
    rows = tokens * load.supervised
    element = low if mesh.sharded and not mesh.deepspeed else 4
    learns = not {"head"} & settings.frozen
    held = min(terms, max(1, HELD_BYTES // (vocabulary * width * element))) if learns else terms
    kept_rows = terms * rows * (low * width + 8)
    held_weights = held * vocabulary * width * element * learns
    chunk = min(max(CHUNK_VALUES // vocabulary, 512), 8192)
    logits = min(chunk, rows) * vocabulary * (4 + 4 + (2 if low == 2 else 0))  # themselves, probabilities, slopes
    wide = vocabulary * width * (4 + 4 + low) * learns  # a sum in float32, and a chunk's part of it
    return kept_rows + held_weights, logits + wide


BACKWARD = ("head", "mtp", "decoder", "embedding", "projector", "encoder")
"""The order in which roles get their gradients."""


def plan_memory(
    config: AgentModelConfig, weights: Sequence[Weight], mesh: Mesh, load: Load, settings: Settings
) -> Memory:
    """Everything, on the fullest rank (rank 0 holds no less of the state than any other).

    Moments: the end of the forward, when all is kept and logits are at work; the start of each role's backward, when
    what it and later roles keep is held, and gradients of earlier ones; the end of the backward; the optimizer's step.
    """
    by_role, more = state(weights, mesh, settings), moving(weights, mesh, settings)
    keeps, works = kept(config, load, settings, mesh)
    held = {kind: sum(sizes[kind] for sizes in by_role.values()) for kind in ("parameters", "gradients", "optimizer")}
    memory = Memory(held)
    for role, sizes in by_role.items():
        memory.roles[role] = sum(sizes.values()) + keeps.get(role, 0.0)
    always = {
        "parameters": held["parameters"],
        "optimizer": held["optimizer"],
        "batch": 2.0 * (load.tokens * (8 + 8 + 24) + load.patches * 4 * config.vision.patch_values),
        "context": CONTEXT_BYTES,
    }
    # gradients come block by block where neither buckets nor earlier micro-batches have put them there
    comes = settings.accumulation == 1 and (mesh.sharded or mesh.parallel in ("zero2", "none"))
    order = [role for role in BACKWARD if role in keeps]
    for at, role in enumerate(["", *order]):
        left = order[max(at - 1, 0) :]
        done = BACKWARD[: BACKWARD.index(role)] if role else ()
        ready = sum(by_role[r]["gradients"] for r in by_role if r in done) if comes else held["gradients"]
        again = settings.recompute
        _moment(
            memory,
            f"backward of {role}" if role else "end of the forward",
            always,
            gradients=ready,
            gathered=more.root + (more.blocks if role else more.blocks / 2),
            reducing=more.reducing if role else 0.0,
            copies=sum(size for r, size in more.copies.items() if r not in again or not role),
            kept=sum(keeps[r] for r in left),
            working=works.get(role or "head", 0.0),
        )
    _moment(memory, "end of the backward", always, gradients=held["gradients"], gathered=more.root,
            reducing=more.root_reducing)  # fmt: skip
    _moment(
        memory, "the optimizer's step", always, gradients=held["gradients"], working=stepping(weights, mesh, settings)
    )
    return memory


def _moment(memory: Memory, name: str, always: dict[str, float], **kinds: float) -> None:
    moment = always | kinds
    comes = ("gathered", "reducing", "copies", "kept", "working")
    moment["fragmentation"] = FRAGMENTATION * sum(moment.get(kind, 0.0) for kind in comes)
    memory.moments[name] = moment
