"""Does a packed document give the same result as the document alone? A check for any model that reads packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmagent.packing import pack
from mmagent.types import Document, ModelOutput, PackedBatch

Model = Callable[[PackedBatch], ModelOutput]


@dataclass(frozen=True)
class Difference:
    """The largest difference found in one output, relative to its largest value alone, and where."""

    output: str
    relative: float
    key: str


@dataclass(frozen=True)
class PackingReport:
    """``differences`` by output, and the ``tolerance`` they are held to."""

    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every output stays within the tolerance."""
        return all(d.relative <= self.tolerance for d in self.differences)

    def __str__(self) -> str:
        lines = [
            f"{'ok  ' if d.relative <= self.tolerance else 'DIFF'} {d.output:<24} {d.relative:.1e}  {d.key}"
            for d in self.differences
        ]
        return "\n".join(lines)


def check_packing(
    model: Model,
    documents: Sequence[Document],
    *,
    image_id: int,
    merge_size: int,
    tolerance: float = 1e-3,
    gradients: bool = True,
    device: torch.device | str = "cpu",
) -> PackingReport:
    """Run ``documents`` once as one pack and once one by one, and compare.

    Compared are the final hidden states of every document, those of every MTP depth (but the last tokens, which
    have no target), the router's token counts, and, for an ``nn.Module`` with ``gradients``, the gradient of a
    fixed random projection of all hidden states with respect to every parameter. Documents that see each other,
    positions that do not restart and images that land in the wrong slots all show. The model should compute in
    float32 and without dropout.
    """
    if len(documents) < 2:
        raise ValueError(f"packing needs at least 2 documents to compare, got {len(documents)}")
    ids = {"image_id": image_id, "merge_size": merge_size}
    whole = pack(documents, **ids).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    names = [n for n, p in model.named_parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    gradients = gradients and bool(parameters)
    with torch.set_grad_enabled(gradients):
        together = model(whole)
        apart = [model(pack([document], **ids).to(device)) for document in documents]
    borders = whole.segments.offsets()
    found = [_worst("hidden", together.hidden, [o.hidden for o in apart], borders, documents, drop=0)]
    for depth in range(len(together.mtp_hidden)):
        name, alone = f"mtp_hidden[{depth}]", [o.mtp_hidden[depth] for o in apart]
        found.append(_worst(name, together.mtp_hidden[depth], alone, borders, documents, drop=depth + 1))
    if together.router_load.numel():
        load = torch.stack([o.router_load for o in apart]).sum(0)
        found.append(Difference("router_load", _relative(together.router_load, load), "all documents"))
    if gradients:
        ours = _gradients([(together, 0, borders[-1])], parameters)
        theirs = _gradients([(o, borders[n], borders[n + 1]) for n, o in enumerate(apart)], parameters)
        worst = max(range(len(names)), key=lambda n: _relative(ours[n], theirs[n]))
        found.append(Difference("gradients", _relative(ours[worst], theirs[worst]), names[worst]))
    return PackingReport(tuple(found), tolerance)


def _worst(
    name: str,
    together: Tensor,
    apart: Sequence[Tensor],
    borders: Sequence[int],
    documents: Sequence[Document],
    drop: int,
) -> Difference:
    """``drop`` last tokens of every document are left out."""
    worst = Difference(name, 0.0, "all documents")
    for n, (document, alone) in enumerate(zip(documents, apart, strict=True)):
        end = len(document) - drop
        if end > 0:
            relative = _relative(together[borders[n] : borders[n] + end], alone[:end])
            worst = max(worst, Difference(name, relative, document.key), key=lambda d: d.relative)
    return worst


def _relative(ours: Tensor, theirs: Tensor) -> float:
    scale = float(theirs.detach().abs().max())
    return float((ours.detach() - theirs.detach()).abs().max()) / max(scale, 1e-12)


def _gradients(outputs: Sequence[tuple[ModelOutput, int, int]], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of one random projection of the whole stream; every output covers tokens ``start:end`` of it."""
    total = max(end for _, _, end in outputs)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(total, outputs[0][0].hidden.shape[1], generator=generator)
    loss = sum(
        (output.hidden.float() * weights[start:end].to(output.hidden.device)).sum() for output, start, end in outputs
    )
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
