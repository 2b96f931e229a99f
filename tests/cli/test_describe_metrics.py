"""`metrics describe`: the list of numbers, asked from a terminal."""

import pytest

from moe_runtime.cli.describe_metrics import describe
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.record import METRICS


def test_all_numbers_have_a_line(capsys: pytest.CaptureFixture) -> None:
    describe()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" [")[0] for line in lines] == list(METRICS)


def test_one_number_a_group_and_one_of_a_layer_are_told(capsys: pytest.CaptureFixture) -> None:
    describe(["loss", "layers/layers.3/violation", "routing/violation"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loss [") and METRICS["loss"].definition in lines[0]
    assert lines[1].startswith("layers/layers.3/violation [")
    assert [line.split(" [")[0].rpartition("/")[2] for line in lines[2:]] == ["min", "p50", "max"]


def test_an_unknown_number_is_one_line_with_the_one_that_comes_close() -> None:
    with pytest.raises(ConfigError) as caught:
        describe(["los"])
    assert str(caught.value).startswith("metrics describe: expected a number of a record, got 'los'; did you")
