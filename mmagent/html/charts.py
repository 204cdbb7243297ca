"""Charts as inline SVG: lines with linear or logarithmic axes, grouped bars with intervals. No library needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mmagent.html.pieces import Interval, join, number, percent

COLOURS = 8
MAX_POINTS = 400
_WIDTH, _HEIGHT = 560, 270
_TOP, _BOTTOM, _RIGHT = 12, 42, 14

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """One axis: data range ``low..high`` laid over pixels ``start..end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 6) -> list[float]:
        return _log_ticks(self.low, self.high, wanted) if self.log else linear_ticks(self.low, self.high, wanted)


def linear_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round values (steps of 1, 2 or 5 times a power of ten) within ``low..high``."""
    rough = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        ticks = [d * 10.0**p for p in range(first, last + 1) for d in digits]
        ticks = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks[:: max(math.ceil(len(ticks) / (wanted + 2)), 1)]
    return linear_ticks(low, high, wanted)


def series_of(
    rows: Sequence[Mapping[str, object]], names: Mapping[str, str] | Sequence[str], x: str = "step"
) -> dict[str, list[tuple[float, float]]]:
    """Columns of a log as series for :func:`line_chart`: ``names`` maps a key of the rows to what the legend says.

    Rows without a key are skipped for it, and a series without any point is left out.
    """
    titles = names if isinstance(names, Mapping) else {name: name for name in names}
    found = {
        title: [(float(row[x]), float(row[key])) for row in rows if isinstance(row.get(key), int | float)]
        for key, title in titles.items()
    }
    return {title: points for title, points in found.items() if points}


def line_chart(
    series: Mapping[str, Points],
    title: str,
    *,
    x_label: str = "step",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    smooth: float = 0.0,
    exact: Collection[str] = (),
    like: Mapping[str, str] | None = None,
    phases: Mapping[str, float] | None = None,
    from_zero: bool = False,
    settled: bool = False,
) -> Markup:
    """Several series of ``(x, y)`` in one chart, with a legend that tells each last value.

    ``smooth`` in [0, 1) draws an exponential moving average over the faint raw line; series named in ``exact`` are
    drawn point by point instead. ``like`` names the series whose colour another one takes, dashed. ``phases`` names
    vertical lines, above the plot. ``settled`` fits the axis to what follows the first tenth where that is much less
    than all, and says so; the rest is cut off.
    Points that are not finite (or not positive on a log axis) are left out, and the legend counts them.
    """
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth must be in [0, 1), got {smooth}")
    kept = {name: _usable(points, log_x, log_y) for name, points in series.items()}
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    if not xs:
        return Markup('<figure class="chart"><figcaption>{}</figcaption><p class="quiet">no data</p></figure>').format(
            title
        )
    smooths = {name: 0.0 if name in exact else smooth for name in kept}
    fitted = _settled(kept, smooths) if settled else None
    low, high = _padded(*(fitted or (min(ys), max(ys))), log_y, from_zero)
    y_axis = Axis(low, high, _HEIGHT - _BOTTOM, _TOP, log_y)
    y_ticks = y_axis.ticks()
    left = 16 + 7 * max(len(number(t)) for t in y_ticks) + (18 if y_label else 0)
    x_axis = Axis(*_widened(min(xs), max(xs), log_x), left, _WIDTH - _RIGHT, log_x)
    colours = colours_of(kept, like or {})
    lines = join(
        _line(colours[name], thin(points), x_axis, y_axis, smooths[name], name in exact, name in (like or {}))
        for name, points in kept.items()
    )
    marks, above = phase_marks(phases or {}, x_axis, _TOP, _HEIGHT - _BOTTOM)
    shown = {name: thin(_smoothed(points, smooths[name])) for name, points in kept.items()}
    hover = {
        "series": [{"name": n, "points": [[_short(x), _short(y)] for x, y in p]} for n, p in shown.items()],
        "left": x_axis.start,
        "right": x_axis.end,
        "low": x_axis.low,
        "high": x_axis.high,
        "logX": log_x,
        "name": x_label,
    }
    return Markup(
        '<figure class="chart" data-points="{}"><figcaption>{}</figcaption>{}'
        '<svg viewBox="0 {} {} {}" role="img" aria-label="{}">{}{}{}<line class="cursor" visibility="hidden" '
        'x1="0" x2="0" y1="{}" y2="{}"/></svg><div class="readout"></div></figure>'
    ).format(
        json.dumps(hover, separators=(",", ":")),
        title,
        _legend(series, shown, colours, like or {}, _told_cut(ys, y_axis) if fitted else ""),
        -above,
        _WIDTH,
        _HEIGHT + above,
        title,
        _frame(x_axis, y_axis, y_ticks, x_label, y_label),
        marks,
        _clipped(lines, x_axis, y_axis) if fitted else lines,
        _TOP,
        _HEIGHT - _BOTTOM,
    )


def colours_of(names: Iterable[str], like: Mapping[str, str]) -> dict[str, int]:
    """A number for each of ``names``, in order; the same for one that is ``like`` another."""
    own = [name for name in names if name not in like]
    return {name: own.index(like.get(name, name)) for name in names}


def middle(points: Points, smooth: float = 0.8) -> tuple[float, float]:
    """The lowest and highest smoothed value after the first tenth, in which a run settles; of all that is finite where
    there are fewer than ten points. Raises ``ValueError`` where none is finite."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    late = [y for _, y in _smoothed(finite, smooth if len(finite) >= 10 else 0.0)[len(finite) // 10 :]]
    return min(late), max(late)


