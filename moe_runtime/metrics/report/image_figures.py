"""The pictures that are made of cells: loads of experts, numbers of layers, boxes of a pipeline."""

from functools import cache
from typing import Any

import numpy as np

from moe_runtime.metrics.report.bokeh_parts import as_item, new_figure
from moe_runtime.metrics.report.load_frames import DEAD

KIND_COLOURS = ("#f0982a", "#4bab66", "#55c0c4", "#5a8fe0")  # as the drawings of schedules have them
_DEAD_COLOUR = "#d1007f"
_GREATEST = 8.0  # loads above it have the colour of it
_IDLE, _FAIR, _BUSY = (24, 63, 122), (226, 226, 226), (176, 58, 10)
_NUM_COLOURS = 120


def load_palette() -> list[str]:
    """Colours of loads from `DEAD` to `_GREATEST`, evenly by ratio: blue is idle, grey fair, brown busy."""
    low, high = np.log(DEAD), np.log(_GREATEST)
    places = np.linspace(low, high, _NUM_COLOURS)
    return [_mixed(_IDLE, 1 - p / low) if p < 0 else _mixed(_BUSY, 1 - p / high) for p in places]


@cache
def forms() -> dict[str, Any]:
    """Bokeh's JSON of each kind of picture, by kind; without data."""
    timeline = _boxes()
    return {
        "load": _load_by_expert(),
        "loadTime": _load_over_time(),
        "layers": _layer_numbers(),
        "measured": timeline,
        "ideal": timeline,
    }


def _load_by_expert() -> dict[str, Any]:
    """Layer by expert, of one frame."""
    return _load_figure("expert", "layer", [("expert", "@expert{0}"), ("layer", "@layer{0}")])


def _load_over_time() -> dict[str, Any]:
    """Expert by frame, of one layer."""
    return _load_figure("step", "expert", [("expert", "@expert{0}"), ("step", "@step{0}")])


def _layer_numbers() -> dict[str, Any]:
    """Layer by time, of one number."""
    from bokeh.models import LinearColorMapper
    from bokeh.palettes import cividis

    mapper = LinearColorMapper(palette=list(cividis(64)), low=0, high=1, nan_color="rgba(0,0,0,0)")
    shown = [("value", "@image{%.9g}"), ("layer", "@layer{0}"), ("step", "@step{0}")]
    return _image_figure("step", "layer", mapper, shown)


def _boxes() -> dict[str, Any]:
    """A timeline: a row of boxes for each rank."""
    from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d

    plot = new_figure("ms", "", 240, y_range=Range1d(0, 1), title=None)
    plot.min_border_left = 110  # as wide for short labels, so that both timelines have one scale
    empty: dict[str, list[float]] = {name: [] for name in ("left", "right", "bottom", "top")}
    texts: dict[str, list[str]] = {"fill": [], "entry": [], "from": [], "to": [], "comm": [], "exposed": []}
    source, waits = ColumnDataSource({**empty, **texts}), ColumnDataSource(dict(empty))
    place = {"left": "left", "right": "right", "bottom": "bottom", "top": "top"}
    drawn = plot.quad(
        **place, source=source, fill_color="fill", line_color="#00000055", line_width=0.5, name="boxes"
    )
    plot.quad(
        **place,
        source=waits,
        fill_color="#ffffff",
        fill_alpha=0.55,
        line_color=None,
        hatch_pattern="/",
        hatch_color="#222222",
        hatch_alpha=0.7,
        hatch_scale=9,
        hatch_weight=1.2,
        name="exposed",
    )
    said = [("", "@entry"), ("ms", "@from{0.000} to @to{0.000}"), ("exchange", "@comm{0.000} ms")]
    said += [("exposed", "@exposed{0.000} ms")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=said))
    plot.yaxis.ticker = FixedTicker(ticks=[])
    plot.ygrid.visible = False
    return as_item(plot)


def _load_figure(x_axis: str, y_axis: str, shown: list[tuple[str, str]]) -> dict[str, Any]:
    from bokeh.models import LogColorMapper

    mapper = LogColorMapper(
        palette=load_palette(), low=DEAD, high=_GREATEST, low_color=_DEAD_COLOUR, nan_color="rgba(0,0,0,0)"
    )
    return _image_figure(x_axis, y_axis, mapper, [("load / fair share", "@image{%.4g}"), *shown])


def _image_figure(x_axis: str, y_axis: str, mapper: Any, shown: list[tuple[str, str]]) -> dict[str, Any]:
    from bokeh.models import ColorBar, ColumnDataSource, FixedTicker, HoverTool, Range1d

    plot = new_figure(x_axis, y_axis, 320, y_range=Range1d(0, 1))
    cell = np.zeros((1, 1), dtype=np.float32)
    names = [
        name for name in ("expert", "layer", "step") if f"@{name}" in " ".join(text for _, text in shown)
    ]
    columns: dict[str, list[Any]] = {"image": [cell], "x": [0], "y": [0], "dw": [1], "dh": [1]}
    columns |= {name: [cell] for name in names}
    source = ColumnDataSource(columns)
    drawn = plot.image("image", "x", "y", "dw", "dh", source=source, color_mapper=mapper, name="image")
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=shown, formatters={"@image": "printf"}))
    bar = ColorBar(color_mapper=mapper, width=10, padding=4, major_label_text_font_size="11px")
    bar.background_fill_color = None
    if type(mapper).__name__ == "LogColorMapper":
        ticks = [DEAD, 0.1, 0.3, 1, 2, 4, _GREATEST]
        bar.ticker = FixedTicker(ticks=ticks)
        bar.major_label_overrides = {tick: f"{tick:g}" for tick in ticks}
    plot.add_layout(bar, "right")
    for axis in plot.axis:
        axis.ticker = FixedTicker(ticks=[])
    plot.grid.visible = False
    return as_item(plot)


def _mixed(colour: tuple[int, int, int], fair: float) -> str:
    """A colour on its way to that of a fair share, which it is at 1."""
    mixed = (round(own + (other - own) * fair) for own, other in zip(colour, _FAIR, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
