"""The picture of a panel: its curves over steps, and what happened at which step."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from moe_runtime.metrics.report.bokeh_parts import COLOURS, DASHES, as_item, new_figure
from moe_runtime.metrics.report.curves_of_panels import labels_of

_HEIGHT = 250
MARKS = "marks"
_THIN = {"min": "dotted", "max": "dashed"}


def look_of(keys: Sequence[str]) -> list[tuple[str, str, float]]:
    """Colour, dash and width of each curve; least and greatest are thin, beside what lies between them."""
    if len(keys) >= 3 and {key.rpartition("/")[2] for key in keys} >= {"min", "p50", "max"}:
        return [_look_of_spread(key) for key in keys]
    return [(COLOURS[n % len(COLOURS)], DASHES[n // len(COLOURS) % len(DASHES)], 1.6) for n in range(len(keys))]


def _look_of_spread(key: str) -> tuple[str, str, float]:
    head, _, name = key.rpartition("/")
    if not head:
        return COLOURS[1], "solid", 1.6
    return COLOURS[0], _THIN.get(name, "solid"), 1.0 if name in _THIN else 2.0


@cache
def line_figure(keys: tuple[str, ...], unit: str, is_log: bool) -> dict[str, Any]:
    """Bokeh's JSON of a panel with these curves; renderers are named by key, data is left empty."""
    from bokeh.models import ColumnDataSource, HoverTool

    plot = new_figure("step", unit, _HEIGHT, y_axis_type="log" if is_log else "linear", window_axis="x")
    marks = ColumnDataSource({"x": [], "what": []})
    plot.vspan(x="x", source=marks, line_color=COLOURS[3], line_alpha=0.45, line_dash="dashed", name=MARKS)
    for key, label, (colour, dash, width) in zip(keys, labels_of(keys), look_of(keys), strict=True):
        source = ColumnDataSource({"x": [], "y": []})
        line = plot.line("x", "y", source=source, color=colour, line_dash=dash, line_width=width, name=key)
        plot.scatter("x", "y", source=source, color=colour, size=4, name=key, visible=False)
        shown = [(label, "@y{%.9g}"), ("step", "@x{0}")]
        style = {"line_policy": "nearest", "mode": "vline", "formatters": {"@y": "printf"}, "attachment": "above"}
        plot.add_tools(HoverTool(renderers=[line], tooltips=shown, visible=len(plot.renderers) <= 3, **style))
    plot.xaxis.formatter.use_scientific = False
    plot.xaxis.ticker.min_interval, plot.xaxis.ticker.num_minor_ticks = 1, 0
    if not is_log:
        plot.yaxis.formatter.power_limit_high = 8
    return as_item(plot)
