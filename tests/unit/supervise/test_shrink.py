"""The layout of a run whose machines are not all there."""

import pytest

from moe_runtime.cli.supervise.shrink import Shape, fit_shape
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError


def _config(pp: int, dp: int, ep: int, batch: int) -> RunConfig:
    overrides = [f"layout.pp={pp}", f"layout.dp={dp}", f"layout.ep={ep}", "batch.ramp_start_size=null"]
    return load_config("quickstart", [*overrides, f"batch.global_batch_size={batch}", "layout.schedule=auto"])


@pytest.mark.parametrize(
    ("available", "dp", "world_size"),
    [(16, 8, 16), (20, 8, 16), (15, 4, 8), (12, 4, 8), (8, 4, 8), (7, 2, 4), (4, 2, 4)],
)
def test_the_largest_multiple_of_ep_that_divides_the_batch_is_taken(
    available: int, dp: int, world_size: int
) -> None:
    # A batch of 32 is no multiple of dp 6, and dp 7, 5 and 3 are none of ep 2.
    assert fit_shape(_config(2, 8, 2, 32), available) == Shape(dp, world_size)


def test_too_few_processes_for_pp_and_ep_are_refused() -> None:
    with pytest.raises(ConfigError, match="pp 2 x ep 2 needs 4 processes at least, got 3; start more"):
        fit_shape(_config(2, 8, 2, 32), 3)
