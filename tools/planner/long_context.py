"""Prefill of one long prompt by ranks that share it: keys and values a rank keeps, what travels, and what of that
computation hides. Unsplit, every rank keeps all layers; split, its own alone (``mmagent.generation.layer_split``, which
says how and why).

With ``row = 2 G d`` values of a token and layer, chunks of c tokens after a history of h, R ranks and L layers, a rank
that owns ``o`` of these receives for every chunk

- of new keys and values, both ways: ``L (R - 1) ceil(c / R) row`` (ranks send as many rows each);
- of histories, split alone: ``(L - o) h row``;

and at the end of a prompt what was sampled, 16 bytes. It keeps ``o N row``, and during prefill two buffers of
``N row``. These are the bytes of the real thing, by test. Seconds are a model: a layer's products, experts and
attention at the calibrated rates of :mod:`tools.planner.steptime` on the slowest rank (the last: its tokens see most),
transfers at the link's rate. What is new is waited for; the next layer's history hides behind a layer, as far as
transfers overlap there. Weights are not in here: each rank needs a whole copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmagent.generation.layer_split import Chunk, owners, plan_chunks
from mmagent.models.agent_model import AgentModelConfig
from mmagent.models.decoder import DecoderConfig
from tools.planner.calibration import CALIBRATED
from tools.planner.hardware import GIB, Gpu
from tools.planner.report import columns, gib
from tools.planner.steptime import HOP, TILE_ROWS, Efficiency, filled, ring_rate
from tools.planner.work import Layer, decoder_layers

TOLD = 16
"""Bytes in which a rank tells others a token and its log-probability."""


def row_bytes(config: DecoderConfig, size: int) -> int:
    """Keys and values of one token in one layer, ``size`` bytes a value."""
    return 2 * config.kv_heads * config.head_dim * size


@dataclass(frozen=True)
class Kept:
    """Bytes on one rank: ``stored`` as long as the sequence lives, ``buffers`` while prompts are computed."""

    stored: int
    buffers: int = 0

    @property
    def peak(self) -> int:
        return self.stored + self.buffers


def kept(config: DecoderConfig, lengths: Sequence[int], chunk: int, ranks: int, size: int, split: bool) -> list[Kept]:
    """Of every rank, at the end of the prefill of prompts of these ``lengths``, in chunks of so many tokens."""
    row, tokens = row_bytes(config, size), sum(lengths)
    if not split:
        return [Kept(config.layers * tokens * row)] * ranks
    own = owners(config.layers, ranks)
    room = max(piece.start + piece.share(ranks) * ranks for piece in plan_chunks(lengths, chunk))
    return [Kept(own.count(rank) * tokens * row, 2 * room * row) for rank in range(ranks)]


@dataclass(frozen=True)
class Received:
    """Bytes that one rank gets from others: ``new`` keys and values, ``history``, and what was ``sampled``."""

    new: int
    history: int
    sampled: int

    @property
    def total(self) -> int:
        return self.new + self.history + self.sampled


def received(
    config: DecoderConfig, lengths: Sequence[int], chunk: int, ranks: int, size: int, split: bool
) -> list[Received]:
    """Of every rank, during the prefill of these prompts."""
    row, own, plan = row_bytes(config, size), owners(config.layers, ranks), plan_chunks(lengths, chunk)
    new = config.layers * (ranks - 1) * row * sum(piece.share(ranks) for piece in plan)
    history = row * sum(piece.start for piece in plan) * split
    samplers = [piece.last(ranks) for piece in plan if piece.end == lengths[piece.sequence]]
    return [
        Received(new, (config.layers - own.count(rank)) * history, TOLD * sum(other != rank for other in samplers))
        for rank in range(ranks)
    ]


@dataclass(frozen=True)
class Decoding:
    """Bytes that all ranks together receive for one token of one sequence: as we do it, and two ways that we do not
    (docs of ``mmagent.generation.layer_split``). ``told``: the token itself, each way."""

    handed: int
    attended: int
    moved: int
    told: int


def decoding(config: DecoderConfig, history: int, ranks: int, size: int, hidden: int) -> Decoding:
    """``size`` bytes a value of keys, values and what attention gives, ``hidden`` of hidden states."""
    stages = len(set(owners(config.layers, ranks)))
    each = config.layers * (ranks - 1)
    return Decoding(
        (stages - 1) * config.width * hidden,
        each * config.heads * config.head_dim * size,
        each * history * row_bytes(config, size),
        (ranks - 1) * TOLD,
    )


@dataclass(frozen=True)
class PrefillTime:
    """Seconds: of computation on the slowest rank, of transfers of what is ``new`` and of ``history``, and what of the
    latter is ``exposed``."""

    compute: float
    new: float
    history: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.new + self.exposed

    @property
    def hidden(self) -> float:
        """Share of the histories' time that nobody waits for."""
        return 1 - self.exposed / self.history if self.history else 1.0


