"""What is counted of casts, against counting element by element."""

import math

import pytest
import torch
from torch import Tensor

from moe_runtime.fp8 import cast
from moe_runtime.fp8.policy import Choice
from moe_runtime.fp8.tiled import Tiles
from moe_runtime.fp8.watch import ROWS, Fp8Watch
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.ffn import SwiGLU
from moe_runtime.model.fp8_gated import Fp8FeedForward
from moe_runtime.model.fp8_linear import Fp8Multiplier
from moe_runtime.model.fp8_operands import Kit
from moe_runtime.train.meters.numerics import of_casts


def wild(rows: int, columns: int) -> Tensor:
    """Values of very different sizes, zeros among them, whole tiles too."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    made *= torch.exp2(torch.randint(-30, 3, (rows, columns), generator=torch.Generator().manual_seed(1)))
    made[:, ::5] = 0.0
    made[rows // 2] = 0.0
    return made


def counted(values: Tensor, tiles: Tiles) -> dict[str, float]:
    """The same, one element at a time."""
    lost = cut = 0
    used: set[float] = set()
    for row in range(min(ROWS, values.shape[0])):
        for column in range(values.shape[1]):
            value, code = float(values[row, column]), int(tiles.codes[row, column]) & 0x7F
            lost += value != 0.0 and code == 0
            cut += code == 0x7E
            if code:
                used.add(float(tiles.scales[row, column // 128]))
    elements = min(ROWS, values.shape[0]) * values.shape[1]
    return {
        "amax": float(values[:ROWS].abs().max()),
        "underflow": lost / elements,
        "saturation": cut / elements,
        "scale_min": min(used),
        "scale_max": max(used),
    }


@pytest.mark.parametrize(("rows", "columns"), [(3, 128), (5, 300), (131, 7)])
def test_counts_are_those_of_a_look_at_each_element(rows: int, columns: int) -> None:
    values, watch = wild(rows, columns), Fp8Watch()
    tiles = cast.cast_rows(values)
    watch.begin(True)
    watch.saw("input", values, tiles)
    found = of_casts(watch, None, 1)
    wanted = counted(values, tiles)
    assert found["fp8"] == {"input": pytest.approx(wanted)} and wanted["underflow"] > 0.0
    assert found["fp8_error"] is None


def test_weights_are_seen_in_their_blocks() -> None:
    casts, watch = WeightCasts(), Fp8Watch()
    weights = [torch.randn(2, 200, 130), torch.randn(40, 24) * 2.0**-20]
    scales = [casts.blocks(weight).scales for weight in weights]
    watch.begin(True)
    watch.saw_weights(casts)
    found = of_casts(watch, None, 1)["fp8"]["weight"]
    assert found["amax"] == max(float(weight[..., :ROWS, :].abs().max()) for weight in weights)
    assert found["scale_min"] == float(scales[1].min())
    assert found["scale_max"] == float(scales[0][:, :1].max())


def test_layers_show_what_they_cast_and_a_product_of_it() -> None:
    kit = Kit(Choice(), WeightCasts(), cast)
    linear, ffn = Fp8Multiplier(kit), SwiGLU(64, 96)
    ffn.compute = Fp8FeedForward(kit)
    for param in ffn.parameters():
        torch.nn.init.normal_(param, std=0.1)
    x, weight = torch.randn(20, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)

    def step() -> Tensor:
        out = ffn(linear(x, weight))
        out.sum().backward()
        return out

    plain = step()
    assert not kit.watch.classes, "nobody asked"
    kit.watch.begin(True)
    assert torch.equal(step(), plain), "to be watched changes nothing"
    found = of_casts(kit.watch, None, 1)
    assert set(found["fp8"]) == {"input", "gradient"} and 0.01 < found["fp8_error"] < 0.06
    # x and what the feed-forward gets, of 64 columns each, and its product of 96.
    assert float(kit.watch.classes["input"].counts[0]) == 20 * (64 + 64 + 96)
    # What comes back to the feed-forward, to its product's two factors, and to the linear.
    assert float(kit.watch.classes["gradient"].counts[0]) == 20 * (64 + 192 + 64)
    kit.watch.begin(False)
    assert not kit.watch.classes


def test_what_is_not_finite_shows() -> None:
    values, watch = torch.ones(4, 128), Fp8Watch()
    values[1, 3] = math.inf
    watch.begin(True)
    watch.saw("gradient", values, cast.cast_rows(values))
    found = of_casts(watch, None, 1)["fp8"]["gradient"]
    assert found["amax"] == math.inf and math.isnan(found["scale_max"])
