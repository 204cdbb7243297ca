"""Runs in a cell around a model's plotting code: a picture of the figure that it makes, and what stands in that.

Read as text and sent into :mod:`mmagent.sandbox`; never imported. The figure is the one that was saved last, else the
one that is open last; nothing is shown, closed or written elsewhere. Leaves ``figure.png`` and ``facts.json``.
"""

import json
import random

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from matplotlib.text import Text

DPI, MOST_PIXELS, MOST = 100, 4_000_000, 1000
DUMP, HEX, TEXT, NUMPY = json.dumps, to_hex, Text, np
kept = {}


def capture(figure, *_, **__):
    """The figure as it is now, at a resolution of our own."""
    figure.set_dpi(DPI)
    width, height = figure.get_size_inches() * DPI
    if not (1 <= width * height <= MOST_PIXELS):
        raise ValueError(f"a figure of {width:.0f} x {height:.0f} pixels")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    with open("figure.png", "wb") as file:
        canvas.print_png(file)
    kept["facts"] = facts(figure)


def facts(figure):
    """Texts, and marks as (kind, colour, values)."""
    texts = [t.get_text().strip() for t in figure.findobj(TEXT) if t.get_visible() and t.get_text().strip()]
    marks = []
    for axes in figure.axes:
        bars = [bar for container in axes.containers if isinstance(container, BarContainer) for bar in container]
        for container in axes.containers:
            if isinstance(container, BarContainer):
                across = container.orientation == "horizontal"
                for bar in container:
                    size = bar.get_width() if across else bar.get_height()
                    marks.append(("barh" if across else "bar", bar.get_facecolor(), [size]))
        for line in axes.lines:
            marks.append(("line", line.get_color(), list(line.get_ydata())))
        for patch in axes.patches:
            if isinstance(patch, Wedge):
                marks.append(("pie", patch.get_facecolor(), [(patch.theta2 - patch.theta1) / 3.6]))
            elif patch not in bars:
                marks.append(("patch", patch.get_facecolor(), []))
        for found in axes.collections:
            kind = {PathCollection: "scatter", QuadMesh: "mesh"}.get(type(found))
            kind = kind or ("area" if isinstance(found, PolyCollection) else "collection")
            colours = found.get_facecolor()
            values = [v for _, v in found.get_offsets()] if kind == "scatter" else []
            marks.append((kind, colours[0] if len(colours) else "black", values))
        marks += [("image", "black", list(NUMPY.ravel(image.get_array())[:MOST])) for image in axes.images]
    out = []
    for kind, colour, values in marks[:MOST]:
        numbers = [float(v) for v in values[:MOST] if isinstance(v, int | float | NUMPY.number)]
        out.append([kind, HEX(colour), [v for v in numbers if NUMPY.isfinite(v)]])
    return {"texts": [text[:200] for text in texts[:MOST]], "marks": out}


random.seed(0)
np.random.seed(0)
plt.show = plt.close = lambda *_, **__: None
Figure.savefig = Figure.show = capture
with open("answer.py") as answer:
    source = answer.read()
exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})
if not kept:
    numbers = plt.get_fignums()
    if not numbers:
        raise ValueError("the code makes no figure")
    capture(plt.figure(numbers[-1]))
with open("facts.json", "w") as file:
    file.write(DUMP(kept["facts"]))
