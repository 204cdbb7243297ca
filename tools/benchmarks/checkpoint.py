"""How long training stands still for a checkpoint, and how long until it is whole, as the state grows.

The state is that of AdamW: weights and two moments in float32. `stall` is what the training loop waits for: ours copies
to the host and writes beside it; `ours, not beside` is the same code with ``saving.background=false``; `dcp async` is
``torch.distributed.checkpoint.async_save``, `torch.save` writes one pickle. `whole` is the time until a checkpoint can
be read: ours with checksums and fsync, which the peers leave out. The writes of one turn end before the next begins.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from mmagent.dist import World
from mmagent.engine.saving import Contents, Saver, SavingConfig
from tools.benchmarks.row import Row, Settings

PARAMETERS = (1 << 20, 1 << 22, 1 << 24, 1 << 25)
_WIDTH = 1024


class _Sides:
    """The same state under each way to save it; a call returns seconds of stall, and seconds until it is whole."""

    def __init__(self, folder: Path, parameters: int, world: World):
        layers = [nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(parameters // _WIDTH**2)]
        self.folder, self.world, self.turn = folder, world, 0
        self.model = nn.Sequential(*layers).to(world.device)
        self.moments = {
            name: {key: torch.randn_like(p) for key in ("exp_avg", "exp_avg_sq")}
            for name, p in self.model.named_parameters()
        }
        self.savers = {
            beside: Saver(folder / str(beside), world, keep=1, config=SavingConfig(background=beside))
            for beside in (True, False)
        }
        for saver in self.savers.values():
            saver.root.mkdir()

    def all(self) -> dict[str, Callable[[], tuple[float, float]]]:
        return {
            "ours": lambda: self._ours(True),
            "ours, not beside": lambda: self._ours(False),
            "dcp async": self._dcp,
            "torch.save": self._pickle,
        }

    def _ours(self, beside: bool) -> tuple[float, float]:
        self.turn += 1
        saver, started = self.savers[beside], self._now()
        saver.save(self.turn, Contents({"model": self.model}, {"engine": {"optimizer": self.moments}}, {}, {}))
        stall = self._now() - started
        assert saver.settle()
        return stall, self._now() - started

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.moments}

    def _dcp(self) -> tuple[float, float]:
        shutil.rmtree(self.folder / "dcp", ignore_errors=True)
        started = self._now()
        future = dcp.async_save(self._state(), checkpoint_id=self.folder / "dcp")
        stall = self._now() - started
        getattr(future, "upload_completion", future).result()
        return stall, self._now() - started

    def _pickle(self) -> tuple[float, float]:
        started = self._now()
        torch.save(self._state(), self.folder / "state.pt")
        return (self._now() - started,) * 2

    def _now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def rows(settings: Settings) -> Iterator[Row]:
    """``stall`` and ``whole`` against every peer, for each size of the state."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    world = World(0, 1, 0, device)
    world.mesh()  # dcp wants a process group, be it of one
    for parameters in PARAMETERS[:1] if settings.quick else PARAMETERS:
        folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
        try:
            sides = _Sides(folder, parameters, world).all()
            yield from _measure(sides, f"{12 * parameters >> 20} MiB", settings.repeats)
        finally:
            shutil.rmtree(folder)


def _measure(sides: dict[str, Callable[[], tuple[float, float]]], size: str, repeats: int) -> Iterator[Row]:
    for side in sides.values():
        side()  # the first save makes buffers
    names, taken = list(sides), []
    for turn in range(repeats):
        order = names if turn % 2 == 0 else names[::-1]
        found = {name: sides[name]() for name in order}
        taken.append([found[name] for name in names])
    for column, what in enumerate(("stall", "whole")):
        times = [[one[column] for one in turn] for turn in taken]
        medians = [1e3 * statistics.median(side) for side in zip(*times, strict=True)]
        for side, peer in enumerate(names[1:], 1):
            if what == "whole" and peer == "ours, not beside":
                continue
            ratios = sorted(turn[side] / turn[0] for turn in times)
            ratio, quarter = statistics.median(ratios), len(ratios) // 4
            spread = (ratios[-1 - quarter] - ratios[quarter]) / 2 / ratio
            yield Row(f"{what}, {size}", medians[0], medians[side], peer, ratio, "ms", spread)


def plot(rows: list[Row], path: Path) -> None:
    """The stall of each way to save over the size of the state, both on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    stalls = [row for row in rows if row.name.startswith("stall")]
    lines: dict[str, list[tuple[float, float]]] = {"ours": []}
    for row in stalls:
        size = float(row.name.split()[1])
        lines.setdefault(row.peer_name, []).append((size, row.peer))
        if (size, row.ours) not in lines["ours"]:
            lines["ours"].append((size, row.ours))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == "ours" else 1.2)
    axes.set(xscale="log", yscale="log", xlabel="MiB of state", ylabel="ms that training waits")
    sizes = [size for size, _ in lines["ours"]]
    axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_title("What a checkpoint costs training")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
