"""What one picture of a run is, and the flat keys by which it names its numbers.

A panel names numbers by flat keys, which `flat_values` derives from a record: the path of a number in its
line of metrics.jsonl, joined by `/`. A `*` stands for one part of a path that depends on the run, such as the
name of a validation set.

Per-layer numbers (`layers` of a record) have no keys of their own. A model of 61 layers would have a thousand
of them, which no person looks at and which slow W&B down; `routing` has their least, median and greatest over
the layers, and the heatmap of expert load shows each. So the number of keys does not grow with the model.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from moe_runtime.metrics.line import paths

LEARNING, ROUTING, PERFORMANCE, NUMERICS, RELIABILITY = SECTIONS = (
    "Learning",
    "Routing",
    "Performance",
    "Numerics",
    "Reliability",
)
PER_LAYER = "layers"

# Keys of what is no number: W&B has them as media, the report draws them from the files of the run.
HEATMAP, TIMELINE, SAMPLES, ALERTS = "expert_load", "timeline", "samples", "alerts"


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        section: one of `SECTIONS`.
        title: above the picture; unique.
        keys: flat keys of its lines, each with or without `*`.
        unit: of the vertical axis; empty for a mere ratio or count.
        hint: what a good picture looks like, and what to do about a bad one; one or two sentences.
        log: whether the vertical axis is logarithmic.
        kind: `lines` of numbers over steps, or one of the media.
    """

    section: str
    title: str
    keys: tuple[str, ...]
    unit: str
    hint: str
    log: bool = False
    kind: Literal["lines", "image", "table"] = "lines"

    def lines(self, emitted: Collection[str]) -> list[str]:
        """Those of the emitted keys that this panel shows, in its own order."""
        return [key for pattern in self.keys for key in sorted(emitted) if _matches(key, pattern)]


def flat_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl as flat keys, as W&B and TensorBoard get it.

    Args:
        record: a line of metrics.jsonl; what is null in it (measured, and not finite) has no key here.

    Returns:
        `{"loss": 1.5, "routing/violation/max": 0.3}`; nothing of `layers`.
    """
    summed_up = {key: value for key, value in record.items() if key != PER_LAYER}
    return {path: value for path, value in paths(summed_up) if value is not None}


def _matches(key: str, pattern: str) -> bool:
    """Whether a key is meant by a pattern; a `*` does not reach over a slash."""
    return key.count("/") == pattern.count("/") and fnmatchcase(key, pattern)
