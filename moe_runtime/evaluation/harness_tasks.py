"""Items written as tasks of lm-evaluation-harness, so that an exported model can be run on them there.

The harness has settings a task, not an item: one output type, one list of stop strings, one number of tokens.
    So
items that differ in these become several tasks, and a group of the file's name joins them:

    NAME.yaml             the task, or the group of all
    NAME_1.yaml ...       tasks of a group
    NAME.jsonl ...        their items, examples already before their contexts

No template is used: the harness takes contexts, choices and targets from the columns as they are, with
    nothing put
between. Its `acc` is ours, its `acc_bytes` our `acc_norm` (its own `acc_norm` divides by characters), its
`exact_match` our `exact`. Items are read from absolute paths: a folder that is moved is written again.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_runtime.errors import ConfigError, DataError
from moe_runtime.evaluation.task_items import ChoiceItem, Item, TargetItem

CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")


def write_tasks(items: Sequence[Item], name: str, folder: Path) -> list[str]:
    """Write tasks of some items into a folder; gives the names of the tasks, without the group's.

    Raises:
        ConfigError: the name is no plain word.
        DataError: the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(f"--name: expected letters, digits and _ . - alone, got {name!r}")
    kinds: dict[object, list[Item]] = {}
    for item in items:
        kinds.setdefault(_settings(item), []).append(item)
    names = [name] if len(kinds) == 1 else [f"{name}_{number}" for number in range(1, len(kinds) + 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task, members in zip(names, kinds.values(), strict=True):
            file = (folder / f"{task}.jsonl").absolute()
            file.write_text("".join(json.dumps(_columns(one)) + "\n" for one in members))
            _write(folder / f"{task}.yaml", _task(task, file, members[0]))
        if len(names) > 1:
            _write(folder / f"{name}.yaml", {"group": name, "task": names})
    except OSError as error:
        raise DataError(f"{folder}: expected a folder to write, got: {error.strerror}") from error
    return names


def _settings(item: Item) -> object:
    return "choices" if isinstance(item, ChoiceItem) else (item.stop, item.max_tokens)


def _columns(item: Item) -> dict[str, Any]:
    shared = {"id": item.id, "context": item.context}
    if isinstance(item, ChoiceItem):
        return shared | {"choices": item.choices, "answer": item.answer}
    return shared | {"target": item.target.strip()}


def _task(name: str, file: Path, item: Item) -> dict[str, Any]:
    kind = _text_task(item) if isinstance(item, TargetItem) else _choice_task()
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "context",
        "target_delimiter": "",
        **kind,
        "metadata": {"version": 1.0},
    }


def _choice_task() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [_metric(name) for name in CHOICE_METRICS],
    }


def _text_task(item: TargetItem) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_target": "target",
        "generation_kwargs": {
            "until": list(item.stop),
            "max_gen_toks": item.max_tokens,
            "do_sample": False,
            "temperature": 0.0,
        },
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [_metric("exact_match")],
    }


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
