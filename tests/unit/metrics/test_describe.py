"""`metrics describe` answers what a number means, and says so where there is no such number."""

import json

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.metrics import app
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.page import page
from moe_runtime.metrics.record import METRICS


def said(*words: str) -> str:
    result = CliRunner().invoke(app, ["describe", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_all_metrics_are_described_one_a_line() -> None:
    assert [line.split(" ")[0] for line in said().splitlines()] == list(METRICS)


def test_a_key_as_it_stands_in_wandb_is_described() -> None:
    (line,) = said("layers/layers.3/bias_max").splitlines()
    assert line.startswith("layers/layers.3/bias_max [1]: largest routing bias")


def test_the_beginning_of_keys_is_all_of_them() -> None:
    assert said("routing/violation") == said(
        *(f"routing/violation/{place}" for place in ("min", "p50", "max"))
    )
    assert list(json.loads(said("grad_norms", "ettr", "--json"))) == ["grad_norms/*", "ettr"]


def test_the_page_is_the_one_in_docs() -> None:
    assert said("--markdown") == page()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["los_mtp"], "did you mean loss_mtp"),
        (["routing/violatoin/max"], "did you mean routing/violation/max"),
        (["qqqqqq"], "shows all"),
        (["loss", "--markdown"], "--markdown"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        CliRunner().invoke(app, ["describe", *words], catch_exceptions=False)
    assert "\n" not in str(caught.value)
