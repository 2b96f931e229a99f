"""The steps: equal to torch in FP32, sound in BF16 and FP8, and fit for what DeepSpeed does to a client."""

import pytest
import torch

from moe_runtime.errors import ConfigError
from moe_runtime.optim import eager_step
from moe_runtime.optim.adamw import AdamW

KINDS = ["fp32", "bf16", "fp8"]


def parameter(numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype))


def gradient(param: torch.Tensor, step: int, spread: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    scales = torch.exp(spread * torch.randn(param.shape, generator=torch.Generator().manual_seed(7)))
    return (torch.randn(param.shape, generator=generator) * scales * 1e-3).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, param: torch.Tensor, steps: range, spread: float = 0.0) -> None:
    for step in steps:
        param.grad = gradient(param, step, spread)
        optimizer.step()


@pytest.mark.parametrize("numel", [1, 127, 129, 6682, 131072 + 77])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.float64, 1e-15)])
def test_fp32_moments_equal_torch_adamw_to_rounding(numel: int, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = parameter(numel, dtype=dtype), parameter(numel, dtype=dtype)
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = AdamW([ours], **settings)
    other = torch.optim.AdamW([theirs], **settings, foreach=False, fused=False)
    train(mine, ours, range(5))
    train(other, theirs, range(5))
    # Relative to the size of the step and the parameter together: 1e-7 is one rounding of FP32.
    assert ((ours - theirs).abs() <= tolerance * (theirs.abs() + 3e-3)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_and_decay_are_read_from_the_group_each_step(kind: str) -> None:
    param = torch.nn.Parameter(torch.ones(200))
    optimizer = AdamW([param], lr=1.0, weight_decay=0.5, moments=kind)
    optimizer.param_groups[0]["lr"] = 0.1
    param.grad = torch.zeros(200)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((200,), 0.95))


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_that_never_had_a_gradient_never_moves(kind: str) -> None:
    param = parameter(6682)
    before = param.detach().clone()
    optimizer = AdamW([param], lr=1e-2, weight_decay=0.0, moments=kind)
    idle = torch.zeros(6682, dtype=torch.bool)
    idle[128:640] = True  # whole blocks, an expert without tokens
    idle[1000:1050] = True  # part of a busy block, an unused embedding row
    for step in range(60):
        param.grad = gradient(param, step).masked_fill(idle, 0.0)
        optimizer.step()
    assert torch.equal(param[idle], before[idle])
    assert (param[~idle] != before[~idle]).all()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.95, 0.98)])
def test_an_element_that_falls_idle_coasts_no_farther_in_fp8_than_in_fp32(
    betas: tuple[float, float],
) -> None:
    """With nearest rounding of m it moves on and on: 36 times too far at betas (0.95, 0.98)."""
    moved = {}
    for kind in ("fp32", "fp8"):
        param = torch.nn.Parameter(torch.zeros(16 * 128))
        optimizer = AdamW([param], lr=1.0, betas=betas, weight_decay=0.0, moments=kind)
        train(optimizer, param, range(50))
        start = param.detach().clone()
        for step in range(50, 450):
            param.grad = gradient(param, step)
            param.grad.view(-1, 128)[:, 8:] = 0
            optimizer.step()
        moved[kind] = float((param.detach() - start).view(-1, 128)[:, 8:].abs().mean())
    assert 0.9 < moved["fp8"] / moved["fp32"] < 1.1


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_fp8_updates_are_close_to_exact_ones_and_never_blow_up(
    betas: tuple[float, float], spread: float
) -> None:
    exact, ours = torch.nn.Parameter(torch.zeros(4096)), torch.nn.Parameter(torch.zeros(4096))
    settings = {"lr": 1.0, "betas": betas, "eps": 1e-30, "weight_decay": 0.0}
    reference, optimizer = AdamW([exact], **settings), AdamW([ours], **settings, moments="fp8")
    largest, errors = {"exact": 0.0, "ours": 0.0}, []
    for step in range(100):
        before = exact.detach().clone(), ours.detach().clone()
        train(reference, exact, range(step, step + 1), spread)
        train(optimizer, ours, range(step, step + 1), spread)
        wanted, got = exact.detach() - before[0], ours.detach() - before[1]
        largest["exact"] = max(largest["exact"], float(wanted.abs().max()))
        largest["ours"] = max(largest["ours"], float(got.abs().max()))
        errors.append(float((got - wanted).square().mean().sqrt()))
    assert largest["ours"] < 1.25 * largest["exact"]
    assert errors[-1] < 0.045  # of a learning rate; the update itself is 0.23


