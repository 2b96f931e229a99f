"""What was measured as Markdown tables; models of one label are seeds, and come together in one row.

Of one seed the interval is over windows; of several it is over seeds, which is the wider question: would
another training find the same.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

from moe_runtime.cli.long_context.record import Measured, Record
from moe_runtime.evaluation.by_position import PositionLoss
from moe_runtime.evaluation.intervals import Interval, mean_interval, share_interval

PARTS = ("loss", "needles")


def tables(record: Record, parts: Sequence[str] = PARTS) -> str:
    """Tables as Markdown, with a heading each; `parts` says which."""
    shown = {"loss": _loss_tables, "needles": _needle_tables}
    return "\n\n".join(piece for part in parts for piece in shown[part](record))


def _loss_tables(record: Record) -> tuple[str, ...]:
    groups, old = groups_of(record), record.terms.lengths[0]
    return (
        f"Loss in nats a token, inside and beyond the old length of {old} tokens:",
        summary_table(groups),
        "Loss by position, nats a token:",
        bucket_table(groups),
    )


def _needle_tables(record: Record) -> tuple[str, ...]:
    choices = record.terms.form.choices
    heading = (
        f"Needles found, in percent: the value preferred among {choices} (95% interval) / returned by greedy "
        "decoding, by length and depth:"
    )
    return heading, needle_table(groups_of(record))


def summary_table(groups: dict[str, list[Measured]]) -> str:
    """One row a label: losses inside, beyond and with short context, and their ratios."""
    heads: tuple[str, ...] = (
        "model",
        "seeds",
        "inside",
        "its second half",
        "beyond",
        "the same tokens, short context",
    )
    heads += ("beyond / inside", "beyond / second half", "beyond / short context")
    names = ("inside", "late", "beyond", "short", "beyond_to_inside", "beyond_to_late", "beyond_to_short")
    rows: list[tuple[str, ...]] = []
    for label, seeds in groups.items():
        figures = [over_seeds(seeds, _field(name)) for name in names]
        rows.append((label, str(len(seeds)), *map(_shown, figures)))
    return _markdown(heads, rows)


def bucket_table(groups: dict[str, list[Measured]]) -> str:
    """One row a bucket of positions, one column a label."""
    first = next(iter(groups.values()))[0].position.buckets
    rows = []
    for number, bucket in enumerate(first):
        cells = [_shown(over_seeds(seeds, bucket_loss(number))) for seeds in groups.values()]
        rows.append((f"{bucket.first} to {bucket.stop - 1}", *cells))
    return _markdown(("position", *groups), rows)


def needle_table(groups: dict[str, list[Measured]]) -> str:
    """One row a label and length, one column a depth; questions of all seeds together."""
    depths = sorted({cell.depth for seeds in groups.values() for cell in seeds[0].needle})
    lengths = sorted({cell.length for seeds in groups.values() for cell in seeds[0].needle})
    rows = []
    for label, seeds in groups.items():
        for length in lengths:
            cells = [_needle_cell(seeds, length, depth) for depth in (*depths, None)]
            rows.append((label, str(len(seeds)), str(length), *cells))
    return _markdown(
        ("model", "seeds", "length", *(f"depth {depth:g}" for depth in depths), "all depths"), rows
    )


def _needle_cell(seeds: Sequence[Measured], length: int, depth: float | None) -> str:
    """preferred / returned in percent, the first with its interval."""
    cells = [
        cell for one in seeds for cell in one.needle if cell.length == length and depth in (None, cell.depth)
    ]
    asked, right = (sum(getattr(cell, name) for cell in cells) for name in ("questions", "preferred"))
    preferred = share_interval([1.0] * right + [0.0] * (asked - right))
    returned = sum(cell.returned for cell in cells) / asked
    low, high = (f"{100 * end:.0f}" for end in (preferred.low, preferred.high))
    return f"{100 * preferred.mean:.0f} ({low} to {high}) / {100 * returned:.0f}"


def groups_of(record: Record) -> dict[str, list[Measured]]:
    """Models by label, in the order in which labels came."""
    order = list(dict.fromkeys(one.label for one in record.models))
    ranked = sorted(record.models, key=lambda one: order.index(one.label))
    return {label: list(seeds) for label, seeds in groupby(ranked, key=lambda one: one.label)}


def over_seeds(seeds: Sequence[Measured], figure: Callable[[PositionLoss], Interval]) -> Interval:
    """A figure of models of one label: of one seed with its own interval, of several over them."""
    found = [figure(one.position) for one in seeds]
    return found[0] if len(found) == 1 else mean_interval([one.mean for one in found])


def _field(name: str) -> Callable[[PositionLoss], Interval]:
    return lambda position: getattr(position, name)


def bucket_loss(number: int) -> Callable[[PositionLoss], Interval]:
    """The figure of one bucket."""
    return lambda position: position.buckets[number].loss


def _shown(figure: Interval) -> str:
    return f"{figure.mean:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
