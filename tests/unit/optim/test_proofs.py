"""What FP8 moments promise over thousands of steps and under outliers, each with its control."""

import inspect
from pathlib import Path

import pytest
import torch
from moe_comm.wire.formats import E4M3, decode, encode_nearest

from moe_runtime.errors import ConfigError
from moe_runtime.optim import AdamW, moments
from moe_runtime.optim.counter_rng import derive_key
from moe_runtime.optim.moments import BLOCK, Fp8Moments, Noise, moment_storage

EPS = 1e-8


def suite(name: str) -> torch.Tensor:
    """sqrt(v) [512 blocks x 128]: mild, of sigma 3, or with one outlier a block."""
    normal = torch.randn(512, BLOCK, generator=torch.Generator().manual_seed(0))
    if name == "mild":
        root = torch.exp(normal)
    elif name == "sigma 3":
        root = torch.exp(3 * normal)
    else:
        root = torch.exp(0.5 * normal)
        root[:, 17] *= float(name)
    return (root * 1e-4).flatten()


def moments_of(root: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return 0.23 * root * torch.randn(root.shape, generator=torch.Generator().manual_seed(1)), root.square()


def largest_update(mean: torch.Tensor, square: torch.Tensor) -> float:
    return float((mean / (square.sqrt() + EPS)).abs().max())


@pytest.mark.parametrize("name", ["mild", "sigma 3", "1e3", "1e5"])
def test_one_storage_round_trip_never_enlarges_the_largest_update_by_half(name: str) -> None:
    mean, square = moments_of(suite(name))
    storage = Fp8Moments()
    state = storage.blank(mean)
    storage.write(state, 0, mean, square, Noise(derive_key(0, 1, 0), 0))
    got = largest_update(*storage.read(state, 0, mean.numel()))
    assert got <= 1.5 * largest_update(mean, square)
    blocks = square.view(-1, BLOCK)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.amax(1, keepdim=True) / E4M3.max_value)))
    linear = (decode(encode_nearest(blocks / scale, E4M3), E4M3) * scale).flatten()
    assert largest_update(mean, linear) > 100 * largest_update(mean, square)  # v itself in E4M3


def stored_over_exact(beta2: float, steps: int) -> torch.Tensor:
    """sqrt(v) with FP8 moments over that with FP32 ones, so many steps after gradients drop tenfold."""
    params = [torch.zeros(32 * BLOCK) for _ in range(2)]
    kinds = zip(params, ("fp8", "fp32"), strict=True)
    pair = [AdamW([param], betas=(0.9, beta2), moments=kind) for param, kind in kinds]
    draw = torch.Generator().manual_seed(3)
    for step in range(200 + steps):
        grad = torch.randn(params[0].shape, generator=draw) * (1e-3 if step < 200 else 1e-4)
        for param, optimizer in zip(params, pair, strict=True):
            param.grad = grad
            optimizer.step()
    stored, exact = (o.logical_state(p)["exp_avg_sq"] for o, p in zip(pair, params, strict=True))
    return (stored / exact).sqrt()


@pytest.mark.parametrize(("beta2", "steps"), [(0.95, 400), pytest.param(0.999, 3000, marks=pytest.mark.slow)])
def test_sqrt_v_follows_a_tenfold_drop_of_gradients(beta2: float, steps: int) -> None:
    """The control, nearest rounding, is in test_moments.py: 16 times too large at beta2 0.95."""
    ratio = stored_over_exact(beta2, steps)
    assert 0.9 < ratio.median() < 1.1
    assert ratio.quantile(0.05) > 1 / 1.75 and ratio.quantile(0.95) < 1.75


