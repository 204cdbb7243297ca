"""Memory of a training step by its number of images: all at once, recomputed, in chunks, and in transformers.

One model in the proportions of GLM-4.5V, the same weights on both sides, one forward and backward. A step has 1 to 256
images of 64 patches (16 visual tokens) and *always as many decoder tokens* (5,120 in 64 documents, 960 with a loss): an
image takes the place of 16 tokens of text that have none. So what grows with images is the vision modules' doing, the
visual embeddings included (``V x D`` values and their gradient); pixels are there before the step and are not counted.
``ours`` is chunks of 512 patches, eight images; peers of a row:

- `at once`: ours without chunks; `recomputed`: blocks of the encoder, and the projector, keep their inputs alone;
- `transformers` (Glm4vMoe), and `transformers, checkpointing` with its gradient checkpointing in the vision tower;
- rows `frozen` train all but the encoder.

MiB are the largest sum of what tensors hold at one time, beyond what was there before the step (model, batch). Rows
`flat` compare the peak at the most images with that at 16 (twice a chunk), ours and each peer's. Rows `time` say what
chunks cost at 64 images, with the encoder trained and frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mmagent.interop.glm import from_transformers
from mmagent.models.agent_model import AgentModel
from mmagent.models.memory import MemoryConfig
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import Document
from tools.benchmarks.glm import EXPERTS, Batch, Size, check_losses, document, our_step, their_model, their_step
from tools.benchmarks.memory import peak_memory
from tools.benchmarks.row import Row, Settings, smaller_is_better, throughputs

DOCUMENTS, LENGTH, SIDE, TARGETS = 64, 80, 4, 15
"""Documents of a step, tokens of each, the side of an image in visual tokens, and tokens of a document with a loss."""
SIZES = {
    "small": Size(64, 2, 4, 2, 16, 172, 4, 2, 44, 512, (128, 4, 2), 0, 0, (0, 0), 0),
    "large": Size(1024, 12, 24, 2, 128, 2736, 32, 4, 352, 16384, (512, 12, 8), 0, 0, (0, 0), 0),
}
CHUNKS = MemoryConfig(chunk_patches=512)
RECOMPUTED = MemoryConfig(["encoder", "projector"])


@dataclass(frozen=True)
class Sides:
    """The same weights twice."""

    ours: AgentModel
    theirs: nn.Module
    kind: str

    def steps(self, batch: Batch, frozen: bool) -> dict[str, Callable[[], None]]:
        """Each side's forward and backward, ours in chunks first."""
        self.ours.freeze(("encoder",) if frozen else ())
        for name, parameter in self.theirs.model.visual.named_parameters():
            parameter.requires_grad_(not frozen or name.startswith(("merger.", "downsample.")))
        ours = {"chunks": CHUNKS, "at once": MemoryConfig()} | ({} if frozen else {"recomputed": RECOMPUTED})
        theirs = {"transformers": False} | ({} if frozen else {"transformers, checkpointing": True})

        def our(policy: MemoryConfig) -> None:
            self.ours.set_memory(policy)
            our_step(self.ours, batch, self.kind)()

        def their(checkpointing: bool) -> None:
            if checkpointing:
                self.theirs.model.visual.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.theirs.model.visual.gradient_checkpointing_disable()
            their_step(self.theirs, batch, "padded", self.kind, EXPERTS[0])()

        return {name: lambda p=policy: our(p) for name, policy in ours.items()} | {
            name: lambda c=checkpointing: their(c) for name, checkpointing in theirs.items()
        }


def documents(images: int, size: Size) -> list[Document]:
    """``images`` spread evenly over documents of one length, of which the last ``TARGETS`` tokens of text count."""
    counts = [images * (n + 1) // DOCUMENTS - images * n // DOCUMENTS for n in range(DOCUMENTS)]
    whole = [document(LENGTH, [SIDE] * count, size, n) for n, count in enumerate(counts)]
    return [replace(d, trainable=d.trainable & (d.trainable.flip(0).cumsum(0).flip(0) <= TARGETS)) for d in whole]


def rows(settings: Settings) -> Iterator[Row]:
    ensure_torchvision()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[settings.size or ("large" if device.type == "cuda" else "small")]
    theirs = their_model(size).to(device).train()
    ours = from_transformers(theirs).to(device)
    sides = Sides(ours, theirs, "bf16" if device.type == "cuda" else "fp32")
    counts = (1, 16, 32) if settings.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    check_losses(ours, theirs, Batch.of(documents(16, size), device))
    peaks: dict[tuple[str, bool, int], float] = {}
    for images in counts:
        batch = Batch.of(documents(images, size), device)
        for frozen in (False, True):
            steps = sides.steps(batch, frozen)
            for name, step in steps.items():
                if images == counts[0]:
                    step()  # the first call pays for caches
                peaks[name, frozen, images] = peak_memory(step)
            mine = peaks["chunks", frozen, images]
            for name in list(steps)[1:]:
                row = f"{images} images, {'frozen' if frozen else 'trained'}"
                yield smaller_is_better(row, mine, peaks[name, frozen, images], name, "MiB")
    for name, frozen in dict.fromkeys((name, frozen) for name, frozen, _ in peaks if name != "chunks"):
        growth = [peaks[n, frozen, counts[-1]] / peaks[n, frozen, 16] for n in ("chunks", name)]
        row = f"flat {counts[-1]}/16 images, {'frozen' if frozen else 'trained'}"
        yield smaller_is_better(row, *growth, name, "times the memory")
    yield from times(sides, Batch.of(documents(32 if settings.quick else 64, size), device), settings)


def times(sides: Sides, batch: Batch, settings: Settings) -> Iterator[Row]:
    images = batch.ours.vision.grids.shape[0] if batch.ours.vision is not None else 0
    few = replace(settings, repeats=min(settings.repeats, 5))
    for frozen in (False, True):
        mine, *others = sides.steps(batch, frozen).items()
        row = f"time, {images} images, {'frozen' if frozen else 'trained'}"
        yield from throughputs(row, mine[1], dict(others), images, "images/s", few)


def plot(rows: list[Row], path: Path) -> None:
    """MiB by images a step, one line a side; trained on the left, frozen on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axes, kind in zip(panels, ("trained", "frozen"), strict=True):
        lines: dict[str, dict[int, float]] = {"mmagent, chunks of 8 images": {}}
        for row in rows:
            if row.unit == "MiB" and row.name.endswith(kind):
                images = int(row.name.split()[0])
                lines["mmagent, chunks of 8 images"][images] = row.ours
                name = row.peer_name if row.peer_name.startswith("transformers") else f"mmagent, {row.peer_name}"
                lines.setdefault(name, {})[images] = row.peer
        for (name, points), marker in zip(lines.items(), "osd^v", strict=False):
            axes.plot(list(points), list(points.values()), marker=marker, label=name)
        ticks = sorted({n for points in lines.values() for n in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_xlabel("images a step (5,120 decoder tokens at every point)")
        axes.set_title(f"Encoder {kind}")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("peak of a training step, MiB")
    figure.savefig(path, dpi=120)
    plt.close(figure)
