"""Worlds of questions: examples a second on one core, family by family, and charts against matplotlib's.

The peer of a family is the same examples as records, encoded as PNG. The peer of charts draws the same numbers, names
and title as bars at the same size with matplotlib's Agg.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipelines.worlds import record_of
from mmagent.worlds.catalogue import all_worlds
from mmagent.worlds.drawing import generator
from mmagent.worlds.examples import World
from mmagent.worlds.plots import HEIGHT, WIDTH, Plot, draw_plot, paint_plot
from tools.benchmarks.row import Row, Settings, throughput


def rows(settings: Settings) -> Iterator[Row]:
    yield drawn_charts(settings)
    families: dict[str, list[World]] = {}
    for name, world in all_worlds().items():
        families.setdefault(name.partition("/")[0], []).append(world)
    each = 1 if settings.quick else 12
    for family, worlds in list(families.items())[: 1 if settings.quick else None]:
        yield throughput(
            f"{family} ({len(worlds)} worlds)",
            lambda worlds=worlds: [world.example("train", n) for world in worlds for n in range(each)],
            lambda worlds=worlds: [
                record_of(world, world.example("train", n), "worlds") for world in worlds for n in range(each)
            ],
            "with PNG and record",
            each * len(worlds),
            "examples/s",
            settings,
        )


def drawn_charts(settings: Settings) -> Row:
    count = 2 if settings.quick else 10
    plots = [draw_plot(generator("bench", n, "train"), 0, ("bar",)) for n in range(count)]
    return throughput(
        "bar charts painted",
        lambda: [paint_plot(plot, generator("looks", n, "train")) for n, plot in enumerate(plots)],
        lambda: [with_matplotlib(plot) for plot in plots],
        "matplotlib, Agg",
        count,
        "charts/s",
        settings,
    )


def with_matplotlib(plot: Plot) -> np.ndarray:
    """``(280, 364, 3)`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(plot.names, plot.values[0], color=plot.colours[0])
    axes.set_title(plot.title)
    axes.grid(axis="y")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
