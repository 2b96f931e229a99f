"""The picture of a panel: its curves over steps, and what happened at which step.

Bokeh takes a tenth of a second to make a picture, and a report has fifty. But they are alike: so there is one
form for each number of curves, and the page's script gives a copy of it its names, colours and data.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from moe_runtime.metrics.report.bokeh_parts import COLOURS, DASHES, as_item, new_figure

_HEIGHT = 250
_THIN = {"min": "dotted", "max": "dashed"}
FEW_POINTS = 60  # below it each point is drawn too


class Look(NamedTuple):
    """How a curve is drawn."""

    colour: str
    dash: str
    width: float


class Form(NamedTuple):
    """What pictures have in common that differ in names, colours and data alone."""

    num_curves: int
    is_log: bool
    has_points: bool


def look_of(keys: Sequence[str]) -> list[Look]:
    """The look of each curve of a picture; least and greatest are thin, beside what lies between them."""
    if len(keys) >= 3 and {key.rpartition("/")[2] for key in keys} >= {"min", "p50", "max"}:
        return [_look_of_spread(key) for key in keys]
    return [
        Look(COLOURS[n % len(COLOURS)], DASHES[n // len(COLOURS) % len(DASHES)], 1.6)
        for n in range(len(keys))
    ]


def _look_of_spread(key: str) -> Look:
    head, _, name = key.rpartition("/")
    if not head:
        return Look(COLOURS[1], "solid", 1.6)
    return Look(COLOURS[0], _THIN.get(name, "solid"), 1.0 if name in _THIN else 2.0)


@cache
def line_figure(form: Form) -> dict[str, Any]:
    """Bokeh's JSON of a form, without data: renderers are the marks, the curves, then the points of each."""
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.models.glyphs import Line, Scatter, VSpan

    plot = new_figure("step", "", _HEIGHT, y_axis_type="log" if form.is_log else "linear", window_axis="x")
    marks = ColumnDataSource({"x": [], "colour": []})
    bare = {"selection_glyph": None, "nonselection_glyph": None, "muted_glyph": None, "hover_glyph": None}
    plot.add_glyph(marks, VSpan(x="x", line_color="colour", line_alpha=0.5, line_dash="dashed"), **bare)
    sources = [ColumnDataSource({"x": [], "y": []}) for _ in range(form.num_curves)]
    lines = [plot.add_glyph(source, Line(x="x", y="y"), **bare) for source in sources]
    for source in sources if form.has_points else ():
        plot.add_glyph(source, Scatter(x="x", y="y", line_color=None), visible=False, **bare)
    hover = HoverTool(renderers=lines, tooltips=[("$name", "@y{%.9g}"), ("step", "@x{0}")], mode="vline")
    hover.line_policy, hover.formatters, hover.attachment = "nearest", {"@y": "printf"}, "above"
    plot.add_tools(hover)
    plot.xaxis.formatter.use_scientific = False
    plot.xaxis.ticker.min_interval, plot.xaxis.ticker.num_minor_ticks = 1, 0
    if not form.is_log:
        plot.yaxis.formatter.power_limit_high = 8
    return as_item(plot)
