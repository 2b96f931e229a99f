"""What all pictures of the report have in common, and Bokeh's own script.

Pictures are made here without their data, as Bokeh's JSON; the page's script fills them from the data that
the page holds once, and again whenever a live page gets more. Their colours but those of the data come from
the page's style sheet (custom properties named --bk-...), so that light and dark are one picture.
"""

from functools import cache
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError

# Seen well on white and on near black, and told apart by most eyes; eight, then the same dashed.
COLOURS = ("#2f7fd0", "#d9730d", "#2b9a5b", "#cf4152", "#8a63d2", "#1795a3", "#c2518f", "#8f7536")
DASHES = ("solid", "dashed", "dotted", "dotdash")


def require_bokeh() -> None:
    """Raise ConfigError if Bokeh is not installed."""
    try:
        import bokeh  # noqa: F401
    except ImportError:
        remedy = "pip install 'moe_runtime[report]'"
        raise ConfigError(f"report: expected the package bokeh, which draws, got none; {remedy}") from None


@cache
def library() -> str:
    """Bokeh's script, the part that draws plots; no widgets, no tables, no formulas."""
    from bokeh.settings import settings

    return (Path(settings.bokehjs_path()) / "js" / "bokeh.min.js").read_text(encoding="utf-8")


def new_figure(x_axis: str, y_axis: str, height: int, **more: Any) -> Any:
    """An empty picture, as wide as its place, with ranges that the page's script sets."""
    from bokeh.models import Range1d
    from bokeh.plotting import figure

    given = {"x_range": Range1d(0, 1), "tools": "box_zoom,pan,reset,save", "toolbar_location": "above"}
    plot = figure(height=height, sizing_mode="stretch_width", output_backend="canvas", **(given | more))
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.min_border_right = 12
    plot.hold_render = True  # until the page's script has filled it
    plot.xaxis.axis_label, plot.yaxis.axis_label = x_axis, y_axis
    for axis in plot.axis:
        axis.axis_label_text_font_size, axis.major_label_text_font_size = "12px", "11px"
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_standoff = 4
    return plot


def as_item(plot: Any) -> dict[str, Any]:
    """A picture as the page's script embeds it."""
    from bokeh.embed import json_item

    return dict(json_item(plot))
