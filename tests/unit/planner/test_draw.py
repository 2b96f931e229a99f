"""Drawings: every entry in its row and to scale, nothing from outside, the same text twice."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.draw import draw_svg
from moe_runtime.planner.draw_text import draw_text
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.schedule import Action, Kind, Overlap, build

SVG = "{http://www.w3.org/2000/svg}"
LEGEND = [
    "forward",
    "backward",
    "backward for input",
    "backward for weights",
    "overlapped forward & backward",
    "second direction or later chunk",
    "exposed exchange",
    "bubble",
]


def _simulated(name: str, ranks: int, microbatches: int, exchange: float = 0.25) -> Timeline:
    program = build(name, ranks, microbatches)
    model = StageCosts(1, 1, 1, exchange, exchange)
    return simulate(program, Costs.split(model, ranks, program.num_stages, hidden=0.9))


def _irregular() -> Timeline:
    """As a measured step looks: gaps, unequal times, names of lanes, a title to be escaped."""
    forward, backward = Action(Kind.FORWARD, 0, 1), Action(Kind.BACKWARD, 0, 0)
    rows = (
        (
            Span(Action(Kind.FORWARD, 0, 0), 0.0, 0.0123, 0.004, 0.001),
            Span(Overlap(forward, backward), 0.02, 0.0517, 0.01),
        ),
        (
            Span(Action(Kind.INPUT_GRAD, 1, 0, 1), 0.0301, 0.0302),
            Span(backward, 0.0302, 0.0399, 0.002, 0.002),
        ),
    )
    return Timeline('a <b> & "c"', rows, (), "s", ("pp 0 · dp 0", "pp 0 · dp 1"))


def _boxes(root: ElementTree.Element) -> list[tuple[str, float, float, float]]:
    """Entry, left edge, width and row's y of each: what its coloured rectangles cover together."""
    found = []
    for group in root.iter(f"{SVG}g"):
        if group.get("class") == "entry":
            outline = next(rect for rect in group.iter(f"{SVG}rect") if rect.get("fill") == "none")
            filled = [rect for rect in group.iter(f"{SVG}rect") if rect.get("fill", "").startswith("#")]
            for rect in filled:
                assert float(rect.get("x")) >= float(outline.get("x")) - 0.02
                right = float(rect.get("x")) + float(rect.get("width"))
                assert right <= float(outline.get("x")) + float(outline.get("width")) + 0.02
            place = [float(outline.get(key)) for key in ("x", "width", "y")]
            found.append((group.get("data-entry"), *place))
    return found


@pytest.mark.parametrize(
    "timeline",
    [_simulated("dualpipe", 8, 20), _simulated("1f1b", 8, 20), _simulated("single", 1, 2), _irregular()],
    ids=lambda timeline: timeline.title,
)
def test_every_entry_stands_in_its_row_and_to_scale(timeline: Timeline) -> None:
    boxes = _boxes(ElementTree.fromstring(draw_svg(timeline)))
    spans = [(row, span) for row, spans in enumerate(timeline.rows) for span in spans]
    assert [box[0] for box in boxes] == [str(span.entry) for _, span in spans]
    widest = max(range(len(spans)), key=lambda place: spans[place][1].end)
    right = boxes[widest][1] + boxes[widest][2]
    begin = min(box[1] for box in boxes)
    scale = (right - begin) / timeline.makespan
    ys = sorted({box[3] for box in boxes})
    assert len(ys) == len(timeline.rows)
    for (row, span), (_, x, width, y) in zip(spans, boxes, strict=True):
        assert y == ys[row]
        assert x - begin == pytest.approx(span.start * scale, abs=0.03)  # pixels are written to 0.01
        assert width == pytest.approx((span.end - span.start) * scale, abs=0.03)


