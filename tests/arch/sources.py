"""The project's own files, as the tests of the house see them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("moe_runtime", "comm/moe_comm")
FOLDERS = (*PACKAGES, "tests", "benchmarks")
_NOT_OURS = {".venv", ".git", "runs", "data", "wandb", "build", "dist"}


def python_files(folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """All Python files under the folders, in order."""
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def text_files() -> Iterator[Path]:
    """All files that people wrote: code, configs, documents, scripts."""
    for file in sorted(ROOT.rglob("*")):
        parts = file.relative_to(ROOT).parts
        is_ours = not (set(parts[:1]) & _NOT_OURS) and "__pycache__" not in parts
        hidden = any(part.startswith(".") and part not in (".ci", ".importlinter") for part in parts)
        if is_ours and not hidden and file.is_file() and file.suffix in _SUFFIXES:
            yield file


_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ""}


@cache
def tree_of(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def name_of(file: Path) -> str:
    """The path from the root of the repository, for messages."""
    return str(file.relative_to(ROOT))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute chain, or the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""
