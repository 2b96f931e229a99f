"""Draws a timeline for a terminal: a line for each rank, to scale.

    rank 0  F0 F1 B0--- B1--- ......      F forward, B backward, I and W its two parts,
    rank 1  .. F0 B0--- F1 B1--- ...      F1&B0-- an overlapped pair, dots the bubble

An entry names itself as fully as its place allows, at least by its letter (an & for a pair), and fills
the rest of its time with dashes. A prime marks direction 1.
"""

from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.schedule.action import Action, Overlap


def draw_text(timeline: Timeline, width: int = 120) -> str:
    """The timeline as lines of text, without colours.

    Args:
        width: of a line, in characters, labels included.
    """
    labels = timeline.labels or tuple(f"rank {rank}" for rank in range(len(timeline.rows)))
    margin = max(map(len, labels), default=0) + 2
    scale = max(1, width - margin) / (timeline.makespan or 1.0)
    columns = round(timeline.makespan * scale)
    lines = [
        f"{label:<{margin}}{_row(spans, scale, columns)}".rstrip()
        for label, spans in zip(labels, timeline.rows, strict=True)
    ]
    return "\n".join([*lines, ""])


def _row(spans: tuple[Span, ...], scale: float, columns: int) -> str:
    text = ""
    for span in spans:
        start, end = round(span.start * scale), round(span.end * scale)
        text += _filled("", ".", start - len(text)) + _filled(_name(span, end - start), "-", end - start)
    return text + _filled("", ".", columns - len(text))


def _filled(name: str, fill: str, width: int) -> str:
    """A name and its filling, a blank at the end where there is room for one."""
    return f"{name:{fill}<{max(0, width - 1)}}" + (" " if width > len(name) else "") if width > 0 else ""


def _name(span: Span, width: int) -> str:
    """The longest name of an entry that fits."""
    entry = span.entry
    if isinstance(entry, Overlap):
        forward, backward = _short(entry.forward), _short(entry.backward)
        names = [f"{forward}&{backward}", "F&B", "&"]
    else:
        names = [_short(entry), entry.kind.value]
    return next((name for name in names if len(name) < width), names[-1])


def _short(action: Action) -> str:
    """An action without its stage, which the row tells."""
    return f"{action.kind.value}{action.microbatch}{chr(39) * action.direction}"
