"""Where ranks speak: into files of the run folder, and to the user what he must read."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_runtime.cli.rank_output import last_words, log_path, read_ranks
from moe_runtime.errors import ConfigError
from tests.cli.small_run import ROOT

_HEAD = """
import os, sys
from pathlib import Path
from moe_runtime.cli.rank_output import leave_no_trace, note, tell_user, turn_to_file
turn_to_file(Path(sys.argv[1]), 3, "attempt 1", private=True, fresh={fresh}, shown={shown})
"""


def speak(
    run_dir: Path, words: str, fresh: bool = False, shown: bool = False
) -> subprocess.CompletedProcess[str]:
    """A process that turns its output to a file, and then says something."""
    program = _HEAD.format(fresh=fresh, shown=shown) + words
    command = [sys.executable, "-c", program, str(run_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_whatever_speaks_in_a_rank_goes_to_its_file_even_its_last_words(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "small"
    words = """
print("of python")
os.system("echo of a child")
os.write(2, b"of a library\\n")
note("noted")
tell_user("for the user")
os.abort()
"""
    ended = speak(run_dir, words)
    assert ended.returncode < 0
    assert (ended.stdout, ended.stderr) == ("", "for the user\n")
    head, *lines = log_path(run_dir, 3).read_text().splitlines()
    assert re.fullmatch(r"--- \S+ rank 3, attempt 1", head)
    assert {"of a child", "of a library", "noted", "for the user"} <= set(lines)
    assert (run_dir.stat().st_mode & 0o777) == 0o700
    speak(run_dir, "print('again')")
    text = log_path(run_dir, 3).read_text()
    assert text.count("--- ") == 2 and text.endswith("again\n"), "a later attempt adds to it"
    speak(run_dir, "print('anew')", fresh=True)
    assert log_path(run_dir, 3).read_text().count("--- ") == 1


def test_the_last_words_of_the_newest_process_are_found(tmp_path: Path) -> None:
    assert last_words(tmp_path / "run", 3) == ""
    speak(tmp_path / "run", "os.write(1, b'working\\n'); os.write(2, b'terminate called\\n\\n')")
    assert last_words(tmp_path / "run", 3) == "terminate called"
    speak(tmp_path / "run", "os.abort()")
    assert last_words(tmp_path / "run", 3) == "", "the newest has said nothing"


def test_a_rank_that_was_asked_for_is_heard_on_the_console_too_to_its_last_word(tmp_path: Path) -> None:
    words = "print('one'); sys.stdout.flush(); os.write(2, b'two'); os.kill(os.getpid(), 9)"
    ended = speak(tmp_path / "run", words, shown=True)
    assert ended.stdout == "" and ended.stderr.splitlines() == ["[rank 3] one", "[rank 3] two"]
    assert log_path(tmp_path / "run", 3).read_text().splitlines()[1:] == ["one", "two"]


def test_a_run_that_was_refused_leaves_no_folder_unless_something_was_said(tmp_path: Path) -> None:
    assert speak(tmp_path / "run", "leave_no_trace()").returncode == 0
    assert not (tmp_path / "run").exists()
    speak(tmp_path / "run", "print('warned'); leave_no_trace()")
    assert log_path(tmp_path / "run", 3).read_text().endswith("warned\n")
    before = log_path(tmp_path / "run", 3).read_text()
    speak(tmp_path / "run", "leave_no_trace()")
    assert log_path(tmp_path / "run", 3).read_text() == before


def test_a_folder_that_cannot_be_made_leaves_the_rank_on_the_console(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = speak(tmp_path / "file" / "run", "print('heard'); tell_user('too')")
    assert (ended.stdout, ended.stderr) == ("heard\n", "too\n")


def test_ranks_are_named_by_numbers_and_ranges() -> None:
    assert read_ranks(None, 4) == frozenset() and read_ranks("all", 3) == {0, 1, 2}
    assert read_ranks("1, 4-6", 8) == {1, 4, 5, 6}
    for wrong in ("", "x", "1-", "-1", "1,,2", "1.5"):
        with pytest.raises(ConfigError, match="--log-ranks: expected all, or ranks such as 1,4-7, got"):
            read_ranks(wrong, 8)
    with pytest.raises(ConfigError, match="--log-ranks: expected ranks from 0 to 3, got 4"):
        read_ranks("1,4", 4)
