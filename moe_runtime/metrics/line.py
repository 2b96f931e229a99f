"""A record as its line of metrics.jsonl: strict JSON, no key that is not described.

A number that was measured and is not finite becomes `null`, for JSON has no word for it.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moe_runtime.metrics.record import metric_of


def to_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what was not measured.

    Args:
        record: values by the keys of `record.METRICS`, nested; `step`, `tokens` and `loss` among them.
            None: not measured.
    """
    line = _measured(record)
    unknown = [path for path, _ in paths(line) if metric_of(path) is None]
    assert not unknown, f"metrics.record does not know {unknown}"
    return line


def paths(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested fields as flat pairs: `layers/layers.3/violation`, value."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from paths(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def finite_or_none(value: Any) -> Any:
    """NaN and the infinities become None; everything else stays."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            if nested := _measured(value):
                line[key] = nested
        elif value is not None:
            line[key] = finite_or_none(value)
    return line
