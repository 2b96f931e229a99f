"""One-way imports, and floors that do not need torch."""

import ast
import subprocess
import sys

import pytest

from tests.arch.sources import PACKAGES, ROOT, name_of, python_files, tree_of

_LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
_WITHOUT_TORCH = """
import importlib, pkgutil, sys
for name in ("torch", "numpy", "deepspeed"):
    sys.modules[name] = None
import moe_runtime.errors
for package in ("moe_runtime.config", "moe_runtime.schedule", "moe_runtime.planner"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
"""
# Libraries that are slow to import or may be absent, and the only files that may import them at the top.
_LAZY = {
    "deepspeed": "moe_runtime/parallel/zero",
    "wandb": "",
    "mpi4py": "",
    "pyarrow": "",
    "transformers": "",
}
# Where deepspeed may be imported at all.
_DEEPSPEED = (
    "moe_runtime/parallel/zero",
    "moe_runtime/cli/bench_comm/deepspeed_peer",  # contenders to measure against
    "moe_runtime/cli/bench_optim/deepspeed_peer",
    "moe_runtime/cli/bench_pipeline/deepspeed_peer",
    "tests/",
    "benchmarks/",
)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_house_keeps_its_import_contracts() -> None:
    done = _run(_LINT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_config_schedule_and_planner_import_where_torch_is_absent() -> None:
    done = _run(_WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.split(".")[0]]
    return []


@pytest.mark.parametrize("library", _LAZY)
def test_optional_and_slow_libraries_are_imported_where_they_are_used(library: str) -> None:
    allowed = _LAZY[library]
    offenders = [
        f"{name_of(file)}:{node.lineno}"
        for file in python_files(PACKAGES)
        if not (allowed and name_of(file).startswith(allowed))
        for node in tree_of(file).body
        if library in _imported(node) and isinstance(node, ast.stmt)
    ]
    assert not offenders, f"{library} is imported at the top of {offenders}"


def test_deepspeed_is_known_to_the_zero_adapter_alone() -> None:
    offenders = [
        name_of(file)
        for file in python_files()
        if not name_of(file).startswith(_DEEPSPEED)
        for node in ast.walk(tree_of(file))
        if "deepspeed" in _imported(node)
    ]
    assert not offenders


def test_annotations_are_never_postponed() -> None:
    offenders = [
        name_of(file)
        for file in python_files()
        for node in tree_of(file).body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    assert not offenders, "jaxtyping cannot check postponed annotations"