def test_fp8_root_of_v_follows_a_tenfold_drop_of_gradients() -> None:
    exact, ours = parameter(32 * 128), parameter(32 * 128)
    reference, optimizer = AdamW([exact]), AdamW([ours], moments="fp8")
    for step in range(600):
        for opt, param in ((reference, exact), (optimizer, ours)):
            param.grad = gradient(param, step) * (1.0 if step < 200 else 0.1)
            opt.step()
    roots = [opt.state_dict()["state"][0]["exp_avg_sq"].sqrt() for opt in (optimizer, reference)]
    ratio = roots[0] / roots[1]
    assert 0.97 < ratio.median() < 1.03
    assert ratio.quantile(0.05) > 0.75 and ratio.quantile(0.95) < 1.3


@pytest.mark.parametrize("kind", KINDS)
def test_windows_do_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for window in (eager_step.WINDOW_CPU, 256):
        monkeypatch.setattr(eager_step, "WINDOW_CPU", window)
        param = parameter(1930)
        train(AdamW([param], moments=kind, step_path="eager"), param, range(3))
        results.append(param.detach())
    torch.testing.assert_close(results[0], results[1], rtol=3e-7, atol=0)


def test_partitions_with_offsets_step_like_the_whole_tensor_in_fp8() -> None:
    whole = parameter(1024)
    halves = [torch.nn.Parameter(whole.detach()[i : i + 512].clone()) for i in (0, 512)]
    optimizer = AdamW([whole], moments="fp8")
    owners = [AdamW([{"params": [half], "offset": 512 * i}], moments="fp8") for i, half in enumerate(halves)]
    for step in range(5):
        whole.grad = gradient(whole, step)
        optimizer.step()
        for i, (half, owner) in enumerate(zip(halves, owners, strict=True)):
            half.grad = whole.grad[512 * i : 512 * i + 512].clone()
            owner.step()
    assert torch.equal(torch.cat([half.detach() for half in halves]), whole.detach())


def test_one_call_per_group_with_rebound_groups_equals_one_call() -> None:
    results = []
    for rebind in (False, True):
        params = [parameter(300, seed=1), parameter(200, seed=2)]
        optimizer = AdamW(
            [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(params)], moments="fp8"
        )
        groups = optimizer.param_groups
        for step in range(4):
            for param in params:
                param.grad = gradient(param, step)
            for part in [[group] for group in groups] if rebind else [groups]:
                optimizer.param_groups = part
                optimizer.step()
            optimizer.param_groups = groups
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(results[0], results[1])


def test_seed_and_group_change_the_noise_and_nothing_else_is_random() -> None:
    def result(**group: int) -> torch.Tensor:
        param = parameter(500)
        train(AdamW([{"params": [param], **group}], moments="fp8"), param, range(3))
        return param.detach()

    assert torch.equal(result(seed=3), result(seed=3))
    assert not torch.equal(result(seed=3), result(seed=4))
    assert not torch.equal(result(group_id=0), result(group_id=1))


def test_parameters_of_any_shape_and_none_at_all_are_stepped() -> None:
    param, empty, resting = torch.nn.Parameter(torch.ones(3, 5, 7)), parameter(0), parameter(4)
    optimizer = AdamW([param, empty, resting], moments="fp8")
    param.grad, empty.grad = torch.ones(3, 5, 7), torch.zeros(0)
    optimizer.step()
    assert (param < 1).all() and not optimizer.state.get(resting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "expected lr, eps and weight_decay of at least 0"),
        ({"betas": (0.9, 1.0)}, "two numbers in"),
        ({"moments": "fp16"}, "expected fp32, bf16 or fp8"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW([parameter(4)], **settings)


def test_working_copies_in_bf16_are_refused() -> None:
    optimizer = AdamW([parameter(4, dtype=torch.bfloat16)])
    with pytest.raises(ConfigError, match="master weights, got torch"):
        train(optimizer, optimizer.param_groups[0]["params"][0], range(1))
