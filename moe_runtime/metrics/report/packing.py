"""Numbers and text as a page carries them: exact, small, and nothing that HTML could take for a tag.

Curves are the bits of their float64, so what the page has is what metrics.jsonl has, to the last digit. Text
in JSON would be as exact and twice as long. Steps that several curves share are held once.
"""

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.metrics.report.folded import Floats, Folded


def packed(text: str) -> str:
    """Text, compressed, in letters that need no escape anywhere in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


def as_json(value: Any) -> str:
    """JSON without blanks; no number in it may be infinite or NaN."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def numbers(values: NDArray[Any], dtype: str) -> str:
    """The bytes of an array, little-endian, in base64.

    Args:
        dtype: "<f8", "<f4", "<u4", "<u2" ...
    """
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode()


def pack_curves(curves: Mapping[str, Folded]) -> dict[str, Any]:
    """{"steps": [float64 ...], "curves": {key: [place in steps, float64, points left out]}}."""
    places: dict[bytes, int] = {}
    steps: list[str] = []
    packed_curves = {}
    for key, curve in curves.items():
        x, y = curve.points()
        place = _place(x, places, steps)
        packed_curves[key] = [place, numbers(y, "<f8"), curve.stats.count - len(x)]
    return {"steps": steps, "curves": packed_curves}


def _place(x: Floats, places: dict[bytes, int], steps: list[str]) -> int:
    raw = x.tobytes()
    if raw not in places:
        places[raw] = len(steps)
        steps.append(numbers(x, "<f8"))
    return places[raw]
