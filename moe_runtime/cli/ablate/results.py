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
from moe_runtime.metrics.jsonl import JsonLines, read_jsonl

RESULTS = Path("benchmarks/results/ablations.jsonl")


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Results by key; of several with the same key the last.

    Raises:
        ConfigError: a line is no result.
    """
    found = {}
    for number, result in enumerate(read_jsonl(file), 1):
        if not isinstance(result.get("key"), str) or not isinstance(result.get("measures"), dict):
            raise ConfigError(f"{file}:{number}: expected a result with key and measures; remove the line")
        found[result["key"]] = result
    return found


def add_result(file: Path, planned: PlannedRun, measured: Path) -> dict[str, Any]:
    """Append the result that a run's measuring left in `measured`.

    Raises:
        ConfigError: the file cannot be written.
    """
    result = {"key": planned.key, **json.loads(measured.read_text())}
    try:
        lines = JsonLines(file)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written ({error.strerror}); choose another --results"
        ) from error
    reason = lines.append(result)
    lines.close()
    if reason is not None:
        raise ConfigError(f"{reason}; the run itself is whole: the same command measures it again")
    return result
