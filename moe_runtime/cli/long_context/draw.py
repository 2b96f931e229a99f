"""Loss against position as a drawing: one line a label, its 95% interval as a paler band."""

import math
from collections.abc import Callable, Sequence

from moe_runtime.cli.long_context.record import Record
from moe_runtime.cli.long_context.table import bucket_loss, groups_of, over_seeds
from moe_runtime.evaluation.intervals import Interval
from moe_runtime.planner.svg import document, element, line, number, words

COLOURS = ("#1b6ca8", "#c2452d", "#3a7d44", "#8a5a9e", "#b8860b", "#4d4d4d")
LEFT, TOP, WIDTH, HEIGHT, KEY = 56.0, 24.0, 520.0, 280.0, 18.0

Place = Callable[[float], float]


def draw(record: Record) -> str:
    """An SVG file: positions by their logarithm, a bucket at its middle."""
    groups = groups_of(record)
    buckets = next(iter(groups.values()))[0].position.buckets
    middles = [math.sqrt(max(bucket.first, 1) * bucket.stop) for bucket in buckets]
    curves = {
        label: [over_seeds(seeds, bucket_loss(n)) for n in range(len(buckets))]
        for label, seeds in groups.items()
    }
    across = _scale(math.log(middles[0]), math.log(middles[-1]), LEFT, LEFT + WIDTH)
    lows, highs = ([_end(point, side) for curve in curves.values() for point in curve] for side in (0, 1))
    up = _scale(min(lows), max(highs), TOP + HEIGHT, TOP)
    places = [across(math.log(middle)) for middle in middles]
    content = _axes(min(lows), max(highs), up)
    content += _positions([(bucket.first, bucket.stop) for bucket in buckets], places)
    old = record.terms.lengths[0]
    if middles[0] < old < middles[-1]:
        x = across(math.log(old))
        content += line(x, TOP, x, TOP + HEIGHT, "#999999") + words(x + 4, TOP + 12, "old length", 11)
    for row, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[row % len(COLOURS)]
        content += _curve(places, curve, up, colour)
        below = TOP + HEIGHT + 44 + KEY * row
        content += line(LEFT, below - 4, LEFT + 24, below - 4, colour) + words(LEFT + 32, below, label)
    height = TOP + HEIGHT + 52 + KEY * len(curves)
    return document(LEFT + WIDTH + 32, height, "Loss by position, nats a token", content)


def _curve(places: Sequence[float], curve: Sequence[Interval], up: Place, colour: str) -> str:
    above = [(x, up(_end(point, 1))) for x, point in zip(places, curve, strict=True)]
    below = [(x, up(_end(point, 0))) for x, point in zip(places, curve, strict=True)]
    middle = [(x, up(point.mean)) for x, point in zip(places, curve, strict=True)]
    band = element("polygon", points=_points([*above, *reversed(below)]), fill=colour, fill_opacity=0.15)
    drawn = element("polyline", points=_points(middle), stroke=colour, stroke_width=2, fill="none")
    return band + drawn


def _axes(low: float, high: float, up: Place) -> str:
    """Both axes, and marks of the loss at round numbers."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-3)))
    while (high - low) / step < 4:
        step /= 2
    marks = [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    drawn = line(LEFT, TOP, LEFT, TOP + HEIGHT) + line(LEFT, TOP + HEIGHT, LEFT + WIDTH, TOP + HEIGHT)
    for mark in marks:
        drawn += line(LEFT - 4, up(mark), LEFT, up(mark))
        drawn += words(LEFT - 8, up(mark) + 4, number(mark), 11, "end")
    return drawn + words(LEFT, TOP - 10, "loss, nats a token", 11, "middle")


def _positions(spans: Sequence[tuple[int, int]], places: Sequence[float]) -> str:
    labels = [
        words(x, TOP + HEIGHT + 18, f"{first}-{stop - 1}", 11, "middle")
        for (first, stop), x in zip(spans, places, strict=True)
    ]
    return "".join(labels)


def _scale(low: float, high: float, begin: float, end: float) -> Place:
    span = (high - low) or 1.0
    return lambda value: begin + (value - low) / span * (end - begin)


def _end(point: Interval, side: int) -> float:
    """Lower (0) or upper (1) end of an interval, the figure itself where it has none."""
    end = (point.low, point.high)[side]
    return point.mean if math.isnan(end) else end


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in places)
