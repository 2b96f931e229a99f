"""Layers under casts that lay scales out as those of a GPU do: by columns, rows rounded up to 4."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_comm import local
from moe_comm.kernels.launch import check_rows
from torch import Tensor

from moe_runtime.fp8 import cast
from moe_runtime.fp8.tiled import Tiles
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.ffn import SwiGLU
from moe_runtime.model.fp8_gated import Fp8Experts, Fp8FeedForward
from moe_runtime.model.fp8_linear import Fp8Multiplier
from moe_runtime.model.fp8_operands import Kit, hang
from tests.unit.model.samples import draw
from tests.unit.model.test_fp8_layers import COUNTS, F32, ROLES, leaves, run
from tests.unit.model.test_fp8_model import fp8_model, gradients, sample


def by_columns(made: Any) -> Any:
    """The same tiles, scales as [tiles, rows rounded up to 4] seen across."""
    if isinstance(made, tuple):
        return tuple(by_columns(part) for part in made)
    if not isinstance(made, Tiles):
        return made
    rows, tiles = made.scales.shape
    room = torch.full((tiles, -(-rows // 4) * 4), torch.nan)
    room[:, :rows] = made.scales.t()
    return Tiles(made.codes, room[:, :rows].t())


class ByColumns:
    """`fp8.cast` with its scales laid out by columns."""

    def __getattr__(self, name: str) -> Any:
        fn = getattr(cast, name)
        return lambda *args, **kwargs: by_columns(fn(*args, **kwargs))


def kits(role: str) -> tuple[Kit, Kit]:
    return Kit(ROLES[role], WeightCasts(), cast), Kit(ROLES[role], WeightCasts(), ByColumns())


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("role", ["all", "bf16 wgrad"])
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_a_linear_and_a_feed_forward_do_not_mind(rows: int, role: str) -> None:
    ffn = SwiGLU(160, 72, dtype=F32)

    def feed(kit: Kit) -> Callable[..., Tensor]:
        def fast(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            object.__setattr__(ffn.gate_up, "_parameters", {"weight": gate_up})
            object.__setattr__(ffn.down, "_parameters", {"weight": down})
            return Fp8FeedForward(kit)(ffn, x, None)

        return fast

    linear, gated = leaves((rows, 160), (72, 160)), leaves((rows, 160), (144, 160), (160, 72))
    plain, other = kits(role)
    assert_same(
        run(lambda x, w: Fp8Multiplier(other)(x, w), linear),
        run(lambda x, w: Fp8Multiplier(plain)(x, w), linear),
    )
    assert_same(run(feed(other), gated), run(feed(plain), gated))


@pytest.mark.parametrize("role", ["all", "bf16 wgrad"])
@pytest.mark.parametrize("name", COUNTS)
def test_experts_do_not_mind(name: str, role: str) -> None:
    counts = torch.tensor(COUNTS[name])
    m = int(counts.sum())
    x, gate_up, down = leaves((m, 136), (4, 144, 136), (4, 136, 72))
    inputs = [x, draw(m, seed=7, dtype=F32).abs().requires_grad_(), gate_up, down]
    wanted, got = (run(lambda *given, k=kit: Fp8Experts(k)(*given, counts), inputs) for kit in kits(role))
    assert_same(got, wanted)


@pytest.mark.parametrize("shape", [(0, 300), (5, 300), (8, 128)])
def test_bytes_of_scales_lie_as_row_kernels_want_them(shape: tuple[int, int]) -> None:
    x = draw(*shape, seed=1, dtype=F32)
    hang(x, by_columns(cast.cast_rows(x)))
    for field in local.LocalDispatcher(4, keep_tiles=True)._codec.encode(x):
        check_rows(field, "field")


def test_a_model_takes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With row kernels' wishes for what a dispatcher is given, which its form for a CPU does not have."""
    gather, seen = local._rows_of, []

    def checked(values: Tensor, plan: Any) -> Tensor:
        check_rows(values, "tokens")
        seen.append(values.dtype)
        return gather(values, plan)

    monkeypatch.setattr(local, "_rows_of", checked)
    tokens = sample()
    wanted = gradients(fp8_model()[0], tokens)
    got = gradients(fp8_model(casts=ByColumns())[0], tokens)
    assert got.keys() == wanted.keys()
    assert_same(list(got.values()), list(wanted.values()))
    assert set(seen) == {torch.uint8}
