"""State in and out: bitwise in native form, exact in logical form, and mended where DeepSpeed meddles."""

import copy

import pytest
import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.optim.adamw import AdamW
from tests.unit.optim.test_adamw import KINDS, parameter, train

SIZES = [1, 127, 129, 6682]


def trained(kind: str, numel: int, steps: int = 5, **settings: object) -> tuple[AdamW, torch.nn.Parameter]:
    param = parameter(numel)
    optimizer = AdamW([param], moments=kind, **settings)  # type: ignore[arg-type]
    train(optimizer, param, range(steps))
    return optimizer, param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", SIZES)
def test_native_state_resumes_bit_for_bit(kind: str, numel: int) -> None:
    optimizer, param = trained(kind, numel)
    resumed = torch.nn.Parameter(param.detach().clone())
    other = AdamW([resumed], moments=kind)
    other.load_native_state(resumed, {k: v.clone() for k, v in optimizer.native_state(param).items()})
    train(optimizer, param, range(5, 9))
    train(other, resumed, range(5, 9))
    assert torch.equal(param, resumed)
    mine, theirs = optimizer.native_state(param), other.native_state(resumed)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_logical_and_resumes_bit_for_bit(kind: str) -> None:
    optimizer, param = trained(kind, 6682)
    exported = copy.deepcopy(optimizer.state_dict())
    entry = exported["state"][0]
    assert set(entry) == {"step", "exp_avg", "exp_avg_sq"} and float(entry["step"]) == 5
    assert all(entry[name].shape == param.shape for name in ("exp_avg", "exp_avg_sq"))
    assert all(entry[name].dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq"))
    resumed = torch.nn.Parameter(param.detach().clone())
    other = AdamW([resumed], moments=kind)
    other.load_state_dict(exported)
    mine, theirs = optimizer.native_state(param), other.native_state(resumed)
    assert {key: (t.dtype, t.shape) for key, t in mine.items()} == {
        key: (t.dtype, t.shape) for key, t in theirs.items()
    }
    train(optimizer, param, range(5, 9))
    train(other, resumed, range(5, 9))
    assert torch.equal(param, resumed)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_fp32_tensors_put_into_the_state_are_stored_anew_at_the_next_step(kind: str) -> None:
    """What DeepSpeed's universal checkpoints do: zeros_like and copy, past load_state_dict."""
    optimizer, param = trained(kind, 300)
    logical = copy.deepcopy(optimizer.state_dict()["state"][0])
    resumed = torch.nn.Parameter(param.detach().clone())
    other = AdamW([resumed], moments=kind)
    other.state[resumed] = dict(logical)
    train(optimizer, param, range(5, 6))
    train(other, resumed, range(5, 6))
    assert torch.equal(param, resumed)
    mine, theirs = optimizer.native_state(param), other.native_state(resumed)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    # DeepSpeed may still look at them: they must not answer with what is no longer true.
    assert logical["exp_avg"].isnan().all() and logical["exp_avg_sq"].isnan().all()


def test_a_step_tensor_shared_by_two_parameters_is_counted_once_for_each() -> None:
    params = [parameter(8), parameter(8)]
    optimizer = AdamW([{"params": [p]} for p in params])
    shared = torch.tensor(4.0)
    for param in params:
        optimizer.state[param] = {
            "step": shared, "exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8)
        }  # fmt: skip
        train(optimizer, param, range(1))
        param.grad = None
    assert [float(optimizer.state[p]["step"]) for p in params] == [5.0, 5.0]


def test_an_empty_state_left_behind_is_no_state() -> None:
    param = parameter(8)
    optimizer = AdamW([param], moments="fp8")
    optimizer.state[param] = {}
    assert optimizer.native_state(param) == {} and optimizer.state_dict()["state"] == {0: {}}
    train(optimizer, param, range(1))
    assert float(optimizer.state[param]["step"]) == 1


def test_loading_nothing_forgets_the_state() -> None:
    optimizer, param = trained("fp8", 40)
    optimizer.load_native_state(param, {})
    assert optimizer.native_state(param) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_torch_adamw_is_taken(kind: str) -> None:
    theirs = parameter(500)
    other = torch.optim.AdamW([theirs], lr=1e-2)
    train(other, theirs, range(3))
    param = torch.nn.Parameter(theirs.detach().clone())
    optimizer = AdamW([{"params": [param], "offset": 64, "group_id": 3}], moments=kind, seed=9)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["moments"], group["offset"], group["group_id"]) == (1e-2, kind, 64, 3)
    train(optimizer, param, range(3, 4))
    train(other, theirs, range(3, 4))
    assert float(optimizer.state[param]["step"]) == 4
    # Steps are of 1e-2; what is stored in eight bits is off by up to an eighth.
    assert (param - theirs).abs().max() < {"fp32": 1e-6, "bf16": 2e-4, "fp8": 3e-3}[kind]


