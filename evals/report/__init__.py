"""Reports people would rather look at: one self-contained HTML page with tables, charts, screens and trajectories.

The pieces compose: `page(title, [Section(title, body), ...])` around any of `table`, `tiles`, `facts`, `line_chart`,
`bar_chart`, `figure_clicks`, `trajectory`, `image_pair`, `code` and `details`.
"""

from evals.report.figures import ClickFigure, Mark, StepFigure, figure_clicks, screen, trajectory
from mmagent.html.charts import bar_chart, line_chart, series_of
from mmagent.html.pieces import (
    Column,
    Section,
    code,
    details,
    estimate,
    facts,
    grid,
    heading,
    image,
    image_pair,
    join,
    number,
    page,
    paragraph,
    percent,
    table,
    tag,
    tiles,
    verdict,
)

__all__ = [
    "ClickFigure",
    "Column",
    "Mark",
    "Section",
    "StepFigure",
    "bar_chart",
    "code",
    "details",
    "estimate",
    "facts",
    "figure_clicks",
    "grid",
    "heading",
    "image",
    "image_pair",
    "join",
    "line_chart",
    "number",
    "page",
    "paragraph",
    "percent",
    "screen",
    "series_of",
    "table",
    "tag",
    "tiles",
    "trajectory",
    "verdict",
]
