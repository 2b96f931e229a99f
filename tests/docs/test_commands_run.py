"""The marked commands of the documents, run as they stand; see `pages` for the marks.

Each page has a folder of its own, with the repository's configs and documents in it. `./launch.sh` there
starts what the real one starts after its set-up.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arch.sources import ROOT
from tests.docs.pages import PAGES, Block, blocks_of, name_of

_SLOW_S = 600
_LAUNCH = f'#!/bin/sh\nexec "{sys.executable}" -m moe_runtime.cli.launch "$@"\n'
_COMMAND = f'#!/bin/sh\nexec "{sys.executable}" -m moe_runtime "$@"\n'
_SHARED = ("configs", "docs", "comm", "moe_runtime", "benchmarks", "README.md")


def _pages(word: str) -> list[Path]:
    """Pages with something to run; `slow`: with something that takes long."""
    return [page for page in PAGES if any(_is_run(block, word) for block in blocks_of(page))]


def _is_run(block: Block, word: str) -> bool:
    return block.mark == "run" and ("slow" in block.words) == (word == "slow")


def _folder(where: Path) -> dict[str, str]:
    """Make the folder; gives the environment of its commands."""
    programs = where / ".programs"
    programs.mkdir()
    for path, text in ((where / "launch.sh", _LAUNCH), (programs / "moe-runtime", _COMMAND)):
        path.write_text(text)
        path.chmod(0o755)
    for name in _SHARED:
        (where / name).symlink_to(ROOT / name)
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    path = f"{programs}:{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": f"{ROOT}:{ROOT / 'comm'}", "OMP_NUM_THREADS": "1"}


def _go_through(page: Path, where: Path, with_slow: bool) -> None:
    environment, said, skipped = _folder(where), "", False
    for block in blocks_of(page):
        place = f"{page.name}:{block.line}"
        if block.mark == "file":
            (where / block.words[0]).parent.mkdir(parents=True, exist_ok=True)
            (where / block.words[0]).write_text(block.text)
        elif block.mark == "run":
            needs_root = "root" in block.words and os.geteuid() != 0
            skipped = needs_root or ("slow" in block.words and not with_slow)
            if not skipped:
                said += _run(block.text, where, environment, place)
        elif block.mark == "says" and not skipped:
            missing = [line for line in block.text.splitlines() if line and not _is_in(line, said)]
            assert not missing, f"{place}: not printed: {missing}; printed:\n{said}"


def _run(text: str, where: Path, environment: dict[str, str], place: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=where,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SLOW_S,
    )
    assert done.returncode == 0, f"{place}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def _is_in(line: str, said: str) -> bool:
    """Whether a line was printed; `...` stands for anything, spaces count as one."""
    parts = [r"\s+".join(re.escape(word) for word in part.split()) for part in line.split("...")]
    return re.search(r"(?m)^\s*" + ".*".join(parts), said) is not None


@pytest.mark.parametrize("page", _pages("quick"), ids=name_of)
def test_quick_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    _go_through(page, tmp_path, with_slow=False)


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("page", _pages("slow"), ids=name_of)
def test_all_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    _go_through(page, tmp_path, with_slow=True)


def test_a_command_that_fails_or_prints_something_else_is_noticed(tmp_path: Path) -> None:
    for text, says in (("false", "exit code 1"), ("echo one 3", "not printed: ['two ...']")):
        where = tmp_path / text.split()[0]
        where.mkdir()
        page = tmp_path / f"{where.name}.md"
        page.write_text(f"<!-- run -->\n```\n{text}\n```\n\n<!-- says -->\n```\none ...\ntwo ...\n```\n")
        with pytest.raises(AssertionError) as caught:
            _go_through(page, where, with_slow=False)
        assert says in str(caught.value)
