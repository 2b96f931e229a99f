"""Draws a timeline as the report draws schedules: a row for each rank, a box for each entry.

Colours as in its figure: a forward is orange, a backward green, a backward for input blue-green, a
backward for weights blue; an overlapped pair is one black-bordered box, orange and green. Where a rank
holds several chunks (two directions, or one folded over it), the later ones are paler. What the report
leaves out is added: exchange that the rank stood still for is hatched at the end of its box, an axis
gives the time, and the figures of each rank stand at its right. Empty ground is bubble.

A pair's phases are interleaved, so where its box changes colour says nothing but that both are in it.
Ref: DSV3 §3.2.1, Fig. 5.
"""

import math
from dataclasses import dataclass
from statistics import quantiles

from moe_runtime.planner.figures import figures_of
from moe_runtime.planner.svg import box, document, element, frame, hatch, line, number, words
from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.schedule.action import Action, Kind, Overlap, actions_of

_COLOURS = {
    Kind.FORWARD: "#f7a935",
    Kind.BACKWARD: "#56b470",
    Kind.INPUT_GRAD: "#6fd0d3",
    Kind.WEIGHT_GRAD: "#5a8fe0",
}
_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRAD: "backward for input",
    Kind.WEIGHT_GRAD: "backward for weights",
}
_PAIR_SPLIT = 0.4  # of a pair's box, the forward's part: room for both numbers
_GROUND, _GRID = "#f4f4f4", "#d8d8d8"
_TOP, _ROW, _BOX = 92.0, 34.0, 26.0  # where rows begin, from row to row, height of a box
_COLUMNS = ("bubble", "exposed", "peak live")
_COLUMN = 74.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where things go."""

    left: float
    width: float
    makespan: float
    num_rows: int

    def x(self, time: float) -> float:
        return self.left + self.width * time / self.makespan

    def y(self, row: int) -> float:
        return _TOP + _ROW * row

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.y(self.num_rows)


def draw_svg(timeline: Timeline) -> str:
    """The timeline as a self-contained SVG file; equal timelines give equal text."""
    labels = timeline.labels or tuple(f"rank {rank}" for rank in range(len(timeline.rows)))
    left = 20 + 7.0 * max(map(len, labels), default=0)
    plan = _Plan(left, _plot_width(timeline), timeline.makespan or 1.0, len(timeline.rows))
    content = [_heading(timeline), _legend(), _axis(timeline, plan)]
    for row, (label, spans) in enumerate(zip(labels, timeline.rows, strict=True)):
        middle = plan.y(row) + _BOX / 2 + 4
        content += [words(plan.left - 8, middle, label, anchor="end"), *_boxes(spans, row, plan)]
        for column, figure in enumerate(_rank_figures(timeline, row)):
            content.append(words(plan.right + _COLUMN * (column + 1), middle, figure, anchor="end"))
    width = max(plan.right + _COLUMN * len(_COLUMNS) + 16, 1160)  # the legend's own width at least
    return document(width, plan.bottom + 48, timeline.title, "".join(content))


def _plot_width(timeline: Timeline) -> float:
    """Wide enough for a number in all but the shortest boxes, within what a screen can show."""
    times = [span.end - span.start for row in timeline.rows for span in row]
    short = quantiles(times, n=10)[0] if len(times) > 1 else timeline.makespan
    return min(2000.0, max(900.0, 22 * timeline.makespan / short if short else 0.0))


def _heading(timeline: Timeline) -> str:
    figures = figures_of(timeline)
    scale, unit = timeline.display_unit
    said = [
        f"makespan {figures.makespan * scale:.4g} {unit}".rstrip(),
        f"bubble {figures.bubble_fraction:.1%}",
        f"exposed exchange {figures.exposed_comm_fraction:.1%}",
    ]
    if figures.hidden_comm_fraction is not None:
        said.append(f"exchange hidden {figures.hidden_comm_fraction:.1%}")
    if figures.hidden_in_pairs_fraction is not None:
        said.append(f"in overlapped pairs {figures.hidden_in_pairs_fraction:.1%}")
    title = words(16, 26, timeline.title, 17, font_weight="bold")
    return title + words(16, 46, " · ".join(said), 12.5)


def _legend() -> str:
    """A swatch and its meaning for everything that a row can show."""
    parts, x, y, width, height = [], 16.0, 58.0, 26.0, 14.0

    def entry(swatch: str, name: str) -> None:
        nonlocal x
        parts.append(element("g", swatch + words(x + width + 6, y + 11, name), class_="legend"))
        x += width + 26 + 6.6 * len(name)

    for kind, name in _NAMES.items():
        entry(box(x, y, width, height, _fill(kind, 0.0)) + frame(x, y, width, height, 0.5), name)
    half = width * _PAIR_SPLIT
    pair = box(x, y, half, height, _fill(Kind.FORWARD, 0.0))
    pair += box(x + half, y, width - half, height, _fill(Kind.BACKWARD, 0.0))
    entry(pair + frame(x, y, width, height, 1.6), "overlapped forward & backward")
    paler = box(x, y, width / 2, height, _fill(Kind.FORWARD, 1.0))
    paler += box(x + width / 2, y, width / 2, height, _fill(Kind.BACKWARD, 1.0))
    entry(paler + frame(x, y, width, height, 0.5), "second direction or later chunk")
    waiting = box(x, y, width, height, _fill(Kind.FORWARD, 0.0)) + hatch(x, y, width, height)
    entry(waiting + frame(x, y, width, height, 0.5), "exposed exchange")
    entry(box(x, y, width, height, _GROUND, stroke=_GRID), "bubble")
    return "".join(parts)


def _axis(timeline: Timeline, plan: _Plan) -> str:
    """The ground, grid lines with the time below them, and the heads of the columns."""
    parts = [box(plan.left, plan.y(row), plan.width, _BOX, _GROUND) for row in range(plan.num_rows)]
    scale, unit = timeline.display_unit
    step = _tick_step(timeline.makespan * scale, plan.width / 90)
    for tick in range(math.floor(timeline.makespan * scale / step + 1e-9) + 1 if step else 0):
        x = plan.x(tick * step / scale)
        parts.append(line(x, _TOP - 4, x, plan.bottom, _GRID))
        parts.append(words(x, plan.bottom + 16, f"{tick * step:.6g}", 11, "middle", class_="tick"))
    parts.append(line(plan.left, plan.bottom, plan.right, plan.bottom))
    caption = f"time, {unit}" if unit else "time, in the unit of the costs"
    parts.append(words(plan.left + plan.width / 2, plan.bottom + 36, caption, 12, "middle"))
    for column, head in enumerate(_COLUMNS):
        x = plan.right + _COLUMN * (column + 1)
        parts.append(words(x, _TOP - 6, head, 11, "end", font_weight="bold"))
    return "".join(parts)


def _boxes(spans: tuple[Span, ...], row: int, plan: _Plan) -> list[str]:
    """The entries of one rank."""
    chunks = sorted({_chunk(action) for span in spans for action in actions_of(span.entry)})
    last = max(1, len(chunks) - 1)
    pale = {chunk: place / last for place, chunk in enumerate(chunks)}
    return [_entry(span, plan.y(row), plan, pale) for span in spans]


def _entry(span: Span, y: float, plan: _Plan, pale: dict[tuple[int, int], float]) -> str:
    x, end = plan.x(span.start), plan.x(span.end)
    waits = end - (end - x) * span.exposed / (span.end - span.start) if span.exposed > 0 else end
    actions = actions_of(span.entry)
    split = x + (end - x) * _PAIR_SPLIT
    parts = [(x, split), (split, end)] if len(actions) == 2 else [(x, end)]
    shapes, numbers = "", ""
    for action, (left, right) in zip(actions, parts, strict=True):
        shapes += box(left, y, right - left, _BOX, _fill(action.kind, pale[_chunk(action)]))
        clear = right if waits - left < 10 else min(right, waits)  # numbers avoid the hatching if they can
        numbers += _number_in(left, y, clear - left, str(action.microbatch))
    if waits < end:
        shapes += hatch(waits, y, end - waits, _BOX)
    shapes += frame(x, y, end - x, _BOX, 1.6 if isinstance(span.entry, Overlap) else 0.5)
    return element("g", _tooltip(span) + shapes + numbers, class_="entry", data_entry=str(span.entry))


def _number_in(x: float, y: float, width: float, text: str) -> str:
    """A number in the middle of a box, smaller in a narrow one; nothing in one too narrow for any."""
    for size in (11.5, 8.5):
        if 0.58 * size * len(text) + 2 <= width:
            return words(x + width / 2, y + _BOX / 2 + 0.36 * size, text, size, "middle")
    return ""


def _tooltip(span: Span) -> str:
    said = f"{span.entry}: {span.start:.6g} to {span.end:.6g}"
    if span.comm:
        said += f", exchange {span.comm:.4g}, exposed {span.exposed:.4g}"
    return element("title", said)


def _rank_figures(timeline: Timeline, rank: int) -> tuple[str, str, str]:
    makespan = timeline.makespan or 1.0
    live = number(timeline.peak_memory(rank)) if timeline.memory else ""
    return f"{timeline.bubble(rank) / makespan:.1%}", f"{timeline.exposed(rank) / makespan:.1%}", live


def _chunk(action: Action) -> tuple[int, int]:
    return action.direction, action.stage


def _fill(kind: Kind, pale: float) -> str:
    """The colour of a kind, mixed with white for later chunks: 0 is the first, 1 the last."""
    channels = (int(_COLOURS[kind][place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(value + (255 - value) * 0.55 * pale):02x}" for value in channels)


def _tick_step(whole: float, wanted: float) -> float:
    """A round distance (1, 2 or 5 times a power of ten) that gives about the wanted number of ticks."""
    if whole <= 0:
        return 0.0
    rough = whole / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
