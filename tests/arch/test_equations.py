"""Every numbered equation of the DeepSeek-V3 report is claimed by a docstring: `Ref: DSV3 (1)-(11)`."""

import ast
import re
from collections.abc import Iterator

from tests.arch.sources import PACKAGES, name_of, python_files, tree_of

_REF = re.compile(r"Ref: DSV3 ([^\n]*)")
_RANGE = re.compile(r"\((\d+)\)(?:\s*-\s*\((\d+)\))?")
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _claims(docstring: str) -> Iterator[int]:
    for tag in _REF.findall(docstring):
        for first, last in _RANGE.findall(tag):
            yield from range(int(first), int(last or first) + 1)


def _claimed() -> dict[int, list[str]]:
    claimed: dict[int, list[str]] = {}
    for file in python_files(PACKAGES):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, _DOCUMENTED):
                for number in _claims(ast.get_docstring(node) or ""):
                    claimed.setdefault(number, []).append(name_of(file))
    return claimed


def test_ranges_and_lists_of_equations_are_understood() -> None:
    assert list(_claims("Ref: DSV3 (1)-(3), (16)")) == [1, 2, 3, 16]


def test_each_equation_of_the_report_is_claimed() -> None:
    missing = set(range(1, 26)) - set(_claimed())
    assert not missing, f"no docstring has a tag such as `Ref: DSV3 ({min(missing)})` for {sorted(missing)}"


def test_no_docstring_claims_an_equation_that_does_not_exist() -> None:
    assert not {number: files for number, files in _claimed().items() if not 1 <= number <= 25}