@pytest.mark.slow
def test_a_row_of_an_expert_that_is_never_routed_moves_by_exactly_nothing_in_10_000_steps() -> None:
    weights = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    before = weights.clone()
    flat = weights.view(-1)
    optimizer = AdamW([flat], lr=1e-2, weight_decay=0.0, moments="fp8")
    draw = torch.Generator().manual_seed(1)
    for _ in range(10_000):
        grad = torch.randn(6, 100, generator=draw)
        grad[2] = 0  # shares its blocks of 128 with busy rows
        flat.grad = grad.view(-1)
        optimizer.step()
    assert torch.equal(weights[2], before[2])
    assert (weights[[0, 1, 3, 4, 5]] != before[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("numel", [1, 127, 6682])
def test_state_after_a_step_is_never_larger_than_promised_and_never_fp32(numel: int) -> None:
    param = torch.ones(numel)
    optimizer = AdamW([param], moments="fp8")
    param.grad = torch.ones(numel)
    optimizer.step()
    state = dict(optimizer.state[param])
    step = state.pop("step")
    blocks = -(-numel // BLOCK)
    assert sum(t.untyped_storage().nbytes() for t in state.values()) <= 2 * BLOCK * blocks + 2 * blocks
    assert all(tensor.dtype == torch.uint8 for tensor in state.values()) and step.numel() == 1


def test_nearest_rounding_of_v_cannot_be_asked_for() -> None:
    """There is no such option: the only storage of FP8 rounds stochastically."""
    assert not [name for name in inspect.signature(AdamW.__init__).parameters if "round" in name]
    for name in ("fp8_nearest", "e4m3", "nearest"):
        with pytest.raises(ConfigError, match="expected fp32, bf16 or fp8"):
            moment_storage(name)


@pytest.mark.slow
def test_a_small_moe_trains_with_fp8_moments_and_not_with_linear_e4m3_to_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed of benchmarks/moment_loss.py with an eighth of its batch. Such pairs differ by half a per cent
    from chaos alone, so the gate of 0.25 % is for the script's mean over seeds; here the control fails."""
    from benchmarks import moment_loss
    from moe_runtime.config.schema import DataConfig
    from moe_runtime.data.prepare import ensure_prepared

    text = tmp_path / "text"
    text.mkdir()
    for file in sorted(Path(inspect.__file__).parent.glob("*.py"))[:60]:
        (text / file.name).write_bytes(file.read_bytes())
    data = tmp_path / "data"
    ensure_prepared(DataConfig(path=str(data), source=f"dir:{text}"), 0)
    loss = {}
    monkeypatch.setattr(moment_loss, "BATCH", 8)
    monkeypatch.setattr(moment_loss, "PEAK_LR", 1e-3)
    for storage in ("fp32", "fp8", "control"):
        losses = moment_loss.train(storage, 0.95, 0, 600, data)
        loss[storage] = sum(losses[-moment_loss.LAST :]) / moment_loss.LAST
    assert abs(loss["fp8"] / loss["fp32"] - 1) < 0.02
    assert loss["control"] / loss["fp32"] - 1 > 0.03


def update_slope(beta2: float, steps: int) -> float:
    """Regression of updates with FP8 moments on those with FP32 ones, same Gaussian gradients."""
    params = [torch.zeros(64 * BLOCK) for _ in range(2)]
    pair = [
        AdamW([param], lr=1e-3, betas=(0.9, beta2), weight_decay=0.0, moments=kind, step_path="eager")
        for param, kind in zip(params, ("fp8", "fp32"), strict=True)
    ]
    draw = torch.Generator().manual_seed(0)
    product = square = 0.0
    for step in range(steps):
        before = [param.clone() for param in params]
        grad = torch.randn(params[0].shape, generator=draw)
        for param, optimizer in zip(params, pair, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        if step >= steps // 4:
            stored, exact = ((param - start).double() for param, start in zip(params, before, strict=True))
            product += float(stored @ exact)
            square += float(exact @ exact)
    return product / square


def test_updates_are_of_the_right_size_on_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unbiased rounding of sqrt(v), the control, is not: an update divides by what is stored."""
    assert abs(update_slope(0.95, 160) - 1) < 0.002
    monkeypatch.setattr(moments, "lifted", lambda bits: bits)
    assert update_slope(0.95, 160) - 1 > 0.004
