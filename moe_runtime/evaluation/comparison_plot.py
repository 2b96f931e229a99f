"""A comparison as a picture: one panel a metric, a dot with its interval for each model and row."""

import math
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.evaluation.comparison import BITS_PER_BYTE, Comparison, Row

_ROW_INCHES, _WIDTH_INCHES = 0.28, 8.0


def check_plots() -> None:
    """Say so at once if no picture could be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "compare: the plot needs matplotlib, which is not here; pip install matplotlib, or say --no-plot"
        ) from error
    del matplotlib


def draw(table: Comparison, file: Path) -> None:
    """Write the picture; its kind is that of the file's name."""
    # Not pyplot: it would look for a screen and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(row.metric for row in table.rows))
    rows = [[row for row in table.rows if row.metric == metric] for metric in metrics]
    lines = [max(2, len(some) * len(table.columns)) for some in rows]
    height = 0.9 * len(metrics) + _ROW_INCHES * (sum(lines) + len(table.columns))
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=lines)[:, 0]
    for panel, metric, some in zip(panels, metrics, rows, strict=True):
        _panel(panel, some, [column.label for column in table.columns])
        panel.set_title(metric, loc="left", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", fontsize=8)
    figure.savefig(file, dpi=150, metadata={"Software": None} if file.suffix == ".png" else None)


def _panel(panel: Any, rows: list[Row], labels: list[str]) -> None:
    step = 0.8 / len(labels)
    for place, label in enumerate(labels):
        values = [row.values[place] for row in rows]
        heights = [number + place * step for number in range(len(rows))]
        ends = [
            [_length(one.mean - one.low) for one in values],
            [_length(one.high - one.mean) for one in values],
        ]
        means = [one.mean for one in values]
        panel.errorbar(
            means, heights, xerr=ends, fmt="o", markersize=4, capsize=2, label=label, color=f"C{place % 10}"
        )
    panel.set_yticks([number + 0.4 - step / 2 for number in range(len(rows))])
    panel.set_yticklabels([row.of if row.part is None else f"  {row.part}" for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - step + 0.1, -0.3)  # the first row at the top
    if rows[0].metric != BITS_PER_BYTE:
        panel.set_xlim(-0.02, 1.02)
    panel.grid(axis="x", alpha=0.3)


def _length(value: float) -> float:
    """Of an error bar: none where the interval is unknown, and no rounding below 0."""
    return 0.0 if math.isnan(value) else max(0.0, value)
