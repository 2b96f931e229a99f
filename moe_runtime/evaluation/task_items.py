"""Tasks of the user's: a JSONL file, an item a line, read and checked.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
    {"context": "2 + 2 =", "target": "4", "stop": ["\\n"], "max_tokens": 8}

An item with `choices` is scored by likelihood, one with `target` by what is generated. Nothing is put between
context and choice: a space that belongs there is written in the choice. `id` names an item; otherwise its
line does. Keys that are not known are mistakes, so that a misspelt `stop` does not pass for none.

An empty choice is refused: it has no token to score, so its likelihood would be 1 and it would always win.
Equal choices are allowed, some published sets have them; they tie, and ties are counted (`task_scores.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from moe_runtime.data.vocabulary import scalar_text
from moe_runtime.errors import DataError

MAX_TOKENS = 64
_CHOICE_KEYS = frozenset({"id", "context", "choices", "answer"})
_TARGET_KEYS = frozenset({"id", "context", "target", "stop", "max_tokens"})
_REMEDY = "mend the line; docs/evaluation.md shows both kinds"


@dataclass(frozen=True)
class ChoiceItem:
    """Which of some continuations is right.

    Args:
        where: file:line, for messages.
        id: as the user says, else the line.
        context: text before the choices, may be empty.
        choices: at least two texts, none of them empty.
        answer: place of the right one.
    """

    where: str
    id: str
    context: str
    choices: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        """What follows the context in an example."""
        return self.choices[self.answer]


@dataclass(frozen=True)
class TargetItem:
    """Whether greedy decoding says what it should.

    Args:
        where, id, context: as of a choice.
        target: what should come, compared without white space at both ends.
        stop: strings that end the text.
        max_tokens: new tokens at most.
    """

    where: str
    id: str
    context: str
    target: str
    stop: tuple[str, ...]
    max_tokens: int

    @property
    def solution(self) -> str:
        """What follows the context in an example."""
        return self.target


Item: TypeAlias = ChoiceItem | TargetItem


def read_items(file: Path) -> list[Item]:
    """All items of a file, in order; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, a line is not an item, or there is none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # editors on Windows begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{file}: expected a JSONL file of items, got: {reason}") from error
    items = [_item(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise DataError(f"{file}: expected at least one item, got none; docs/evaluation.md shows both kinds")
    return items


def with_examples(items: Sequence[Item], shots: int, file: Path) -> list[Item]:
    """The items after the first `shots`, each with those, solved, before its context.

    Examples are parted by an empty line. They are not scored themselves.

    Raises:
        DataError: no items would be left.
    """
    if shots >= len(items):
        raise DataError(
            f"{file}: --shots {shots}: expected more items than examples, got {len(items)}; take fewer"
        )
    prefix = "".join(f"{one.context}{one.solution}\n\n" for one in items[:shots])
    return [replace(one, context=prefix + one.context) for one in items[shots:]]


def _item(line: str, where: str) -> Item:
    try:
        value = json.loads(line, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        said = str(error).partition(";")[0]
        if isinstance(error, json.JSONDecodeError):
            said = f"column {error.colno}: {error.msg}"
        raise DataError(f"{where}: expected a JSON object, got no JSON ({said}); {_REMEDY}") from error
    if not isinstance(value, dict):
        raise _wrong(where, "an object", type(value).__name__)
    kinds = [key for key in ("choices", "target") if key in value]
    if len(kinds) != 1:
        raise _wrong(where, "one of the keys choices and target", "both" if kinds else sorted(value)[:8])
    known = _CHOICE_KEYS if kinds == ["choices"] else _TARGET_KEYS
    if strange := sorted(set(value) - known):
        raise _wrong(where, f"keys out of {', '.join(sorted(known))}", strange[:8])
    name = value.get("id", where.rpartition(":")[2])
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise _wrong(where, "a string or a number under id", name)
    context = _text(value, "context", where)
    return (_choice if kinds == ["choices"] else _target)(value, where, str(name), context)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two equal keys JSON would silently take the last."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return dict(pairs)


def _choice(value: dict[str, Any], where: str, name: str, context: str) -> ChoiceItem:
    choices, answer = value["choices"], value.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise _wrong(where, "a list of at least two texts under choices", choices)
    for place, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise _wrong(where, f"a text of at least one character as choices[{place}]", choice)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise _wrong(where, f"a place from 0 to {len(choices) - 1} under answer", answer)
    return ChoiceItem(where, name, context, tuple(map(scalar_text, choices)), answer)


def _target(value: dict[str, Any], where: str, name: str, context: str) -> TargetItem:
    target, stop = _text(value, "target", where), value.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise _wrong(where, "texts of at least one character under stop", stop)
    most = value.get("max_tokens", MAX_TOKENS)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise _wrong(where, "a whole number of at least 1 under max_tokens", most)
    return TargetItem(where, name, context, target, tuple(map(scalar_text, stops)), most)


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise _wrong(where, f"a string under {key}", text)
    return scalar_text(text)


def _wrong(where: str, expected: str, got: object) -> DataError:
    return DataError(f"{where}: expected {expected}, got {got!r:.80}; {_REMEDY}")
