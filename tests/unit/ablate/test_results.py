"""Results as lines: torn ones are passed over, wrong ones are told, and the file is tried before training."""

import json

import pytest

from moe_runtime.cli.ablate.results import check_writable, read_results
from moe_runtime.errors import ConfigError

GOOD = {"key": "k", "measures": {"val_loss": 1.0}, "curves": {}}


def test_the_last_line_of_a_key_holds_and_a_torn_one_is_passed_over(tmp_path):
    file = tmp_path / "r.jsonl"
    later = GOOD | {"measures": {"val_loss": 2.0}}
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(later) + "\n" + json.dumps(GOOD)[:20])
    assert read_results(file) == {"k": later}
    assert read_results(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize(
    "line", ["garbage", "[1, 2]", "{}", '{"key": "k"}', json.dumps(GOOD | {"measures": {"val_loss": "x"}})]
)
def test_a_line_that_is_no_result_is_told(tmp_path, line):
    file = tmp_path / "r.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ConfigError, match=r"r\.jsonl:2: expected a result"):
        read_results(file)


def test_a_file_that_cannot_be_written_or_read_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(tmp_path / "file" / "r.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path)
