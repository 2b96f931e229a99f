"""Every number of the report on FP8 moments, driven beyond its limit by a state made for it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_runtime.config.schema import NumericsConfig, NumericsLimits
from moe_runtime.errors import NumericsError
from moe_runtime.metrics.line import to_line
from moe_runtime.metrics.record import NUMERICS_KEYS
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.statistics import StepStatistics
from moe_runtime.train.loop import _check_numerics
from moe_runtime.train.optim_numerics import Report, check_report, is_due, reduce_statistics
from tests.ranks import run_ranks

NUMEL = 300


def report_of(
    grad: torch.Tensor, mean: float = 0.0, square: float = 1.0, beta2: float = 0.95, group_id: int = 0
) -> Report:
    """What one step from a state of equal moments counts."""
    param = torch.nn.Parameter(torch.zeros(grad.numel()))
    groups = [{"params": [param], "group_id": group_id}]
    optimizer = AdamW(groups, betas=(0.9, beta2), eps=1e-30, moments="fp8")
    optimizer.collect_statistics = True
    optimizer.state[param] = {
        "step": torch.tensor(1000.0),
        "exp_avg": torch.full((grad.numel(),), mean),
        "exp_avg_sq": torch.full((grad.numel(),), square),
    }
    param.grad = grad
    optimizer.step()
    return reduce_statistics(optimizer.take_statistics(), None, 1)


def spread(small: float) -> torch.Tensor:
    """One large gradient in each block of 128, the rest small."""
    grad = torch.full((NUMEL,), small)
    grad[::128] = 1e6
    return grad


def with_nan() -> torch.Tensor:
    grad = torch.ones(NUMEL)
    grad[7] = torch.nan
    return grad


STATES: dict[str, dict[str, Any]] = {
    "zeros": {"grad": torch.zeros(NUMEL), "square": 0.0},
    "underflows": {"grad": spread(1e-6), "square": 0.0},
    "saturated": {"grad": torch.zeros(NUMEL), "mean": 27.9, "square": 0.9, "beta2": 0.8},
    "stalled": {"grad": torch.zeros(NUMEL), "beta2": 0.999999},
    "nonfinite": {"grad": with_nan()},
    "largest_update": {"grad": torch.zeros(NUMEL), "mean": 20.0},
}
LIMITS = {
    "zeros": 0.9,
    "underflows": 0.1,
    "saturated": 0.1,
    "stalled": 0.99,
    "nonfinite": 0.0,
    "largest_update": 8.0,
}


@pytest.mark.parametrize("key", STATES)
def test_each_limit_stops_and_warns_on_a_state_made_for_it_and_on_no_sound_one(key: str) -> None:
    limits = NumericsLimits(**{key: LIMITS[key]})  # type: ignore[arg-type]
    sick = report_of(**STATES[key])
    stop = NumericsConfig(warn=NumericsLimits(), stop=limits)
    with pytest.raises(NumericsError, match=rf"optim.numerics.stop.{key}: group dense: expected at most"):
        check_report(sick, stop)
    (warning,) = check_report(sick, NumericsConfig(warn=limits, stop=NumericsLimits()))
    assert f"optim.numerics.warn.{key}" in warning and "; " in warning  # with a remedy
    sound = report_of(torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)))
    assert check_report(sound, stop) == []
    assert check_report(sound, NumericsConfig(warn=limits, stop=NumericsLimits())) == []


def test_a_sound_step_passes_the_defaults_and_a_nan_does_not() -> None:
    sound = report_of(torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)))
    assert check_report(sound, NumericsConfig()) == []
    with pytest.raises(NumericsError, match="nonfinite"):
        check_report(report_of(with_nan()), NumericsConfig())


def test_an_update_that_is_no_number_is_beyond_any_limit() -> None:
    report = {"dense": {**report_of(torch.ones(NUMEL))["dense"], "largest_update": math.nan}}
    limits = NumericsLimits(largest_update=1e9)
    with pytest.raises(NumericsError, match="largest_update"):
        check_report(report, NumericsConfig(stop=limits))


@pytest.mark.parametrize(
    ("every", "moments", "due"), [(1, "fp8", [0, 1, 2]), (3, "fp8", [2]), (0, "fp8", []), (1, "bf16", [])]
)
def test_steps_are_counted_as_often_as_the_config_says(every: int, moments: str, due: list[int]) -> None:
    config = NumericsConfig(every=every)
    assert [step for step in range(3) if is_due(config, moments, step)] == due


def test_the_report_has_its_place_in_the_record() -> None:
    report = report_of(torch.ones(NUMEL), group_id=3)
    assert list(report) == ["experts_no_decay"] and set(report["experts_no_decay"]) == set(NUMERICS_KEYS)
    line = to_line({"step": 1, "tokens": 1, "loss": 1.0, "optim_numerics": report})
    assert line["optim_numerics"] == report
    assert "optim_numerics" not in to_line({"step": 1, "tokens": 1, "loss": 1.0})


class Recorder:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.said: list[str] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def say(self, text: str) -> None:
        self.said.append(text)


def run_with(config: NumericsConfig) -> Any:
    return SimpleNamespace(
        recorder=Recorder(), config=SimpleNamespace(optim=SimpleNamespace(numerics=config))
    )


def test_the_loop_tells_of_a_warning_and_ends_a_run_beyond_a_stop() -> None:
    sick = report_of(**STATES["underflows"])
    limits = NumericsLimits(underflows=0.1)
    warned = run_with(NumericsConfig(warn=limits))
    _check_numerics(warned, 7, sick)
    assert warned.recorder.events[0]["kind"] == "optim_numerics" and not warned.recorder.events[0]["stops"]
    assert warned.recorder.said[0].startswith("step 7: warning: optim.numerics.warn.underflows")
    stopped = run_with(NumericsConfig(stop=limits))
    with pytest.raises(NumericsError, match="set optim"):
        _check_numerics(stopped, 7, sick)
    assert stopped.recorder.events[0]["stops"]
    _check_numerics(stopped, 8, None)


def on_two_ranks(rank: int, world_size: int) -> Report:
    held: list[dict[int, StepStatistics]] = [
        {0: StepStatistics(10, 1, 0, 0, 4, 0, -20, 3, 1.5), 2: StepStatistics(4, 4)},
        {0: StepStatistics(30, 2, 1, 0, 0, 0, -18, 5, math.nan)},
    ]
    own = held[rank]
    return reduce_statistics(own, dist.group.WORLD, world_size)


def test_ranks_add_up_what_each_of_them_holds() -> None:
    first, second = run_ranks(on_two_ranks, 2)
    assert str(first) == str(second)
    dense, experts = first["dense"], first["experts"]
    assert (dense["zeros"], dense["underflows"], dense["stalled"]) == (3 / 40, 1 / 40, 4 / 40)
    assert (dense["min_scale"], dense["max_scale"]) == (-20, 5)
    assert math.isnan(dense["largest_update"])  # type: ignore[arg-type]
    assert experts["zeros"] == 1.0 and experts["min_scale"] is None and experts["largest_update"] == 0.0
    assert len(first) == 2
