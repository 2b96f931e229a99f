"""Results that were measured: one JSON line a run, kept in the repository.

A line is a result as `measure_run` gives it, with the run's key before it. Lines are only ever added, so the
file of an interrupted study is as good as that of a whole one, and a study that is taken up again on
another machine trains what has no line yet.
"""

import json
from pathlib import Path
from typing import Any

from moe_runtime.cli.ablate.study import PlannedRun
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.jsonl import JsonLines

RESULTS = Path("benchmarks/results/ablations.jsonl")


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Results by key; of several with the same key the last.

    Raises:
        ConfigError: a line is no result.
    """
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); name a file of results") from error
    found = {}
    for number, line in enumerate(lines[:-1], 1):  # what stands behind the last line end was torn off
        result = _result(line)
        if result is None:
            raise ConfigError(
                f"{file}:{number}: expected a result with key, measures that are numbers, and curves; remove "
                "the line, and its run is measured again"
            )
        found[result["key"]] = result
    return found


def _result(line: bytes) -> dict[str, Any] | None:
    """The result of a line; None if it is none."""
    try:
        result = json.loads(line)
    except ValueError:
        return None
    if not isinstance(result, dict) or not isinstance(result.get("key"), str):
        return None
    measures, curves = result.get("measures"), result.get("curves")
    if not isinstance(measures, dict) or not isinstance(curves, dict):
        return None
    return result if all(isinstance(value, int | float) for value in measures.values()) else None


def check_writable(file: Path) -> None:
    """Say before any training that results could not be kept.

    Raises:
        ConfigError: the file cannot be written.
    """
    _open(file).close()


def _open(file: Path) -> JsonLines:
    try:
        return JsonLines(file)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written ({error.strerror}); choose another --results"
        ) from error


def add_result(file: Path, planned: PlannedRun, measured: Path) -> dict[str, Any]:
    """Append the result that a run's measuring left in `measured`.

    Raises:
        ConfigError: the file cannot be written.
    """
    result = {"key": planned.key, **json.loads(measured.read_text())}
    lines = _open(file)
    reason = lines.append(result)
    lines.close()
    if reason is not None:
        raise ConfigError(f"{reason}; the run itself is whole: the same command measures it again")
    return result
