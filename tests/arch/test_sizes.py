"""Files of one subject, functions of one thought."""

import ast

from tests.arch.sources import name_of, python_files, tree_of

_MAX_FILE_LINES = 400
_MAX_FUNCTION_LINES = 60


def test_no_file_is_longer_than_400_lines() -> None:
    sizes = {name_of(file): len(file.read_text().splitlines()) for file in python_files()}
    assert not {name: size for name, size in sizes.items() if size > _MAX_FILE_LINES}


def test_no_function_is_longer_than_60_lines() -> None:
    sizes = {
        f"{name_of(file)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for file in python_files()
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: size for name, size in sizes.items() if size > _MAX_FUNCTION_LINES}


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [name_of(file) for file in python_files() if file.stem in drawers]