def prefill_time(
    config: DecoderConfig,
    length: int,
    chunk: int,
    ranks: int,
    gpu: Gpu,
    size: int = 2,
    split: bool = True,
    efficiency: Efficiency = CALIBRATED,
) -> PrefillTime:
    """Of one prompt. The first layer of a chunk hides its history behind the last one of the chunk before."""
    row, rate = row_bytes(config, size), ring_rate(ranks, 1, gpu, efficiency)
    compute = new = history = exposed = 0.0
    for piece in plan_chunks([length], chunk):
        for layer in decoder_layers(config):
            own = layer_seconds(layer, piece, ranks, gpu, efficiency)
            compute += layer.times * own
            if ranks == 1:
                continue
            new += layer.times * ((ranks - 1) * piece.share(ranks) * row / rate + HOP * ranks)
            if split and piece.start:
                moving = piece.start * row / rate + HOP * ranks
                history += layer.times * moving
                exposed += layer.times * (max(moving - own, 0.0) + (1 - efficiency.overlap) * min(moving, own))
    return PrefillTime(compute, new, history, exposed)


def layer_seconds(layer: Layer, piece: Chunk, ranks: int, gpu: Gpu, efficiency: Efficiency) -> float:
    """The last full share of a chunk in one layer. Products and attention alone: what else there is hides more."""
    rows, rate = piece.share(ranks), efficiency.products(gpu)
    pairs = rows * (piece.end - rows) + rows * (rows + 1) / 2
    seconds = 2 * rows * (layer.attention + layer.dense) / (rate * filled(rows, TILE_ROWS))
    seconds += layer.pair * pairs / (rate * efficiency.attention)
    if layer.chosen:
        each = rows * layer.top_k / layer.routes
        seconds += 2 * rows * layer.chosen / (rate * efficiency.grouped * filled(each, TILE_ROWS))
    return seconds


@dataclass(frozen=True)
class Row:
    """One prompt of ``length`` tokens on so many ranks, by both ways; figures are those of the fullest rank, and of the
    one that receives most."""

    length: int
    ranks: int
    unsplit: Kept
    split: Kept
    received_unsplit: int
    received: Received
    received_by_all: int
    time_unsplit: PrefillTime
    time: PrefillTime
    decoding: Decoding


def rows(
    config: DecoderConfig, lengths: Sequence[int], ranks: Sequence[int], chunk: int, gpu: Gpu, size: int = 2
) -> list[Row]:
    """All of ``lengths`` on all of ``ranks``. Raises ``ValueError`` for numbers that mean nothing."""
    if not lengths or not ranks or min(*lengths, *ranks, chunk) < 1:
        raise ValueError(f"long context: lengths {lengths}, ranks {ranks} and chunk {chunk} must be positive")
    found = []
    for length in lengths:
        for n in ranks:
            kinds = [kept(config, [length], chunk, n, size, split) for split in (False, True)]
            came = [received(config, [length], chunk, n, size, split) for split in (False, True)]
            found.append(
                Row(
                    length,
                    n,
                    *(max(kind, key=lambda one: one.peak) for kind in kinds),
                    max(one.total for one in came[0]),
                    max(came[1], key=lambda one: one.total),
                    sum(one.total for one in came[1]),
                    *(prefill_time(config, length, chunk, n, gpu, size, split) for split in (False, True)),
                    decoding(config, length, n, size, size),
                )
            )
    return found


