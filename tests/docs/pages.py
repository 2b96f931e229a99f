"""The documents, as the tests read them: blocks of code with their marks, code in sentences, links.

A mark is a comment on the line before a block:

    <!-- run -->            the tests run the block with bash, in order, in one folder for each page
    <!-- run slow -->       only with the slow tests; `root`: only as root
    <!-- file NAME -->      the block becomes this file of the folder
    <!-- says -->           each line was printed by the page's commands so far; `...` stands for anything
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.arch.sources import ROOT

PAGES = tuple(
    sorted(
        [*ROOT.glob("*.md"), ROOT / "comm/README.md", *(ROOT / "docs").rglob("*.md")],
        key=lambda page: str(page.relative_to(ROOT)),
    )
)
_MARK = re.compile(r"^<!--\s*(run|file|says)\b\s*([^>]*?)\s*-->$")
_SHELL = ("", "bash", "sh")
_ENDS = ("|", "&", "&&", ";", ">", "||")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        language: the word after the fence.
        text: without the fences.
        mark: run, file, says or nothing.
        words: the rest of the mark.
        line: of the fence, from 1.
    """

    language: str
    text: str
    mark: str
    words: tuple[str, ...]
    line: int


def name_of(page: Path) -> str:
    """Its path from the root of the repository."""
    return str(page.relative_to(ROOT))


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    """All fenced blocks of a page, in order."""
    lines = page.read_text().splitlines()
    found, at = [], 0
    while at < len(lines):
        if not lines[at].startswith("```"):
            at += 1
            continue
        end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
        mark = _MARK.match(lines[at - 1]) if at else None
        words = tuple(mark[2].split()) if mark else ()
        text = "\n".join(lines[at + 1 : end]) + "\n"
        found.append(Block(lines[at][3:].strip(), text, mark[1] if mark else "", words, at + 1))
        at = end + 1
    return tuple(found)


@cache
def prose_of(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def code_in_sentences(page: Path) -> list[str]:
    """What stands between single backticks."""
    return [text.replace("\n", " ") for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose_of(page))]


def commands_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of ours in blocks and sentences: how it stands there, and its words after the program."""
    for block in blocks_of(page):
        if block.language in _SHELL and block.mark not in ("file", "says"):
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from _ours(line)
    for text in code_in_sentences(page):
        yield from _ours(text)


def _ours(line: str) -> Iterator[tuple[str, list[str]]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quotation mark of prose, or a command over several lines
        words = line.split("#")[0].split()
    for at, word in enumerate(words):
        is_module = word == "moe_runtime" and at and words[at - 1] in ("-m", "--module")
        if word in ("./launch.sh", "moe-runtime", ".venv/bin/moe-runtime") or is_module:
            rest = words[at + 1 :]
            end = next((i for i, each in enumerate(rest) if each in _ENDS), len(rest))
            yield line.strip(), rest[:end]


def links_of(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


def anchors_of(page: Path) -> set[str]:
    """What a link to a heading of the page may end with, as GitHub names it."""
    headings = re.findall(r"^#+\s+(.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