def test_the_exposed_part_is_hatched_to_scale() -> None:
    root = ElementTree.fromstring(draw_svg(_simulated("1f1b", 2, 2)))
    group = next(each for each in root.iter(f"{SVG}g") if each.get("data-entry") == "0F0")
    paled = next(rect for rect in group.iter(f"{SVG}rect") if rect.get("fill-opacity"))
    outline = next(rect for rect in group.iter(f"{SVG}rect") if rect.get("fill") == "none")
    share = float(paled.get("width")) / float(outline.get("width"))
    assert share == pytest.approx(0.25 / 1.25, abs=0.001)
    assert group.find(f"{SVG}path") is not None


def test_microbatches_can_be_read_at_8_ranks_and_20_microbatches() -> None:
    for name in ("dualpipe", "1f1b"):
        root = ElementTree.fromstring(draw_svg(_simulated(name, 8, 20)))
        assert float(root.get("width")) <= 2400
        entries = [group for group in root.iter(f"{SVG}g") if group.get("class") == "entry"]
        for group in entries:
            numbers = [text.text for text in group.iter(f"{SVG}text")]
            assert numbers == re.findall(r"[A-Z](\d+)", group.get("data-entry"))
            assert all(float(text.get("font-size")) > 8 for text in group.iter(f"{SVG}text"))


def test_directions_and_kinds_have_colours_of_their_own() -> None:
    root = ElementTree.fromstring(draw_svg(_simulated("dualpipe", 4, 8)))
    fills = {}
    for group in root.iter(f"{SVG}g"):
        entry = group.get("data-entry", "")
        if entry and "+" not in entry:
            look = re.sub(r"\d", "", entry)
            fills.setdefault(look, set()).add(group.find(f"{SVG}rect").get("fill"))
    assert set(fills) == {"F", "F'", "B", "B'", "I", "I'", "W", "W'"}
    assert all(len(colours) == 1 for colours in fills.values())
    assert len(set.union(*fills.values())) == 8


def test_legend_axis_and_figures_of_each_rank() -> None:
    root = ElementTree.fromstring(draw_svg(_simulated("dualpipe", 4, 8)))
    legend = [g.findtext(f"{SVG}text") for g in root.iter(f"{SVG}g") if g.get("class") == "legend"]
    assert legend == LEGEND
    ticks = [float(text.text) for text in root.iter(f"{SVG}text") if text.get("class") == "tick"]
    steps = {round(after - before, 6) for before, after in pairwise(ticks)}
    assert ticks[0] == 0 and 5 <= len(ticks) <= 30 and len(steps) == 1
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"rank 0", "rank 3", "bubble", "exposed", "peak live", "5"} <= set(words)


def test_a_measured_drawing_has_names_and_milliseconds() -> None:
    words = [text.text for text in ElementTree.fromstring(draw_svg(_irregular())).iter(f"{SVG}text")]
    assert 'a <b> & "c"' in words and "pp 0 · dp 1" in words and "time, ms" in words
    assert any(word.startswith("makespan 51.7 ms") for word in words)


@pytest.mark.parametrize(
    "timeline", [_simulated("dualpipe", 4, 8), _irregular(), Timeline("empty", ((), ()))]
)
def test_a_drawing_needs_nothing_from_outside_and_is_the_same_twice(timeline: Timeline) -> None:
    text = draw_svg(timeline)
    assert text == draw_svg(timeline)
    ElementTree.fromstring(text)
    assert not re.search(r"href|url\(|font-face|<script|<style|<image|@import", text)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]


def test_text_drawing_of_1f1b() -> None:
    program = build("1f1b", 2, 3)
    timeline = simulate(program, Costs.split(StageCosts(1, 1, 1), 2, 2))
    assert draw_text(timeline, 8 + 36) == (
        "rank 0  F0 F1 ..... B0--- F2 B1--- .. B2---\nrank 1  .. F0 B0--- F1 B1--- F2 B2--- .....\n"
    )


@pytest.mark.parametrize("width", [20, 57, 120, 300])
def test_text_drawing_keeps_its_width(width: int) -> None:
    for timeline in (_simulated("dualpipe", 4, 8), _irregular(), Timeline("empty", ((), ()))):
        lines = draw_text(timeline, width).splitlines()
        assert len(lines) == len(timeline.rows) and all(len(line) <= width for line in lines)
