"""Charts of a plan as SVG text: stacked columns, curves over a logarithmic scale, and bars to both sides."""

import math
from collections.abc import Callable, Mapping, Sequence

from moe_runtime.planner.svg import INK, box, document, element, line, number, words

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6")
_GRID, _PALE = "#d8d8d8", "#bbbbbb"
_IDLE = {"bubble": "#e6e6e6"}  # what is no work, in grey
_LEFT, _TOP, _HEIGHT, _FOOT = 64.0, 58.0, 260.0, 44.0


def stacked_columns(
    title: str,
    unit: str,
    across: str,
    columns: Mapping[str, Mapping[str, float]],
    limit: tuple[str, float] | None = None,
) -> str:
    """A column for each name, its parts on top of each other, the first at the bottom.

    Args:
        columns: the same parts in the same order for each.
        across: what the names are.
        limit: a level drawn across, and what it is.
    """
    parts = list(next(iter(columns.values())))
    top = max([sum(one.values()) for one in columns.values()] + ([limit[1]] if limit else [])) * 1.08
    step = max(16.0, min(64.0, 900 / len(columns)))
    width = max(_LEFT + step * len(columns) + 24, 150 * min(len(parts), 6) + 40)
    rows = -(-len(parts) // 6)
    base = _TOP + 20 * (rows - 1) + _HEIGHT

    def y(value: float) -> float:
        return base - _HEIGHT * value / top

    content = [words(12, 24, f"{title}, {unit}", 15, font_weight="bold"), _keys(parts)]
    content += _levels(top, y, width)
    for place, (name, values) in enumerate(columns.items()):
        x, bottom = _LEFT + step * (place + 0.12), 0.0
        for part, (label, value) in enumerate(values.items()):
            said = element("title", f"{name}, {label}: {value:.3g} {unit}")
            shape = box(
                x, y(bottom + value), step * 0.76, y(bottom) - y(bottom + value), _colour(part, label)
            )
            content.append(element("g", said + shape))
            bottom += value
        if len(columns) <= 32 or place % 4 == 0:
            content.append(words(x + step * 0.38, base + 16, name, 11, "middle"))
    content.append(words((width + _LEFT) / 2, base + 34, across, 12, "middle"))
    if limit is not None:
        content.append(line(_LEFT, y(limit[1]), width - 12, y(limit[1]), "#c00000"))
        content.append(words(width - 14, y(limit[1]) - 4, limit[0], 11, "end"))
    return document(width, base + _FOOT, title, "".join(content))


def curves(
    title: str, unit: str, across: str, xs: Sequence[float], lines: Mapping[str, Sequence[float]]
) -> str:
    """Curves over sizes that double; a point for each size."""
    top = max(max(values) for values in lines.values()) * 1.08
    width, base = 560.0, _TOP + _HEIGHT
    low, high = math.log2(min(xs)), math.log2(max(xs))

    def x(value: float) -> float:
        share = (math.log2(value) - low) / (high - low) if high > low else 0.5
        return _LEFT + 16 + (width - _LEFT - 48) * share

    def y(value: float) -> float:
        return base - _HEIGHT * value / top

    content = [words(12, 24, f"{title}, {unit}", 15, font_weight="bold"), _keys(list(lines))]
    content += _levels(top, y, width)
    content += [words(x(one), base + 16, f"{one:,.0f}", 11, "middle") for one in xs]
    content.append(words((width + _LEFT) / 2, base + 34, across, 12, "middle"))
    for place, (name, values) in enumerate(lines.items()):
        points = list(zip(xs, values, strict=True))
        path = "M" + "L".join(f"{number(x(a))} {number(y(b))}" for a, b in points)
        content.append(element("path", d=path, stroke=_colour(place), stroke_width=2, fill="none"))
        for a, b in points:
            said = element("title", f"{name}, {a:,.0f}: {b:.4g} {unit}")
            content.append(element("circle", said, cx=x(a), cy=y(b), r=3.5, fill=_colour(place)))
    return document(width, base + _FOOT, title, "".join(content))


def both_sides(title: str, names: Sequence[str], low: Sequence[float], high: Sequence[float]) -> str:
    """A row for each name: what its low end does, and what its high end does, from a middle line."""
    most = max([abs(one) for one in (*low, *high)], default=0.0) or 1.0
    left, half, row = 330.0, 220.0, 22.0
    middle = left + half
    content = [words(12, 24, title, 15, font_weight="bold"), _keys(["at its low end", "at its high end"])]
    for place, name in enumerate(names):
        y = _TOP + row * place
        content.append(words(left - 10, y + 13, name, 11.5, "end"))
        ends = sorted(enumerate((low[place], high[place])), key=lambda one: -abs(one[1]))  # the longer behind
        for side, value in ends:
            reach = half * 0.8 * abs(value) / most
            start = middle if value > 0 else middle - reach
            content.append(box(start, y + 2, reach, row - 6, _colour(side)))
            end, anchor = (middle + reach + 4, "start") if value > 0 else (middle - reach - 4, "end")
            if abs(value) >= 5e-4:
                content.append(words(end, y + 13, f"{value:+.1%}", 10.5, anchor))
    bottom = _TOP + row * len(names)
    content.append(line(middle, _TOP - 4, middle, bottom, INK))
    return document(middle + half + 20, bottom + 16, title, "".join(content))


def _levels(top: float, y: Callable[[float], float], width: float) -> list[str]:
    """Grid lines with their values."""
    rough = top / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    found = []
    for tick in range(math.floor(top / step) + 1):
        found.append(line(_LEFT, y(tick * step), width - 12, y(tick * step), _GRID if tick else _PALE))
        found.append(words(_LEFT - 8, y(tick * step) + 4, f"{tick * step:,.6g}", 11, "end"))
    return found


def _keys(names: Sequence[str]) -> str:
    """Swatches and what they mean, six to a line."""
    parts = []
    for place, name in enumerate(names):
        x, y = 12 + 150.0 * (place % 6), 34 + 18.0 * (place // 6)
        parts.append(box(x, y, 12, 12, _colour(place, name)) + words(x + 17, y + 10, name, 11.5))
    return element("g", "".join(parts))


def _colour(place: int, name: str = "") -> str:
    return _IDLE.get(name, COLOURS[place % len(COLOURS)])
