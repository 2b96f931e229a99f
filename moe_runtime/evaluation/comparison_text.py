"""A comparison as Markdown."""

import math

from moe_runtime.evaluation.comparison import BITS_PER_BYTE, LEAST_COUNT, Column, Comparison, Row
from moe_runtime.evaluation.intervals import Interval


def as_markdown(table: Comparison) -> str:
    """The models, the figures with their intervals, the differences, and how all that was made."""
    lines = ["# Comparison", "", *_models(table.columns), "", *_figures(table), "", *_method(table)]
    return "\n".join(lines) + "\n"


def _models(columns: tuple[Column, ...]) -> list[str]:
    head = ["| model | kind | parameters | sees tokens | path |", "|---|---|---|---|---|"]
    return head + [
        f"| {one.label} | {one.kind} | {one.parameters:,} | {one.context:,} | `{one.path}` |"
        for one in columns
    ]


def _figures(table: Comparison) -> list[str]:
    labels = [column.label for column in table.columns]
    lines = [f"| | of | {' | '.join(labels)} |", "|---|---|" + "---|" * len(labels)]
    for row in table.rows:
        values = " | ".join(_value(one) for one in row.values)
        lines.append(f"| {_title(row)} | {_count(row)} | {values} |")
        if row.differences:
            against = " | ".join(_difference(one, row.resolves(one)) for one in row.differences)
            lines.append(f"| ... less {labels[0]} | | | {against} |")
    return lines


def _method(table: Comparison) -> list[str]:
    lines = [f"- Rule of windows: {table.rule}."] if table.rule else []
    lines += [f"- {note}" for note in table.notes]
    return [
        *lines,
        "- Brackets are 95% intervals: bootstrap over documents for bits per byte (lower is better), "
        "Wilson's for shares of right items.",
        "- Differences are paired by document or item, by bootstrap. `?` marks those that are not resolved: "
        f"the interval holds 0, the difference is within rounding, or it is of fewer than {LEAST_COUNT}.",
    ]


def _title(row: Row) -> str:
    of = row.of if row.part is None else f"{row.of}: {row.part}"
    return f"{row.metric}, {of}"


def _count(row: Row) -> str:
    unit = "document" if row.metric == BITS_PER_BYTE else "item"
    return f"{row.count} {unit}{'' if row.count == 1 else 's'}"


def _value(one: Interval) -> str:
    if math.isnan(one.low):
        return f"{one.mean:.3f}"
    return f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _difference(one: Interval, resolved: bool) -> str:
    mark = "" if resolved else " ?"
    if math.isnan(one.low):
        return f"{one.mean:+.3f}{mark}"
    return f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]{mark}"
