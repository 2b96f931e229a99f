"""Several models on the same documents and items: figures with intervals, and differences from the first.

Differences are paired: by document for bits per byte, by item for tasks, drawn again together
(`intervals.py`). Two models may have intervals that overlap by far and yet differ beyond doubt, because
both find the same documents hard; so a table of separate intervals alone would hide what it was made to show.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_runtime.evaluation.documents import Text
from moe_runtime.evaluation.intervals import Interval, bootstrap_ratio, share_interval
from moe_runtime.evaluation.task_scores import Score

BITS_PER_BYTE = "bits per byte"
ROUNDING = 1e-5  # relative
LEAST_COUNT = 10  # of fewer documents or items the bootstrap knows too little


@dataclass(frozen=True)
class Column:
    """A model of the table.

    Args:
        label: short and its own.
        path: where it was read from.
        kind: whose it is.
        context: tokens that it could see.
        parameters: how many it has.
    """

    label: str
    path: str
    kind: str
    context: int
    parameters: int


@dataclass(frozen=True)
class Row:
    """One figure of all models.

    Args:
        of: data set or file of tasks.
        part: of the source; None: all of it.
        metric: bits per byte, acc, acc_norm or exact.
        count: documents or items.
        values: of each model.
        differences: from the first model, of the others.
    """

    of: str
    part: str | None
    metric: str
    count: int
    values: tuple[Interval, ...]
    differences: tuple[Interval, ...]

    def resolves(self, difference: Interval) -> bool:
        """True if a difference is more than chance, and than the rounding of sums in another order."""
        above_rounding = abs(difference.mean) > ROUNDING * abs(self.values[0].mean)
        return difference.resolved and above_rounding and self.count >= LEAST_COUNT


@dataclass(frozen=True)
class Comparison:
    """The table.

    Args:
        rule: how documents were read.
        notes: what else a reader has to know.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    rule: str
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same as plain numbers; None where an interval is unknown."""
        rows = [asdict(row) for row in self.rows]
        for row, source in zip(rows, self.rows, strict=True):
            row["values"] = [_plain(one) for one in source.values]
            row["differences"] = [
                _plain(one) | {"resolved": source.resolves(one)} for one in source.differences
            ]
        columns = [asdict(column) for column in self.columns]
        return {"models": columns, "rule": self.rule, "notes": list(self.notes), "rows": rows}


def likelihood_rows(of: str, texts: Sequence[Text], nats: Sequence[Sequence[float]]) -> list[Row]:
    """Bits per byte of a set, and of each part of its source if there are several.

    Args:
        nats: of each model, of each text.
    """
    bits = np.array(nats, dtype=np.float64) / math.log(2)  # [models, texts]
    sizes = np.array([text.num_bytes for text in texts], dtype=np.float64)
    parts = sorted({text.part for text in texts})
    chosen: list[tuple[str | None, list[int]]] = [(None, list(range(len(texts))))]
    if len(parts) > 1:
        chosen += [(part, [at for at, text in enumerate(texts) if text.part == part]) for part in parts]
    return [_row(of, part, BITS_PER_BYTE, bits[:, places], sizes[places]) for part, places in chosen]


def task_rows(of: str, scores: Sequence[Sequence[Score]]) -> list[Row]:
    """Each metric of a file of tasks; `scores` are of each model, of each item."""
    rows = []
    for metric in sorted({name for score in scores[0] for name in score.metrics}):
        columns = [
            [one.metrics[metric] for one in each if metric in one.metrics] for each in scores
        ]  # [models, items]
        row = _row(of, None, metric, np.array(columns), np.ones(len(columns[0])))
        values = tuple(share_interval(column) for column in columns)
        rows.append(Row(of, None, metric, row.count, values, row.differences))
    return rows


def _row(of: str, part: str | None, metric: str, tops: Any, bottoms: Any) -> Row:
    """Ratios of sums: tops [models, clusters], bottoms [clusters]."""
    values = tuple(bootstrap_ratio(top.tolist(), bottoms.tolist()) for top in tops)
    differences = tuple(bootstrap_ratio((top - tops[0]).tolist(), bottoms.tolist()) for top in tops[1:])
    return Row(of, part, metric, len(bottoms), values, differences)


def _plain(interval: Interval) -> dict[str, Any]:
    values = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