@pytest.mark.parametrize(("saved", "wanted"), [("fp8", "bf16"), ("fp32", "fp8"), ("bf16", "fp32")])
def test_native_state_of_another_storage_is_refused(saved: str, wanted: str) -> None:
    optimizer, param = trained(saved, 300)
    other = AdamW([param], moments=wanted)
    with pytest.raises(CheckpointError, match=rf"expected {wanted} moments of 300 elements"):
        other.load_native_state(param, optimizer.native_state(param))


def test_native_state_of_another_length_is_refused() -> None:
    optimizer, param = trained("fp8", 300)
    shorter = parameter(256)
    with pytest.raises(CheckpointError, match="expected fp8 moments of 256 elements"):
        AdamW([shorter], moments="fp8").load_native_state(shorter, optimizer.native_state(param))


def test_fp8_codes_under_a_group_that_wants_another_storage_are_refused() -> None:
    optimizer, param = trained("fp8", 300)
    optimizer.param_groups[0]["moments"] = "bf16"
    with pytest.raises(CheckpointError, match=r"was optim\.moments changed"):
        train(optimizer, param, range(1))


def test_codes_never_lie_under_the_names_of_values() -> None:
    """DeepSpeed's stage 3 hands out whatever it finds there."""
    optimizer, param = trained("fp8", 300)
    state = optimizer.state[param]
    assert not {"exp_avg", "exp_avg_sq"} & set(state)
    logical = optimizer.logical_state(param)
    assert all(logical[name].shape == param.shape for name in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(logical["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_optimizer_goes_on_alike(kind: str) -> None:
    optimizer, param = trained(kind, 300)
    other = copy.deepcopy(optimizer)
    (twin,) = other.param_groups[0]["params"]
    train(optimizer, param, range(5, 7))
    train(other, twin, range(5, 7))
    assert torch.equal(param, twin) and twin is not param


def two_groups(weight_decay: tuple[float, float] = (0.1, 0.0)) -> tuple[AdamW, list[torch.nn.Parameter]]:
    params = [parameter(300, seed=1), parameter(200, seed=2)]
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(params, weight_decay, strict=True)]
    return AdamW(groups, moments="fp8", lr=0.01), params


def write_as_stage_3_does(optimizer: AdamW, saved: dict, params: list[torch.nn.Parameter]) -> None:
    """DeepSpeed's universal load at stage 3: one step tensor for all, the first group's keys for all."""
    shared = saved["state"][0]["step"]
    for i, param in enumerate(params):
        optimizer.state[param]["step"] = shared
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key] = saved["state"][i][key].clone()
    for group in optimizer.param_groups:
        group.update({key: value for key, value in saved["param_groups"][0].items() if key != "params"})


def test_what_a_checkpoint_may_not_change_does_not_leave() -> None:
    optimizer, params = two_groups()
    train(optimizer, params[0], range(2))
    for group in optimizer.state_dict()["param_groups"]:
        assert not {"moments", "offset", "group_id", "made_with"} & set(group)
    other = AdamW([{"params": [p]} for p in params], moments="bf16")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["moments"] for group in other.param_groups] == ["bf16", "bf16"]


