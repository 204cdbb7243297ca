"""One training step of a small GLM-4.5V, forward and backward, against Glm4vMoeForConditionalGeneration.

Both sides have the same weights, see the same documents with the same images, and compute the same loss: that is
checked for all forms before anything is timed, and on a tiny model every gradient. The model has the proportions of
GLM-4.5V: attention of three widths, few key-value heads, half of each head turned by three axes, no norms on queries
and keys, one dense layer, then experts of a third of the width of which four and a shared one serve a token, and a
vision tower with a table of places. The peer runs with `sdpa` and, in each row and form, the faster of its two ways of
experts that train (measured first), and computes its own loss over its own logits:

- `padded`: one row a document and a mask, as a practitioner runs it; no mask where no padding is;
- `packed`: one row, documents kept apart by positions of four rows; its mask is dense;
- `best`: the fastest of both forms, each with its faster way of experts.

Long tail: 16 documents of log-normal lengths (deviation 0.8 in the logarithm, at their quantiles) up to 1,024 tokens,
308 on average: 0.30 of the longest. Equal: 8 of 512. Every second document has an image of a quarter of its tokens.
On CUDA there are up to 2,048 tokens and bf16 only: our attention is in bf16 there.

`bf16` is autocast over fp32 weights, `bf16 weights` a model whose weights are bf16. `peak`: most memory that tensors
hold beyond the weights. `MFU`: useful operations (`mmagent/models/flops.py`) over time and peak, where the peak is
known or given by `--peak`. `growth`: tokens a second in bf16 while documents get longer (of as many tokens in all),
while experts get more (as many active), and while 8 documents of 512 tokens hold more images (of 36 tokens). `MTP`:
what a head for multi-token prediction costs us; their class has none, so it is off in all other rows. `head and loss`:
the chunked output head against whole logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.interop.glm import from_transformers
from mmagent.models.agent_model import AgentModel
from mmagent.models.flops import training_flops
from mmagent.models.mtp import MTPConfig
from mmagent.ops.cross_entropy import linear_cross_entropy
from mmagent.ops.torchvision_shim import ensure_torchvision
from tools.benchmarks.glm import (
    EXPERTS,
    SIZES,
    TINY,
    Batch,
    Size,
    check_gradients,
    check_losses,
    document,
    illustrated,
    long_tail,
    our_step,
    their_model,
    their_step,
)
from tools.benchmarks.memory import peak_memory
from tools.benchmarks.row import Row, Settings, seconds, smaller_is_better, throughput, throughputs

__all__ = ["PARTS", "SIZES", "plot", "rows"]
PARTS = ("steps", "mtp", "growth", "head")
Step = Callable[[], object]
SIDE = 6
"""Visual tokens along an image of the `growth images` rows."""


@dataclass(frozen=True)
class Sides:
    """Both models with equal weights, in one precision."""

    ours: AgentModel
    theirs: nn.Module
    kind: str

    @staticmethod
    def of(size: Size, device: torch.device, kind: str, experts: int = 0) -> Sides:
        theirs = their_model(size, experts).to(device)
        return Sides(from_transformers(theirs), theirs, kind)

    def in_precision(self, kind: str) -> Sides:
        if kind != "bf16 weights":
            return replace(self, kind=kind)
        return Sides(copy.deepcopy(self.ours).bfloat16(), copy.deepcopy(self.theirs).bfloat16(), kind)

    def mine(self, batch: Batch) -> Step:
        return our_step(self.ours, batch, self.kind)

    def their_forms(self, batch: Batch) -> dict[str, Step]:
        """Their step in either form, each with its faster way of experts; named for the table."""
        return dict(self.their_fastest(batch, form) for form in ("padded", "packed"))

    def their_fastest(self, batch: Batch, form: str) -> tuple[str, Step]:
        """Of the ways of experts, in this form."""
        ways = {f"{form}, {way}": their_step(self.theirs, batch, form, self.kind, way) for way in EXPERTS}
        best = fastest(ways)
        return best, ways[best]


def fastest(steps: dict[str, Step]) -> str:
    """By the better of two runs, after one that pays for allocations."""
    times = {}
    for name, step in steps.items():
        step()
        times[name] = min(seconds(step) for _ in range(2))
    return min(times, key=lambda name: times[name])


def rows(settings: Settings) -> Iterator[Row]:
    ensure_torchvision()
    import transformers

    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[settings.size or ("large" if device.type == "cuda" else "small")]
    size = TINY if settings.quick else size
    check_gradients(device)
    tail = Batch.of(long_tail(size), device)
    equal = Batch.of(illustrated([size.equal[1]] * size.equal[0], size), device)
    sides = Sides.of(size, device, "fp32")
    for batch in (tail, equal):
        check_losses(sides.ours, sides.theirs, batch)
    wanted = (settings.part,) if settings.part else PARTS
    if "steps" in wanted:
        longest = tail.padded["input_ids"].shape[1]
        mean = tail.tokens / size.documents
        name = f"long tail slots (mean {mean:.0f}, most {longest}: {mean / longest:.2f})"
        yield smaller_is_better(name, tail.tokens, tail.slots, "padded", "tokens computed")
        kinds = ("bf16",) if device.type == "cuda" else ("fp32", "bf16")
        for kind in (*kinds, "bf16 weights"):
            yield from steps(sides.in_precision(kind), tail, equal, settings)
    if "mtp" in wanted:
        yield mtp_row(sides, equal, settings)
    if "growth" in wanted:
        few = replace(settings, repeats=min(settings.repeats, 3))
        yield from growth_of_lengths(sides.in_precision("bf16"), size, device, few)
        yield from growth_of_experts(size, equal, device, few)
        yield from growth_of_images(sides.in_precision("bf16"), size, device, few)
    if "head" in wanted:
        yield from head_rows(settings)


def steps(sides: Sides, tail: Batch, equal: Batch, settings: Settings) -> Iterator[Row]:
    """The promised rows of one precision, their memory and, where there is a peak, the share of it."""
    for title, batch in (("long tail", tail), ("equal", equal)):
        mine, forms = sides.mine(batch), sides.their_forms(batch)
        if title == "equal":
            best = fastest(forms)
            forms = {f"best: {best}": forms[best]}
        name = f"{title} {batch.ours.segments.longest} tokens, {sides.kind}"
        found = throughputs(name, mine, forms, batch.tokens, "tokens/s", settings)
        yield from found
        if settings.peak:
            flops = training_flops(sides.ours.config, batch.ours) / batch.tokens  # a token
            share = 100 * flops / settings.peak
            for row in found:
                mfu = replace(row, name=f"{name}: MFU", unit="% of peak")
                yield replace(mfu, ours=row.ours * share, peer=row.peer * share)
        own = peak_memory(mine)
        for peer, step in forms.items():
            yield smaller_is_better(f"{name}: peak", own, peak_memory(step), peer, "MiB")


def mtp_row(sides: Sides, batch: Batch, settings: Settings) -> Row:
    """Ours with one MTP depth, against ours without."""
    with_head = from_transformers(sides.theirs, MTPConfig(depths=1))
    mine, peer = our_step(with_head, batch, "bf16", mtp=True), our_step(sides.ours, batch, "bf16")
    return throughput("MTP of one depth, bf16", mine, peer, "ours without", batch.tokens, "tokens/s", settings)


# ---------------------------------------------------------------------------------------------- growth


def against_padded(name: str, sides: Sides, batch: Batch, settings: Settings) -> Row:
    """Documents of one length: nothing is padded, and one row a document is the faster form."""
    way, peer = sides.their_fastest(batch, "padded")
    return throughput(name, sides.mine(batch), peer, way, batch.tokens, "tokens/s", settings)


def growth_of_lengths(sides: Sides, size: Size, device: torch.device, settings: Settings) -> Iterator[Row]:
    for length in (32, 64) if settings.quick else (64, 128, 256, 512, 1024, 2048, 4096):
        documents = [document(length, (), size, n) for n in range(max(size.stream // length, 1))]
        yield against_padded(f"growth length {length}", sides, Batch.of(documents, device), settings)


def growth_of_experts(size: Size, batch: Batch, device: torch.device, settings: Settings) -> Iterator[Row]:
    for experts in (4, 8) if settings.quick else (4, 8, 16, 32, 64):
        sides = Sides.of(size, device, "bf16", experts)
        yield against_padded(f"growth experts {experts}", sides, batch, settings)


def growth_of_images(sides: Sides, size: Size, device: torch.device, settings: Settings) -> Iterator[Row]:
    documents, length = size.equal
    side = 2 if settings.quick else SIDE
    for images in (0, 2) if settings.quick else (0, 8, 16, 32, 64):
        of_each = [images // documents + (n < images % documents) for n in range(documents)]
        texts = [document(length, [side] * count, size, n) for n, count in enumerate(of_each)]
        yield against_padded(f"growth images {images}", sides, Batch.of(texts, device), settings)


def plot(rows: list[Row], path: Path) -> None:
    """Microseconds a token by length, experts and images; one line a side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"length": "tokens a document", "experts": "experts (as many active)", "images": "images a step"}
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", sharey=True)
    for axes, (kind, label) in zip(panels, labels.items(), strict=True):
        found = [row for row in rows if row.name.startswith(f"growth {kind} ")]
        places = [int(row.name.split()[2]) for row in found]
        axes.plot(places, [1e6 / row.ours for row in found], marker="o", label="mmagent, packed")
        axes.plot(places, [1e6 / row.peer for row in found], marker="s", label="transformers, one row a document")
        if kind != "images":
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{n:,}" for n in places])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # shared; once all lines are there
    panels[0].set_ylabel("µs a token, forward and backward")
    panels[0].legend()
    figure.suptitle("How the cost of a step grows (bf16)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- the head alone


def head_problem(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 256, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 256, generator=generator).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def head_step(kind: str, tokens: int, vocabulary: int) -> Callable[[], None]:
    hidden, weight, targets = head_problem(tokens, vocabulary)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            if kind == "chunked":
                loss = linear_cross_entropy(hidden, weight, targets).total
            else:
                loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
        loss.backward()
        hidden.grad = weight.grad = None

    return step


def head_rows(settings: Settings) -> Iterator[Row]:
    tokens, vocabulary = (1024, 4096) if settings.quick else (4096, 32768)
    name = f"head and loss, {tokens} tokens, vocabulary {vocabulary}"
    mine, peer = (head_step(kind, tokens, vocabulary) for kind in ("chunked", "whole"))
    yield throughput(name, mine, peer, "whole logits", tokens, "tokens/s", settings)
    yield smaller_is_better(f"{name}: peak", peak_memory(mine), peak_memory(peer), "whole logits", "MiB")
