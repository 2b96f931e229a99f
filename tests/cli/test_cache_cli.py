"""`moe-runtime cache`, and sizes as people write them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.cli.prefix_options import DEFAULT_CACHE_SIZE, bytes_of
from moe_runtime.errors import ConfigError
from moe_runtime.generate.prefix_folder import FOLDER
from tests.unit.generate.prefix_samples import BLOCK_BYTES, block_files, cache_of, learn, text_of


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("500MB", 500 * 10**6),
        ("1.5GiB", 3 << 29),
        ("2 k", 2000),
        (" 1tib ", 1 << 40),
        (DEFAULT_CACHE_SIZE, 10**9),
    ],
)
def test_a_size_is_bytes_with_or_without_a_unit(size: str, expected: int) -> None:
    assert bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "-1", "1PB", "MB", "1e9", "1 GB GB"])
def test_what_is_no_size_is_refused_in_one_line(size: str) -> None:
    with pytest.raises(ConfigError, match=r"--cache-size: expected bytes, such as .*, got"):
        bytes_of(size)


def test_show_counts_and_clear_removes_blocks_alone(tmp_path: Path) -> None:
    learn(cache_of("disk", tmp_path), text_of(1, 2))
    (tmp_path / FOLDER / "notes.txt").write_text("mine")
    shown = CliRunner().invoke(app, ["cache", "show", str(tmp_path), "--json"])
    said = json.loads(shown.stdout)
    assert (said["blocks"], said["tokens"], said["bytes"]) == (2, 128, 2 * BLOCK_BYTES["disk"])
    assert "2 blocks of 64 tokens" in CliRunner().invoke(app, ["cache", "show", str(tmp_path)]).stdout
    assert CliRunner().invoke(app, ["cache", "clear", str(tmp_path)]).stdout == "removed 2 files\n"
    assert not block_files(tmp_path) and (tmp_path / FOLDER / "notes.txt").exists()


@pytest.mark.parametrize("command", ["show", "clear"])
def test_a_folder_without_a_cache_is_refused_and_not_made(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["cache", command, str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert "expected a folder of the prefix cache" in str(result.exception)
    assert not list(tmp_path.iterdir())
