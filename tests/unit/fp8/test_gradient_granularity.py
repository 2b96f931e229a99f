"""Why gradients are cast 1 x 128: beside outlier tokens, ordinary ones would lose their bits in a block.

Measured as the mean over tokens of each token's own signal to noise: the number for the whole gradient is
that of the outliers, 31 dB either way, and does not see what the others lost.
"""

import pytest
import torch

from moe_runtime.fp8.cast import cast_rows, cast_weight, decode
from moe_runtime.fp8.difference import row_sqnr_db, sqnr_db
from moe_runtime.fp8.gemm import multiply

TOKENS, WIDTH = 512, 384


def gradient(suite: str) -> torch.Tensor:
    """Normal gradients [tokens, width], tokens of different magnitudes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    if suite == "one of 1e5 in 128":
        x[::128] *= 1e5
    elif suite == "lognormal of 3":
        x *= torch.randn(TOKENS, 1, generator=generator).mul(3).exp()
    return x


@pytest.mark.parametrize("suite", ["one of 1e5 in 128", "lognormal of 3"])
def test_tiles_keep_ordinary_tokens_by_6_db_more_than_blocks(suite: str) -> None:
    d_out = gradient(suite)
    tiles, blocks = cast_rows(d_out), cast_weight(d_out)
    assert row_sqnr_db(d_out, decode(tiles)) > row_sqnr_db(d_out, decode(blocks)) + 6
    assert abs(sqnr_db(d_out, decode(tiles)) - sqnr_db(d_out, decode(blocks))) < 0.1
    # The same for what Dgrad makes of it. Values of blocks are those of tiles with the block's scale.
    weight = torch.randn(WIDTH, 200, generator=torch.Generator().manual_seed(1))
    exact = d_out.double() @ weight.double()
    right = cast_weight(weight).transposed()
    coarse = decode(blocks) @ decode(right).t()
    assert row_sqnr_db(exact, multiply(tiles, right, torch.float32)) > row_sqnr_db(exact, coarse) + 4


def test_without_outliers_there_is_nothing_between_them() -> None:
    d_out = gradient("none")
    tiles, blocks = (
        row_sqnr_db(d_out, decode(cast_rows(d_out))),
        row_sqnr_db(d_out, decode(cast_weight(d_out))),
    )
    assert tiles > 31 and abs(tiles - blocks) < 0.1
