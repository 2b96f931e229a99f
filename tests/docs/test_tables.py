"""What two tables say: what was run where, and what each dependency is for."""

import ast
import re
import tomllib
from functools import cache
from itertools import chain

from tests.arch.sources import ROOT

_ANSWER = re.compile(
    r"(CI (only where it needs no GPU: |by the interpreter: )?`|CI, |(H200|by hand), \d{4}-\d\d-\d\d"
    r"|never run|no$|not needed there|a Triton kernel instead: H200, )"
)
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w*)`")


def _cells(page: str) -> list[str]:
    """Of all tables, without the first column, heads and rules."""
    rows = re.findall(r"^\|(.*)\|$", (ROOT / page).read_text(), re.MULTILINE)
    rules = [at for at, row in enumerate(rows) if set(row) <= set("|- ")]
    body = [row for at, row in enumerate(rows) if at not in rules and at + 1 not in rules]
    return [cell.strip() for row in body for cell in row.split(" | ")[1:]]


@cache
def _tests_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_answer_is_one_of_the_few() -> None:
    cells = _cells("docs/support.md")
    assert len(cells) > 70
    assert not [cell for cell in cells if not _ANSWER.match(cell)]


def test_what_is_said_to_run_in_the_tests_names_a_test_that_is_there() -> None:
    wrong = []
    for cell in _cells("docs/support.md"):
        named = _TEST.findall(cell)
        has_word = cell.startswith("CI") and not cell.startswith("CI, the same")
        known = all((ROOT / file).is_file() and name in _tests_in(file) for file, name in named)
        if (has_word and not named) or not known:
            wrong.append(cell)
    assert not wrong


def test_every_dependency_has_its_line_and_no_line_is_of_another() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.match(r"[\w.-]+", entry)[0].lower() for entry in wanted}  # type: ignore[index]
    table = (ROOT / "docs/decisions.md").read_text().split("## Dependencies")[1]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")][1:]
    told = {name.strip().lower() for row in rows for name in re.sub(r"\(.*?\)", "", row).split(",")}
    assert told == names
