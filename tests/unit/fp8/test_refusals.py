"""Operands that do not fit are refused in one line that says what was expected."""

import pytest
import torch

from moe_runtime.errors import ConfigError, NumericsError
from moe_runtime.fp8 import cast, gemm
from moe_runtime.fp8.tiled import Groups
from moe_runtime.optim import AdamW
from moe_runtime.optim.step_path import ENVIRONMENT

X = torch.randn(8, 256)
TILES = cast.cast_rows(X)
WEIGHTS = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: cast.cast_rows(X.int()), "floating dtype"),
        (lambda: cast.cast_rows([[1.0]]), "got list"),
        (lambda: cast.cast_columns(X.unsqueeze(0)), "two axes"),
        (lambda: cast.cast_weight(X[0]), r"weight \[..., n, k\]"),
        (lambda: cast.cast_weight(X.to(torch.complex64)), "floating dtype"),
        (lambda: cast.cast_gated(X[:, :255]), "even width"),
        (lambda: cast.cast_gated(X, WEIGHTS), r"row_weights \[8\]"),
        (lambda: cast.gated_backward_cast(X, TILES), r"d_product \[8, 128\]"),
        (lambda: cast.cast_normed(X, WEIGHTS, 1e-6), r"gain \[256\]"),
        (lambda: gemm.multiply(X, cast.cast_weight(X)), "got Tensor"),
        (lambda: Groups(torch.tensor([-3, 11]), X.device), "none negative"),
        (lambda: Groups(torch.tensor([8.0]), X.device), "int64"),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, expected: str) -> None:
    with pytest.raises(NumericsError, match=expected) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_mistakes_in_the_optimizer_name_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    param = torch.zeros(4)
    with pytest.raises(ConfigError, match="two betas"):
        AdamW([param], betas=(0.9,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="numbers for lr"):
        AdamW([param], lr="x")  # type: ignore[arg-type]
    monkeypatch.setenv(ENVIRONMENT, "nonsense")
    with pytest.raises(ConfigError, match=f"{ENVIRONMENT}: expected auto, eager or compiled"):
        AdamW([param])
    monkeypatch.setenv(ENVIRONMENT, "")
    AdamW([param])
