"""Files of tasks scored with a model: the report, lines for people, and an object for each item."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.evaluation.language_model import LanguageModel
from moe_runtime.evaluation.task_items import read_items, with_examples
from moe_runtime.evaluation.task_scores import (
    ChoiceScore,
    Score,
    TaskResult,
    score_items,
    summarise,
)


@dataclass(frozen=True)
class TaskFigures:
    """What one file gave."""

    file: str
    scores: list[Score]
    result: TaskResult


def score_file(model: LanguageModel, file: Path, shots: int) -> TaskFigures:
    """Score the items of a file.

    Raises:
        DataError: a line is no item, or an item does not fit the model's window.
    """
    scores = score_items(model, with_examples(read_items(file), shots, file))
    return TaskFigures(str(file), scores, summarise(scores))


def task_report(figures: TaskFigures, context: int) -> dict[str, Any]:
    """What is said of a file in JSON."""
    result = figures.result
    metrics = {
        name: {"mean": one.mean, "low": one.low, "high": one.high, "items": result.items[name]}
        for name, one in result.metrics.items()
    }
    return {
        "file": figures.file,
        "metrics": metrics,
        "ties": result.ties,
        "cut": result.cut,
        "context": context,
    }


def task_lines(figures: TaskFigures, context: int) -> list[str]:
    """What is said of a file to people."""
    result = figures.result
    said = [
        f"{name} {one.mean:.3f} [{one.low:.3f} to {one.high:.3f}] of {result.items[name]}"
        for name, one in result.metrics.items()
    ]
    lines = [f"{figures.file}: {', '.join(said)}"]
    if result.ties:
        lines.append(f"  ties, where the first of the best choices was taken: {result.ties}")
    if result.cut:
        lines.append(f"  longer than the {context} tokens seen, and cut from the left: {result.cut}")
    return lines


def write_items(figures: list[TaskFigures], out: Path) -> None:
    """One JSON object a line for each item.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = [json.dumps({"file": one.file, **_item(score)}) for one in figures for score in one.scores]
    try:
        out.write_text("".join(line + "\n" for line in lines))
    except OSError as error:
        raise ConfigError(f"--items {out}: expected a file to write, got: {error.strerror}") from error


def _item(score: Score) -> dict[str, Any]:
    shared = {"id": score.item.id, "cut": score.is_cut, **score.metrics}
    if isinstance(score, ChoiceScore):
        return shared | {
            "log_likelihoods": score.log_likelihoods,
            "chosen": score.by_sum,
            "chosen_norm": score.by_bytes,
            "answer": score.item.answer,
            "ties": score.ties,
        }
    return shared | {"text": score.text, "target": score.item.target}
