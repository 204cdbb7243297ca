"""Curves of training, mode against mode, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from mmagent.html.charts import linear_ticks

_LEFT, _TOP, _WIDTH, _HEIGHT, _PANEL = 50, 40, 330, 220, 400
_COLOURS = {"shared": "#1f4e8c", "fused": "#c2571a", "masked": "#3a8a4d"}


def curve_plot(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], reference: str) -> str:
    """Two panels a size, from ``(step, loss)`` of every mode: MTP training loss by step, and how far each other mode
    lies above ``reference`` (both smoothed over nine steps). One file of SVG that needs no style sheet."""
    panels: list[tuple[str, dict[str, list[tuple[float, float]]]]] = []
    for size, by_mode in curves.items():
        panels.append((f"{size}: MTP loss", {mode: _smooth(points) for mode, points in by_mode.items()}))
        base = dict(by_mode[reference])
        gaps = {m: _smooth([(x, y - base[x]) for x, y in points]) for m, points in by_mode.items() if m != reference}
        panels.append((f"{size}: above {reference}", gaps))
    width, height = _PANEL * 2, (_HEIGHT + 84) * len(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for n, (title, lines) in enumerate(panels):
        parts += _curves(_LEFT + _PANEL * (n % 2), _TOP + (_HEIGHT + 84) * (n // 2), title, lines)
    return "\n".join([*parts, "</svg>", ""])


def _smooth(points: Sequence[tuple[int, float]], window: int = 9) -> list[tuple[float, float]]:
    """Centred means; the first few steps, which fall steeply, are left out."""
    kept = points[min(10, len(points) // 2) :]
    reach = window // 2
    return [(x, fmean(y for _, y in kept[max(n - reach, 0) : n + reach + 1])) for n, (x, _) in enumerate(kept)]


def _curves(left: float, top: float, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + ([0.0] if "above" in title else [])
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    y0, y1 = y0 - 0.05 * (y1 - y0 or 1), y1 + 0.05 * (y1 - y0 or 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0 or 1) * _WIDTH, top + (y1 - y) / (y1 - y0) * _HEIGHT

    parts = [f'<text x="{left}" y="{top - 14}" font-weight="bold">{title}</text>']
    for tick in linear_ticks(y0, y1, 5):
        y = at(x0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="10">{tick:g}</text>')
    for tick in linear_ticks(x0, x1, 5):
        x = at(tick, y0)[0]
        parts.append(f'<text x="{x:.1f}" y="{top + _HEIGHT + 16}" text-anchor="middle" font-size="10">{tick:g}</text>')
    parts.append(f'<text x="{left + _WIDTH / 2}" y="{top + _HEIGHT + 32}" text-anchor="middle">step</text>')
    for n, (mode, points) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[mode]}" stroke-width="1.6"/>')
        x = left + _WIDTH - 60
        parts.append(f'<text x="{x}" y="{top + 14 + 15 * n}" fill="{_COLOURS[mode]}">{mode}</text>')
    return parts
