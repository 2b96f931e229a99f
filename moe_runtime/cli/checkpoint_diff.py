"""What `moe-runtime checkpoint diff` prints."""

import json
import math
from collections.abc import Iterator
from typing import Any

from moe_runtime.checkpoint.difference import KINDS, Difference, count_by_kind
from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.config.origins import leaves

_ABSENT = "(not there)"


def as_lines(first: Checkpoint, second: Checkpoint, found: Difference, limit: int) -> Iterator[str]:
    """The comparison for people: what the runs were, then tensors by kind, then the worst by name."""
    yield f"{first.path}\n{second.path}"
    for key, (old, new) in _facts(first, second).items():
        yield f"{key}: {old} -> {new}"
    differing = count_by_kind(found.differing)
    for kind in KINDS:
        if found.alike[kind] or differing[kind]:
            yield f"{kind}: {found.alike[kind]:,} tensors alike, {differing[kind]:,} differ"
    for each in found.differing[:limit]:
        yield f"  {each.kind} {each.name}: {each.said}"
    if len(found.differing) > limit:
        yield f"  and {len(found.differing) - limit:,} more"


def as_dict(first: Checkpoint, second: Checkpoint, found: Difference) -> dict[str, Any]:
    """The comparison for programs; what cannot be compared has no `largest`."""
    return {
        "paths": [str(first.path), str(second.path)],
        "facts": _facts(first, second),
        "alike": found.alike,
        "differing": [
            {
                "kind": each.kind,
                "name": each.name,
                "said": each.said,
                "largest": each.largest if math.isfinite(each.largest) else None,
            }
            for each in found.differing
        ],
    }


def _facts(first: Checkpoint, second: Checkpoint) -> dict[str, tuple[str, str]]:
    """Keys of position, layout and config that differ, with both values as text."""
    sides = []
    for checkpoint in (first, second):
        manifest = checkpoint.manifest
        position = manifest.position.model_dump(mode="json")
        parts = {"position": position, "layout": manifest.layout, "config": manifest.config}
        sides.append({key: json.dumps(value) for key, value in leaves(parts)})
    old, new = sides
    return {
        key: (old.get(key, _ABSENT), new.get(key, _ABSENT))
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    }
