"""Makes a run of W&B or TensorBoard out of a run folder, after a crash or years later.

A copy that was written beside the training may lack its end, or the steps that a roll-back did again;
metrics.jsonl lacks nothing. So the whole run is told anew, step after step in the order of its steps: the
record, then what belongs to the same step, the samples, alerts, heatmap and timeline. Adding what is missing
to the old copy was rejected: W&B takes no step that it has passed.

Files are read as they stand and line by line: the run may be going on, and may be larger than memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from numpy.typing import ArrayLike

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.metrics.files import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, TRACE_FILE
from moe_runtime.metrics.heatmap import HEATMAP_FILE, read_heatmap
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.metrics.spacing import Spacing
from moe_runtime.metrics.table_events import SAMPLE, read_table_events
from moe_runtime.planner.draw import draw_svg
from moe_runtime.planner.measured import timeline_of
from moe_runtime.planner.trace import read_trace

# Does something that belongs to a step.
_Deed = Callable[["Copy"], None]


class Copy(Protocol):
    """A run of another program, open for writing; steps come in ascending order."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """A line of metrics.jsonl."""

    def sample(self, step: int, text: str) -> None:
        """A generated text."""

    def alert(self, event: Mapping[str, Any]) -> None:
        """An event of kind `alert`."""

    def heatmap(self, step: int, layers: Sequence[str], load: ArrayLike) -> None:
        """The load [layers, experts] of every expert."""

    def timeline(self, step: int, svg: str) -> None:
        """The drawing of a step's pipeline timeline."""


def read_config(run_dir: Path) -> dict[str, Any]:
    """The configuration of a run as it was written down, of whatever version.

    Raises:
        ConfigError: it is not there, or no YAML mapping.
    """
    path = run_dir / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        text = f"{path}: cannot be read ({error.strerror}); give the folder of a run, such as runs/quickstart"
        raise ConfigError(text) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected the YAML that moe-runtime writes there, got something else")
    return config


def records_of(
    run_dir: Path, left_out: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl in ascending order of steps.

    Args:
        left_out: told at the end, in a sentence, of lines whose step is no number, if there are any.

    Raises:
        ConfigError: there are none.
    """
    path, last, odd = run_dir / METRICS_FILE, 0, 0
    for record in read_jsonl(path):
        step = record.get("step")
        if type(step) is not int:
            odd += 1
        elif step > last:
            last = step
            yield record
    if odd:
        left_out(f"{path}: lines whose step is no whole number were left out: {odd:,}")
    if last == 0:
        raise ConfigError(f"{path}: expected records of a run, got none; train first, or give another folder")


def rebuild(
    run_dir: Path,
    copy: Copy,
    told: Callable[[int], None] = lambda step: None,
    left_out: Callable[[str], None] = lambda text: None,
) -> int:
    """Tell a copy everything that a run folder has.

    Args:
        told: called with every step that the copy has been told.
        left_out: see `records_of`.

    Returns:
        The number of steps.

    Raises:
        ConfigError: the folder has no records.
    """
    deeds = _deeds_by_step(run_dir)
    steps = 0
    for record in records_of(run_dir, left_out):
        step = record["step"]
        copy.log(record, step)
        for deed in deeds.get(step, ()):
            deed(copy)
        told(step)
        steps += 1
    return steps


def _deeds_by_step(run_dir: Path) -> dict[int, list[_Deed]]:
    """What besides its record belongs to each step; what the folder lacks is left out."""
    deeds: dict[int, list[_Deed]] = {}
    for step, deed in (*_rows(run_dir), *_pictures(run_dir), *_timeline(run_dir)):
        deeds.setdefault(step, []).append(deed)
    return deeds


def _rows(run_dir: Path) -> Iterator[tuple[int, _Deed]]:
    for event in read_table_events(run_dir / EVENTS_FILE):
        yield event["step"], _row(event)


def _row(event: Mapping[str, Any]) -> _Deed:
    if event["kind"] == SAMPLE:
        return lambda copy: copy.sample(event["step"], event["text"])
    return lambda copy: copy.alert(event)


def _pictures(run_dir: Path) -> Iterator[tuple[int, _Deed]]:
    """Some of the heatmap's lines, as many as a run that is under way draws."""
    heatmap, spacing = read_heatmap(run_dir / HEATMAP_FILE), Spacing()
    for step, load in zip(heatmap.steps, heatmap.load, strict=True):
        if spacing.admits(step):
            yield step, _picture(step, heatmap.layers, load)


def _picture(step: int, layers: Sequence[str], load: ArrayLike) -> _Deed:
    return lambda copy: copy.heatmap(step, layers, load)


def _timeline(run_dir: Path) -> Iterator[tuple[int, _Deed]]:
    try:
        trace = read_trace(run_dir / TRACE_FILE)
        svg = draw_svg(timeline_of(trace))
    except MoeRuntimeError:  # none was asked for, or the run ended before it was whole
        return
    yield trace.step, lambda copy: copy.timeline(trace.step, svg)