def test_stage_3_may_not_give_all_groups_the_first_ones_weight_decay() -> None:
    optimizer, params = two_groups()
    for param in params:
        train(optimizer, param, range(3))
        param.grad = None
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.005  # as a schedule has left it
    other, fresh = two_groups()
    write_as_stage_3_does(other, saved, fresh)
    with pytest.raises(CheckpointError, match=r"the weight_decay of the first, 0\.1, expected"):
        train(other, fresh[0], range(3, 4))
    other.restore_hyperparameters()
    assert all(group["steps_of_groups"] == {0: [3.0], 1: [3.0]} for group in other.param_groups)
    assert [(g["weight_decay"], g["lr"]) for g in other.param_groups] == [(0.1, 0.005), (0.0, 0.005)]
    train(other, fresh[0], range(3, 4))


def test_groups_that_a_schedule_makes_alike_later_are_not_complained_of() -> None:
    """Groups of BF16_Optimizer come back with their own values, all in sight; rates may then end at zero."""
    optimizer, params = two_groups()
    for param in params:
        train(optimizer, param, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for group, loaded in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in loaded.items() if key != "params"})
    train(optimizer, params[0], range(3, 4))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    train(optimizer, params[0], range(4, 5))


def test_groups_made_alike_come_back_alike_without_complaint() -> None:
    optimizer, params = two_groups((0.1, 0.1))
    for param in params:
        train(optimizer, param, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other, fresh = two_groups((0.1, 0.1))
    write_as_stage_3_does(other, saved, fresh)
    train(other, fresh[0], range(3, 4))


def test_every_group_gets_its_own_step_back_from_a_checkpoint_with_one_step_for_all() -> None:
    optimizer, params = two_groups((0.1, 0.1))
    train(optimizer, params[0], range(5))
    params[0].grad = None
    train(optimizer, params[1], range(3))
    params[1].grad = None
    saved = copy.deepcopy(optimizer.state_dict())
    other, fresh = two_groups((0.1, 0.1))
    write_as_stage_3_does(other, saved, fresh)
    for old, new in zip(params, fresh, strict=True):
        new.data.copy_(old.data)
    for opt, own in ((optimizer, params), (other, fresh)):
        for param in own:
            train(opt, param, range(7, 8))
            param.grad = None
    assert [float(other.state[p]["step"]) for p in fresh] == [6.0, 4.0]
    assert all(torch.equal(a, b) for a, b in zip(params, fresh, strict=True))


def test_partitions_of_one_group_at_different_steps_cannot_come_back_universally() -> None:
    params = [parameter(300), parameter(200)]
    optimizer = AdamW(params, moments="fp8")
    train(optimizer, params[0], range(5))
    params[0].grad = None
    train(optimizer, params[1], range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdamW([parameter(300), parameter(200)], moments="fp8")
    write_as_stage_3_does(other, saved, other.param_groups[0]["params"])
    with pytest.raises(CheckpointError, match=r"had done \[3\.0, 5\.0\] steps"):
        train(other, other.param_groups[0]["params"][0], range(1))


@pytest.mark.parametrize("kind", KINDS)
def test_fp64_parameters_are_tolerated(kind: str) -> None:
    param = parameter(300, dtype=torch.float64)
    optimizer = AdamW([param], moments=kind)
    train(optimizer, param, range(3))
    entry = optimizer.state_dict()["state"][0]
    assert param.dtype == entry["exp_avg"].dtype == torch.float64
    resumed = torch.nn.Parameter(param.detach().clone())
    other = AdamW([resumed], moments=kind)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, param, range(3, 4))
    train(other, resumed, range(3, 4))
    assert torch.equal(param, resumed)