def table(preset: str, config: AgentModelConfig, found: Sequence[Row], chunk: int, gpu: Gpu) -> str:
    """What :func:`rows` found, for people."""
    prefill, decode = [], []
    for row in found:
        time, each = row.time, row.decoding
        place = (f"{row.length:,}", str(row.ranks))
        prefill.append(
            (
                *place,
                gib(row.unsplit.peak),
                gib(row.split.stored),
                gib(row.split.peak),
                f"{row.unsplit.peak / row.split.peak:.2f}x",
                _size(row.received.new),
                _size(row.received.history),
                _size(row.received_by_all),
                f"{time.compute:.2f} s",
                f"{time.new:.3f} s",
                f"{time.history:.3f} s",
                f"{time.hidden:.0%}" if time.history else "",
                f"{time.seconds / row.time_unsplit.seconds - 1:+.1%}",
            )
        )
        if row.ranks > 1:
            sizes = (size + each.told for size in (each.handed, each.attended, each.moved))
            decode.append((*place, *map(_size, sizes)))
    head = ("tokens", "ranks", "GiB unsplit", "split", "with buffers", "less", "new", "history", "by all",
            "compute", "new", "history", "hidden", "slower")  # fmt: skip
    decoder = config.decoder
    lines = [
        f"{preset}: {decoder.layers} layers of {decoder.kv_heads} key-value heads of {decoder.head_dim}, 16 bits; "
        f"prompts in chunks of {chunk:,} tokens on {gpu.name}, {gpu.link / 1e9:,.0f} GB/s to each other",
        "",
        "prefill: keys and values of the fullest rank, what one receives and all do, and time",
        columns(head, prefill, left=()),
        "less: memory with the buffers of prefill against unsplit. slower: than unsplit, where only the new travels.",
        "Weights (a whole copy a rank) and activations come beside.",
    ]
    if decode:
        other = ("tokens", "ranks", "hidden states", "results of attention", "keys and values")
        lines += [
            "",
            "decoding: what all ranks together receive for a token if they hand on",
            columns(other, decode, ()),
        ]
        lines.append("The first is what is done.")
    return "\n".join(lines)


def _size(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def linked(gpu: Gpu, link: float) -> Gpu:
    """``gpu`` with another link, in bytes a second and direction; 0 leaves it."""
    return replace(gpu, link=link) if link else gpu


def draw(preset: str, found: Sequence[Row], chunk: int, gpu: Gpu, file: Path) -> None:
    """Memory and time against ranks, a line a length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for n, length in enumerate(dict.fromkeys(row.length for row in found)):
        own = [row for row in found if row.length == length]
        ranks = [row.ranks for row in own]
        name = f"{length:,} tokens"
        above.plot(ranks, [row.split.peak / GIB for row in own], "o-", color=f"C{n}", label=f"{name}, split")
        above.plot(ranks, [row.split.stored / GIB for row in own], ":", color=f"C{n}")
        above.plot(ranks, [row.unsplit.peak / GIB for row in own], "--", color=f"C{n}", label=f"{name}, unsplit")
        below.plot(ranks, [row.time.seconds for row in own], "o-", color=f"C{n}", label=f"{name}, split")
        below.plot(ranks, [row.time_unsplit.seconds for row in own], "--", color=f"C{n}", label=f"{name}, unsplit")
        shared = [row for row in own if row.ranks > 1]
        below.plot([row.ranks for row in shared], [row.time.history for row in shared], ":", color=f"C{n}")
    above.set_ylabel("keys and values of a rank (GiB)\ndotted: without the two buffers of prefill")
    below.set_ylabel("seconds of one prefill\ndotted: histories on their way, mostly hidden")
    below.set_xlabel("ranks that share the prompt")
    below.set_yscale("log")
    above.set_ylim(bottom=0)
    above.set_title(
        f"{preset}, chunks of {chunk:,} tokens, {gpu.name} with {gpu.link / 1e9:,.0f} GB/s: a prediction", fontsize=10
    )
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
