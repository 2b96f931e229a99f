"""Load of every expert over time, small enough to keep: the file behind every heatmap.

A run has 58 MoE layers of 256 experts, and a million steps: not to be kept whole. So a line is written every
`interval` steps, and the interval doubles as the run grows, such that the file never has more than
`MOST_LINES`. When it doubles, every second line is dropped: at any time the file holds exactly the steps that
the interval of its newest line divides, evenly over the whole run, whatever was stopped, resumed or rolled
back on the way. The interval is a function of the step alone, so nothing has to be remembered. Letting the
newer half be sparser, with no line ever dropped, was rejected: lines then grow with the logarithm of the run,
without a bound.

A load is kept relative to a fair share, in 1/256 of it, as an unsigned 16-bit number: 0 is a dead expert, 256
a fair share, and no expert can be busier than all tokens of its layer, which is experts / top_k fair shares.
A line has them compressed: {"step": 40, "layers": ["layers.1", ...], "experts": 256, "load": "eJz..."};
`layers` stands where it changes, which is in the first line of a file.
"""

import base64
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_runtime.metrics.jsonl import JsonLines, read_jsonl

HEATMAP_FILE = "expert_load.jsonl"
MOST_LINES = 1000
_FAIR = 256  # code of a fair share
_LARGEST = 2**16 - 1


class Heatmap(NamedTuple):
    """What a file holds.

    Args:
        steps: of its lines, ascending.
        layers: canonical prefixes of the MoE layers.
        load: float32 [times, layers, experts]; 1 is a fair share.
    """

    steps: list[int]
    layers: list[str]
    load: NDArray[np.float32]


def interval_at(step: int, every: int) -> int:
    """Steps between lines once a run is at `step`: `every`, doubled until the lines are few enough."""
    interval = every
    while step // interval > MOST_LINES:
        interval *= 2
    return interval


def is_due(step: int, every: int) -> bool:
    """Whether `step`, from 1, has a line; 0 turns the heatmap off."""
    return every > 0 and step % interval_at(step, every) == 0


class HeatmapWriter:
    """Writes the file of a run; for rank 0.

    Args:
        path: of the file.
        layers: canonical prefixes of the MoE layers.
        every: steps between lines at first.
        keep_to_step: lines of later steps are removed first.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(
        self, path: Path, layers: Sequence[str], every: int, keep_to_step: int | None = None
    ) -> None:
        self._path, self._layers, self._every = path, list(layers), every
        self._file = JsonLines(path, keep_to_step)
        self._interval = interval_at(keep_to_step or 1, every)
        self._said: list[str] | None = None  # the layers, as far as the file has them
        self._look(self._interval)

    def add(self, step: int, load: Sequence[Sequence[float]] | NDArray[Any]) -> str | None:
        """Write the line of a step that `is_due`; the reason if it has to wait for room, else None.

        Args:
            load: [layers, experts], relative to a fair share.
        """
        interval = interval_at(step, self._every)
        if interval != self._interval:
            self._interval = interval
            self._look(interval)
        table = np.asarray(load, dtype=np.float64)
        fields: dict[str, Any] = {"step": step}
        if self._said != self._layers:
            fields["layers"] = self._said = self._layers
        return self._file.append(fields | {"experts": table.shape[1], "load": _packed(table)})

    def roll_back(self, step: int) -> None:
        """Remove the lines of later steps.

        Raises:
            OSError: the file cannot be cut.
        """
        self._file.keep_to(step)
        self._look(self._interval)

    def close(self) -> None:
        """Force the file to disk."""
        self._file.close()

    def _look(self, interval: int) -> None:
        """See which layers the file is of, and keep the lines whose step the interval divides."""
        lines, kept = list(read_jsonl(self._path)), list[dict[str, Any]]()
        self._said = None
        for line in lines:
            self._said = line.get("layers", self._said)
            if line["step"] % interval == 0:
                kept.append(line if kept else line | {"layers": self._said})
        if len(kept) == len(lines):
            return
        self._said = self._said if kept else None
        self._file.close()
        aside = self._path.with_suffix(".tmp")  # so that a kill leaves the old file or the new one
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, self._path)
        self._file = JsonLines(self._path)


def read_heatmap(path: Path) -> Heatmap:
    """The loads of a run, as far as they are written; empty if the file is missing.

    Lines that do not fit the newest ones (another model was trained here before) are left out.
    """
    found: list[tuple[int, list[str], NDArray[np.float32]]] = []
    layers: list[str] = []
    for line in read_jsonl(path):
        said = line.get("layers", layers)
        layers = said if isinstance(said, list) else layers
        load = _unpacked(line, len(layers))
        if load is not None and type(line.get("step")) is int:
            found.append((line["step"], layers, load))
    if not found:
        return Heatmap([], [], np.zeros((0, 0, 0), dtype=np.float32))
    shape = found[-1][2].shape
    same = [(step, load) for step, names, load in found if names == layers and load.shape == shape]
    return Heatmap([step for step, _ in same], layers, np.stack([load for _, load in same]))


def _packed(table: NDArray[np.float64]) -> str:
    codes = np.clip(np.rint(table * _FAIR), 0, _LARGEST).astype("<u2")
    return base64.b64encode(zlib.compress(codes.tobytes())).decode()


def _unpacked(line: dict[str, Any], num_layers: int) -> NDArray[np.float32] | None:
    """float32 [layers, experts]; None of a line that was damaged."""
    try:
        codes = np.frombuffer(zlib.decompress(base64.b64decode(line["load"], validate=True)), dtype="<u2")
        return codes.reshape(num_layers, line["experts"]).astype(np.float32) / np.float32(_FAIR)
    except (KeyError, TypeError, ValueError, zlib.error):
        return None
