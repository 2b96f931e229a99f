"""Items of the user's: what is read, and what is refused with file, line and remedy."""

from pathlib import Path

import pytest

from moe_runtime.errors import DataError
from moe_runtime.evaluation.task_items import ChoiceItem, TargetItem, read_items, with_examples


def read(tmp_path: Path, *lines: str) -> list[ChoiceItem | TargetItem]:
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(lines))
    return read_items(file)


def test_both_kinds_are_read_with_their_defaults(tmp_path: Path) -> None:
    choice, target = read(
        tmp_path,
        '{"context": "a", "choices": ["b", " c"], "answer": 1}',
        "",
        '{"id": 7, "context": "", "target": " x ", "stop": "\\n"}',
    )
    assert isinstance(choice, ChoiceItem) and isinstance(target, TargetItem)
    assert (choice.id, choice.choices, choice.solution) == ("1", ("b", " c"), " c")
    assert (target.id, target.stop, target.max_tokens) == ("7", ("\n",), 64)
    assert target.where.endswith("items.jsonl:3")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "expected a JSON object, got no JSON"),
        ("[]", "expected an object, got 'list'"),
        ('{"context": "a"}', "one of the keys choices and target"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 0, "target": "b"}', "got 'both'"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "a place from 0 to 1 under answer, got 2"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "under answer, got True"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "at least one character as choices[1]"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "at least two texts under choices"),
        ('{"choices": ["b", "c"], "answer": 0}', "a string under context, got None"),
        ('{"context": "a", "target": "b", "stopp": ["c"]}', "keys out of context, id, max_tokens, stop"),
        ('{"context": "a", "target": "b", "stop": [""]}', "under stop"),
        ('{"context": "a", "target": "b", "max_tokens": 0}', "at least 1 under max_tokens, got 0"),
        ('{"context": "a", "target": "b", "target": "c"}', "the key 'target' stands twice"),
        ('{"context": "a", "choices": ["b", "c"], "answer": ' + "9" * 5000 + "}", "got no JSON (Exceeds"),
        ('{"id": [], "context": "a", "target": "b"}', "a string or a number under id"),
    ],
)
def test_a_bad_line_is_named_with_what_was_expected_and_what_to_do(
    line: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as raised:
        read(tmp_path, '{"context": "a", "target": "b"}', line)
    said = str(raised.value)
    assert "items.jsonl:2: expected" in said and says in said and "mend the line" in said
    assert "\n" not in said


def test_a_file_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one item"):
        read(tmp_path, "", " ")
    with pytest.raises(DataError, match="No such file"):
        read_items(tmp_path / "none.jsonl")


def test_examples_stand_solved_before_the_others_and_are_not_scored(tmp_path: Path) -> None:
    items = read(
        tmp_path,
        '{"context": "1+1=", "target": "2"}',
        '{"context": "2+2=", "choices": ["3", "4"], "answer": 1}',
        '{"context": "3+3=", "target": "6"}',
    )
    (left,) = with_examples(items, 2, tmp_path)
    assert left.context == "1+1=2\n\n2+2=4\n\n3+3=" and left.id == "3"
    with pytest.raises(DataError, match="more items than examples, got 3"):
        with_examples(items, 3, tmp_path)