def _settled(kept: Mapping[str, Points], smooths: Mapping[str, float]) -> tuple[float, float] | None:
    """The range of an axis that leaves the first tenth and single spikes out (of a hundred values of a line the two
    lowest and the two highest), where that of all would be over half as much again."""
    ys, lows, highs = [y for points in kept.values() for _, y in points], [], []
    for name, points in kept.items():
        if points:
            late = sorted(y for _, y in points[len(points) // 10 :])
            low, high = middle(points, smooths[name])
            lows.append(min(low, late[len(late) // 50]))
            highs.append(max(high, late[-1 - len(late) // 50]))
    low, high = min(lows), max(highs)
    return (low, high) if high > low and max(ys) - min(ys) > 1.5 * (high - low) else None


def _told_cut(ys: Sequence[float], axis: Axis) -> str:
    beyond = {y: max(axis.low - y, y - axis.high) for y in ys if not axis.low <= y <= axis.high}
    return f"cut off at the edge: values to {number(max(beyond, key=beyond.__getitem__))}" if beyond else ""


def _clipped(lines: Markup, x_axis: Axis, y_axis: Axis) -> Markup:
    """``lines`` within the plot alone; circles at its sides stay whole."""
    box = (x_axis.start - 4, _TOP, x_axis.end - x_axis.start + 8, y_axis.start - _TOP)
    x, y, width, height = (f"{side:.1f}" for side in box)
    return Markup('<svg x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">{}</svg>').format(
        lines, x=x, y=y, w=width, h=height
    )


def _usable(points: Points, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for x, y in points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about ``limit`` points: the lowest and highest of every bucket, so that no spike is lost."""
    points = list(points)
    if len(points) <= limit:
        return points
    buckets = limit // 2
    out = []
    for n in range(buckets):
        part = points[n * len(points) // buckets : (n + 1) * len(points) // buckets]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return out if out[-1] == points[-1] else [*out, points[-1]]


def _smoothed(points: Points, smooth: float) -> list[tuple[float, float]]:
    """Exponential moving average without start-up bias."""
    out, average, weight = [], 0.0, 0.0
    for x, y in points:
        average = smooth * average + (1 - smooth) * y
        weight = smooth * weight + (1 - smooth)
        out.append((x, average / weight))
    return out


def _padded(low: float, high: float, log: bool, from_zero: bool) -> tuple[float, float]:
    if log:
        low, high = _widened(low, high, True)
        margin = (high / low) ** 0.04
        return low / margin, high * margin
    low, high = _widened(min(low, 0.0) if from_zero else low, high, False)
    margin = 0.05 * (high - low)
    return (low if from_zero and low == 0 else low - margin), high + margin


def _widened(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range that is not empty, so that a single value can be drawn."""
    if high > low:
        return low, high
    return (low / 2, high * 2) if log else (low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2)


def _line(
    n: int, points: Points, x_axis: Axis, y_axis: Axis, smooth: float, dots: bool = False, dashed: bool = False
) -> Markup:
    def path(some: Points) -> str:
        return "M" + "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in some)

    colour = n % COLOURS
    if not points:
        return Markup("")
    marks = join(
        Markup('<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(colour, x_axis(x), y_axis(y))
        for x, y in points
        if dots or len(points) == 1
    )
    if len(points) == 1:
        return marks
    dash = Markup(' stroke-dasharray="7 4"') if n >= COLOURS or dashed else ""
    raw = Markup('<path class="raw c{}" d="{}"/>').format(colour, path(points)) if smooth else ""
    line = Markup('<path class="series c{}" d="{}"{}/>').format(colour, path(_smoothed(points, smooth)), dash)
    return join((raw, line, marks))


def _legend(
    series: Mapping[str, Points],
    shown: Mapping[str, Points],
    colours: Mapping[str, int],
    like: Mapping[str, str],
    note: str,
) -> Markup:
    entries = []
    for name, points in shown.items():
        lost = sum(1 for _, y in series[name] if not math.isfinite(y))
        entries.append(
            Markup('<span><i class="c{}{}"></i>{} <b>{}</b>{}</span>').format(
                colours[name] % COLOURS,
                " dashed" if name in like else "",
                name,
                number(points[-1][1]) if points else "–",
                f" ({lost} not finite)" if lost else "",
            )
        )
    entries += [Markup("<span>{}</span>").format(note)] if note else []
    return Markup('<div class="legend">{}</div>').format(join(entries))


def _frame(x_axis: Axis, y_axis: Axis, y_ticks: Sequence[float], x_label: str, y_label: str) -> Markup:
    rows = join(
        Markup(
            '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            '<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(x_axis.start, x_axis.end, x_axis.start - 7, y_axis(t) + 4, number(t), y=y_axis(t))
        for t in y_ticks
    )
    columns = join(
        Markup(
            '<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{:.1f}"/>'
            '<text x="{x:.1f}" y="{:.1f}" text-anchor="middle">{}</text>'
        ).format(y_axis.start + 4, y_axis.start + 17, number(t), x=x_axis(t), y=y_axis.start)
        for t in x_axis.ticks(8)
    )
    base = Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>').format(
        x_axis.start, x_axis.end, y=y_axis.start
    )
    names = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
        (x_axis.start + x_axis.end) / 2, _HEIGHT - 6, x_label
    )
    if y_label:
        middle = (y_axis.start + y_axis.end) / 2
        names += Markup('<text transform="translate(13 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>').format(
            middle, y_label
        )
    return rows + columns + base + names


def phase_marks(phases: Mapping[str, float], x_axis: Axis, top: float, bottom: float) -> tuple[Markup, int]:
    """Vertical lines from ``top`` to ``bottom`` with their names above the plot, in as many rows as let none lie on
    another; a name that its neighbour has already is not told again. And the height that the names need above 0."""
    rows: list[tuple[float, str]] = []  # where the last name of each ends, and that name
    parts, above = [], 0
    for name, x in sorted(phases.items(), key=lambda item: item[1]):
        if not x_axis.low <= x <= x_axis.high:
            continue
        name, wide = name.strip(), 7.0 * len(name.strip())
        at = max(min(x_axis(x), x_axis.end - wide), 0.0)
        row = next((n for n, (end, _) in enumerate(rows) if at >= end + 6), len(rows))
        told = all(end + 6 <= at or last != name for end, last in rows)
        y = top - 6 - 14 * row
        parts.append(
            Markup('<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"><title>{}</title></line>').format(
                top, bottom, name, x=x_axis(x)
            )
        )
        if told:
            rows[row:] = [(at + wide, name), *rows[row + 1 :]]
            parts.append(Markup('<text x="{:.1f}" y="{:.0f}">{}</text>').format(at, y, name))
            above = max(above, round(12 - y))
    return join(parts), above


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def bar_chart(
    groups: Mapping[str, Mapping[str, Interval | float]],
    title: str,
    *,
    maximum: float | None = 1.0,
    show: Callable[[float], str] = percent,
) -> Markup:
    """Horizontal bars, one group a row, one bar a series, with the interval where the value is an :class:`Interval`.

    ``maximum`` is the end of the axis (None: the largest value); ``show`` writes a value.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    values = [v.high if isinstance(v, Interval) else v for bars in groups.values() for v in bars.values()]
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return line_chart({}, title)
    thick, gap = 12, 11
    left = 16 + min(max(len(label) for label in groups), 30) * 8  # of bold letters
    end = maximum if maximum is not None else max(*values, 0.0) or 1.0
    axis = Axis(0.0, end, left, _WIDTH - 78)
    parts, y = [], 8.0
    for label, bars in groups.items():
        height = thick * len(bars)
        text = label if len(label) <= 30 else label[:29] + "…"
        parts.append(
            Markup('<text class="strong" x="{}" y="{:.1f}" text-anchor="end">{}<title>{}</title></text>').format(
                left - 9, y + height / 2 + 4, text, label
            )
        )
        for n, (name, value) in enumerate(bars.items()):
            parts.append(_bar(names.index(name) % COLOURS, value, axis, y + n * thick, thick, show))
        y += height + gap
    grid = join(
        Markup(
            '<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{:.1f}"/>'
            '<text x="{x:.1f}" y="{:.1f}" text-anchor="middle">{}</text>'
        ).format(y - gap / 2, y + 11, show(t).replace(".0 %", " %"), x=axis(t))
        for t in axis.ticks()
    )
    legend = join(
        Markup('<span><i class="c{}"></i>{}</span>').format(n % COLOURS, name) for n, name in enumerate(names)
    )
    return Markup(
        '<figure class="chart bars"><figcaption>{}</figcaption>{}'
        '<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}{}</svg></figure>'
    ).format(
        title,
        Markup('<div class="legend">{}</div>').format(legend) if len(names) > 1 else "",
        _WIDTH,
        y + 18,
        title,
        grid,
        join(parts),
    )


def _bar(colour: int, value: Interval | float, axis: Axis, y: float, thick: float, show: Callable) -> Markup:
    mean = value.mean if isinstance(value, Interval) else float(value)
    if not math.isfinite(mean):
        return Markup('<text x="{:.1f}" y="{:.1f}">–</text>').format(axis.start + 4, y + thick - 3)
    width = max(axis(mean) - axis.start, 1.0)
    bar = Markup('<rect class="f{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5"/>').format(
        colour, axis.start, y + 1, width, thick - 2
    )
    right = axis(mean)
    if isinstance(value, Interval):
        low, right = axis(value.low), max(axis(value.high), right)
        bar += Markup('<path class="whisker" d="M{:.1f} {y:.1f}H{:.1f}"/>').format(
            low, axis(value.high), y=y + thick / 2
        )
    return bar + Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(right + 6, y + thick - 2.5, show(mean))
