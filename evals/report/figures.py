"""Screens with what the agent did on them, and whole trajectories step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mmagent.html.pieces import Picture, code, data_uri, details, join, picture_size, png, verdict

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """Where an action fell, in pixels of the picture: one point for a click, several for a drag."""

    points: tuple[tuple[float, float], ...]
    label: str = ""


@dataclass(frozen=True)
class ClickFigure:
    """A screen, the agent's ``marks`` on it and the right ``boxes`` (x1, y1, x2, y2), all in pixels of the picture.

    ``success`` None means that nothing could be judged. ``caption`` is the task, ``says`` what the model wrote.
    """

    picture: Picture
    marks: tuple[Mark, ...] = ()
    boxes: tuple[Box, ...] = ()
    success: bool | None = None
    caption: str = ""
    says: str = ""


@dataclass(frozen=True)
class StepFigure:
    """One turn of an episode: what was shown, what the model wrote, what was done and what came back."""

    picture: Picture | None
    said: str
    action: str = ""
    note: str = ""
    marks: tuple[Mark, ...] = ()


def figure_clicks(items: Sequence[ClickFigure]) -> Markup:
    """A gallery of screens with clicks drawn on them: green ring and ✓ for success, red ring and ✗ for failure."""
    cards = []
    for item in items:
        kind = _kind(item.success)
        cards.append(
            Markup('<figure class="card {}">{}<figcaption>{} {}{}</figcaption></figure>').format(
                kind,
                screen(item.picture, item.marks, item.boxes, item.success),
                verdict(item.success),
                item.caption,
                Markup('<div class="says"><code>{}</code></div>').format(_cut(item.says)) if item.says else "",
            )
        )
    return Markup('<div class="gallery">{}</div>').format(join(cards))


def screen(
    picture: Picture, marks: Sequence[Mark] = (), boxes: Sequence[Box] = (), success: bool | None = None
) -> Markup:
    """One picture with its overlay, as an SVG that scales with the page."""
    data = png(picture)
    width, height = picture_size(data)
    unit = max(min(width, height), 64) / 160  # marks keep their look on small and large screens
    kind = _kind(success) or "none"
    target = join(
        Markup(
            '<rect class="target" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" stroke-width="{:.1f}"/>'
        ).format(x1, y1, x2 - x1, y2 - y1, 1.3 * unit)
        for x1, y1, x2, y2 in boxes
    )
    return Markup(
        '<svg class="screen" viewBox="0 0 {w} {h}" role="img" aria-label="screen with {n} marked actions">'
        '<image href="{}" width="{w}" height="{h}"/>{}{}</svg>'
    ).format(data_uri(data), target, join(_mark(m, kind, unit) for m in marks), w=width, h=height, n=len(marks))


def _mark(mark: Mark, kind: str, unit: float) -> Markup:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in mark.points)
    drag = Markup("")
    if len(mark.points) > 1:
        drag = Markup(
            '<path class="halo" d="{d}" stroke-width="{:.1f}"/><path class="mark {}" d="{d}" stroke-width="{:.1f}"/>'
        ).format(3.6 * unit, kind, 1.8 * unit, d=path)
    x, y = mark.points[-1]
    title = Markup("<title>{}</title>").format(mark.label) if mark.label else ""
    return drag + Markup(
        '<g>{}<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" stroke-width="{:.1f}"/>'
        '<circle class="mark {k}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" stroke-width="{:.1f}"/>'
        '<circle class="dot {k}" cx="{x:.1f}" cy="{y:.1f}" r="{:.1f}"/></g>'
    ).format(title, 4.2 * unit, 2.2 * unit, 1.5 * unit, x=x, y=y, r=6 * unit, k=kind)


def trajectory(steps: Sequence[StepFigure], summary: str, success: bool | None) -> Markup:
    """An episode that opens on a click, one card a step."""
    cards = []
    for n, step in enumerate(steps, 1):
        picture = screen(step.picture, step.marks, success=success) if step.picture is not None else ""
        words = [Markup("<b>{}. {}</b>").format(n, _cut(step.action) or "no action")]
        if step.note:
            words.append(Markup("<div>{}</div>").format(_cut(step.note, 600)))
        if step.said and step.said != step.action:
            words.append(code(step.said, 4000))
        cards.append(Markup('<div class="step">{}<div class="words">{}</div></div>').format(picture, join(words)))
    title = Markup('{} {} <span class="quiet">· {} steps</span>').format(verdict(success), summary, len(steps))
    return details(title, Markup('<div class="steps">{}</div>').format(join(cards)), "trajectory")


def _kind(success: bool | None) -> str:
    return "" if success is None else ("good" if success else "bad")


def _cut(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
