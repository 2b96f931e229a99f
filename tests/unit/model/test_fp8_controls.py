"""The casts that are worse on purpose are worse in what they are meant to be, and sound otherwise."""

import pytest
import torch
from torch import Tensor

from benchmarks.fp8_controls import BlockGradients, FixedScales
from benchmarks.fp8_loss import GATE, report
from moe_runtime.fp8 import cast
from moe_runtime.fp8.tiled import Groups, Tiles
from tests.unit.model.samples import draw

COUNTS = [5, 0, 130, 1]


def error_db(tiles: Tiles, exact: Tensor) -> float:
    """Mean over rows of their signal to error, in dB."""
    error = (cast.decode(tiles) - exact).square().sum(1)
    return float((10 * torch.log10(exact.square().sum(1) / error)).mean())


def with_outliers() -> Tensor:
    """A gradient of which every 16th token is 30,000 times as large."""
    x = draw(136, 200, dtype=torch.float32)
    x[::16] *= 3e4
    return x


def test_block_gradients_lose_small_tokens_beside_large_ones_and_keep_experts_apart() -> None:
    x, groups = with_outliers(), Groups(torch.tensor(COUNTS), torch.device("cpu"))
    rows, columns = BlockGradients().cast_both(x, groups)
    assert error_db(cast.cast_both(x, groups)[0], x) - error_db(rows, x) > 6
    # Both forms are of one rounding.
    spread = cast.decode(columns).t()
    held = torch.cat(
        [part[:n] for part, n in zip(spread.split(groups.padded_counts.tolist()), COUNTS, strict=True)]
    )
    assert torch.equal(held, cast.decode(rows))
    alone, _ = BlockGradients().cast_both(x[5:135])
    assert torch.equal(cast.decode(alone), cast.decode(rows)[5:135])


@pytest.mark.parametrize("scale", [None, 1.0])
def test_fixed_scales_fit_the_first_tensor_and_no_smaller_one(scale: float | None) -> None:
    casts, x = FixedScales(scale), draw(40, 200, dtype=torch.float32)
    assert error_db(casts.cast_rows(x), x) > 25
    assert error_db(casts.cast_rows(x * 2.0**-16), x * 2.0**-16) < 15
    assert error_db(cast.cast_rows(x * 2.0**-16), x * 2.0**-16) > 25


def test_the_report_says_who_misses_the_gate(capsys: pytest.CaptureFixture[str]) -> None:
    def run(variant: str, factor: float) -> dict:
        return {"loss": 2.0 * factor, "validation": 2.0, "variant": variant}

    runs = {
        (variant, seed, 7): run(variant, factor)
        for seed in (0, 1)
        for variant, factor in (("bf16", 1.0), ("fp8", 1 + 0.9 * GATE), ("fixed-scales", 1 - 1.1 * GATE))
    }
    report(runs, 7)
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert "holds" in told["fp8"] and "MISSES" in told["fixed-scales"]
