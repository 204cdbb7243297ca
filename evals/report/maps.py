"""Heat maps and stacked areas as inline SVG, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from mmagent.html.charts import COLOURS, Axis, phase_marks
from mmagent.html.pieces import join, number, percent

COLUMNS = 120
"""Most columns of a heat map or area; neighbours are averaged."""
_WIDTH, _RIGHT = 1040, 60


def heat_map(
    rows: Mapping[str, Sequence[float]],
    steps: Sequence[float],
    title: str,
    *,
    full: float,
    show: Callable[[float], str] = percent,
    about: str = "",
) -> Markup:
    """One line a name of ``rows``, one column a step: above zero the warmer, below the colder, in full colour from
    ``full`` on. A number that is not finite leaves its cell empty. ``show`` writes a value, for who points at it; the
    row's mean stands at its end."""
    if not rows or not steps:
        return Markup('<figure class="chart"><figcaption>{}</figcaption><p class="quiet">no data</p></figure>').format(
            title
        )
    ends, columns = _binned(rows, steps)
    height = 18 if len(rows) <= 32 else max(576 // len(rows), 2)
    left = 16 + 7 * min(max(len(name) for name in rows), 30)
    wide = (_WIDTH - left - _RIGHT) / len(ends)
    parts = []
    for n, (name, values) in enumerate(columns.items()):
        y = 6 + n * height
        if height >= 9:
            parts.append(
                Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}<title>{}</title></text>').format(
                    left - 8, y + height / 2 + 4, name if len(name) <= 30 else name[:29] + "…", name
                )
            )
            mean = [v for v in rows[name] if math.isfinite(v)]
            text = show(sum(mean) / len(mean)) if mean else "–"
            parts.append(
                Markup('<text x="{}" y="{:.1f}">{}</text>').format(_WIDTH - _RIGHT + 6, y + height / 2 + 4, text)
            )
        for k, value in enumerate(values):
            if not math.isfinite(value):
                continue
            depth = min(abs(value) / full, 1.0)
            parts.append(
                Markup(
                    '<rect class="f{}" opacity="{:.2f}" x="{:.1f}" y="{}" width="{:.2f}" height="{}">'
                    "<title>{}, step {}: {}</title></rect>"
                ).format(
                    4 if value > 0 else 0,
                    depth,
                    left + k * wide,
                    y,
                    wide + 0.3,
                    height - 1,
                    name,
                    number(ends[k]),
                    show(value),
                )
            )
    bottom = 6 + len(rows) * height
    frame = Markup('<rect x="{}" y="6" width="{}" height="{}" fill="none" class="axis"/>').format(
        left, _WIDTH - _RIGHT - left, bottom - 7
    )
    feet = Markup('<text x="{}" y="{}">step {}</text><text x="{}" y="{}" text-anchor="end">step {}</text>').format(
        left, bottom + 14, number(steps[0]), _WIDTH - _RIGHT, bottom + 14, number(steps[-1])
    )
    return Markup(
        '<figure class="chart wide"><figcaption>{}</figcaption>{}'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}{}</svg></figure>'
    ).format(
        title,
        Markup('<div class="legend"><span>{}</span></div>').format(about) if about else "",
        _WIDTH,
        bottom + 20,
        title,
        join(parts),
        frame,
        feet,
    )


def _binned(rows: Mapping[str, Sequence[float]], steps: Sequence[float]) -> tuple[list[float], dict[str, list[float]]]:
    """At most :data:`COLUMNS` runs of neighbouring steps: their last steps, and each row's means."""
    width = max(math.ceil(len(steps) / COLUMNS), 1)
    cuts = range(0, len(steps), width)

    def mean(values: Sequence[float]) -> float:
        known = [v for v in values if math.isfinite(v)]
        return sum(known) / len(known) if known else math.nan

    ends = [steps[min(at + width, len(steps)) - 1] for at in cuts]
    return ends, {name: [mean(values[at : at + width]) for at in cuts] for name, values in rows.items()}


def stacked_area(
    series: Mapping[str, Sequence[float]],
    steps: Sequence[float],
    title: str,
    *,
    y_label: str = "",
    phases: Mapping[str, float] | None = None,
) -> Markup:
    """``series`` of equal length one upon the other, over ``steps``; the legend tells each one's mean and share. More
    than there are colours: the smallest are added up. ``phases`` names vertical lines."""
    names = [name for name, values in series.items() if any(values)]
    if len(names) > COLOURS:
        small = sorted(names, key=lambda name: sum(series[name]))[: len(names) - COLOURS + 1]
        rest = ", ".join(name for name in names if name in small)
        added = [sum(column) for column in zip(*(series[name] for name in small), strict=True)]
        series = {**{name: series[name] for name in names if name not in small}, rest: added}
        names = list(series)
    if not names or not steps:
        return Markup('<figure class="chart"><figcaption>{}</figcaption><p class="quiet">no data</p></figure>').format(
            title
        )
    ends, columns = _binned({name: series[name] for name in names}, steps)
    totals = [sum(columns[name][k] for name in names) for k in range(len(ends))]
    if len(ends) == 1:  # an area needs two
        ends, totals = [ends[0] - 0.5, ends[0] + 0.5], totals * 2
        columns = {name: values * 2 for name, values in columns.items()}
    top, bottom, left = 10, 250, 62 + (16 if y_label else 0)
    x_axis = Axis(ends[0], ends[-1], left, _WIDTH - 14)
    y_axis = Axis(0.0, max(totals) * 1.05 or 1.0, bottom, top)
    below, parts = [0.0] * len(ends), []
    for n, name in enumerate(names):
        above = [low + value for low, value in zip(below, columns[name], strict=True)]
        up = "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in zip(ends, above, strict=True))
        down = "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in zip(ends[::-1], below[::-1], strict=True))
        parts.append(Markup('<path class="f{}" d="M{}L{}Z"><title>{}</title></path>').format(n, up, down, name))
        below = above
    mean = {name: sum(series[name]) / len(series[name]) for name in names}
    whole = sum(mean.values())
    legend = join(
        Markup('<span><i class="c{}"></i>{} <b>{}</b> ({})</span>').format(
            n, name, number(mean[name]), percent(mean[name] / whole)
        )
        for n, name in enumerate(names)
    )
    marks, above = phase_marks(phases or {}, x_axis, top, bottom)
    return Markup(
        '<figure class="chart wide"><figcaption>{}</figcaption><div class="legend">{}</div>'
        '<svg viewBox="0 {} {} {}" role="img" aria-label="{}">{}{}{}</svg></figure>'
    ).format(
        title,
        legend,
        -above,
        _WIDTH,
        bottom + 40 + above,
        title,
        _axes(x_axis, y_axis, y_label),  # below the areas, which it would cross
        join(parts),
        marks,
    )


def _axes(x_axis: Axis, y_axis: Axis, y_label: str) -> Markup:
    ticks = join(
        Markup(
            '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            '<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(x_axis.start, x_axis.end, x_axis.start - 7, y_axis(t) + 4, number(t), y=y_axis(t))
        for t in y_axis.ticks()
    )
    feet = join(
        Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
            x_axis(t), y_axis.start + 17, number(t)
        )
        for t in x_axis.ticks(10)
    )
    name = Markup('<text transform="translate(13 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>').format(
        (y_axis.start + y_axis.end) / 2, y_label
    )
    return ticks + feet + (name if y_label else Markup(""))
