"""The average of the weights: its closed form, its thread, and where it begins."""

import threading

import pytest
import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.optim.ema import HostEma


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 13), "b": (1,), "none": (0, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def walk(ema: HostEma, live: dict[str, torch.Tensor], steps: range) -> list[dict[str, torch.Tensor]]:
    """Change the weights in place, as steps do; gives their history."""
    history = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ema.join()
        for tensor in live.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
        history.append({name: tensor.clone() for name, tensor in live.items()})
        ema.start()
    return history


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.9, 0.5, 0.0])
def test_the_average_is_the_closed_form_over_all_steps(decay: float, dtype: torch.dtype) -> None:
    live = weights(dtype)
    first = {name: tensor.double() for name, tensor in live.items()}
    ema = HostEma(live, decay)
    history = walk(ema, live, range(20))
    for name, average in ema.tensors().items():
        wanted = decay**20 * first[name]
        for age, was in enumerate(reversed(history)):
            wanted = wanted + (1 - decay) * decay**age * was[name].double()
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), wanted, rtol=1e-5, atol=1e-6)


def test_without_decay_it_is_the_weights_to_the_bit() -> None:
    live = weights()
    ema = HostEma(live, 0.0)
    walk(ema, live, range(3))
    assert all(torch.equal(average, live[name]) for name, average in ema.tensors().items())


def test_a_restored_average_goes_on_to_the_same_bits() -> None:
    live = weights()
    ema = HostEma(live, 0.9)
    walk(ema, live, range(3))
    saved = {name: average.clone() for name, average in ema.tensors().items()}
    again_live = {name: tensor.clone() for name, tensor in live.items()}
    again = HostEma(again_live, 0.9)
    again.restore(saved)
    walk(ema, live, range(3, 6))
    walk(again, again_live, range(3, 6))
    assert all(torch.equal(average, again.tensors()[name]) for name, average in ema.tensors().items())


def test_the_work_is_done_by_another_thread_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = HostEma(weights(), 0.9)
    may_go, seen = threading.Event(), []
    update = ema._update

    def slow(arrived: torch.cuda.Event | None) -> None:
        assert may_go.wait(10)
        seen.append(threading.get_ident())
        update(arrived)

    monkeypatch.setattr(ema, "_update", slow)
    ema.start()  # returns at once, or this test would wait for ever
    assert not seen
    may_go.set()
    ema.join()
    assert seen and seen[0] != threading.get_ident()


def test_what_the_thread_could_not_do_is_raised_where_it_is_joined() -> None:
    live = weights()
    ema = HostEma(live, 0.9)
    ema._average["a"] = torch.zeros(2)
    ema.start()
    with pytest.raises(RuntimeError):
        ema.join()


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_an_average_of_other_weights_is_refused_whole(change: str) -> None:
    ema = HostEma(weights(), 0.9)
    saved = {name: torch.zeros_like(average) for name, average in ema.tensors().items()}
    saved["b"] = torch.zeros(2)
    if change == "missing":
        del saved["b"]
    with pytest.raises(CheckpointError, match="average of b: expected \\[1\\], got"):
        ema.restore(saved)
    assert ema.tensors()["a"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_on_a_gpu_are_averaged_on_the_host_as_those_on_a_cpu_are() -> None:
    live = weights(torch.bfloat16)
    on_gpu = {name: tensor.cuda() for name, tensor in live.items()}
    ours, theirs = HostEma(on_gpu, 0.9), HostEma(live, 0.9)
    for step in range(5):
        ours.join(), theirs.join()
        for name, tensor in live.items():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step)).bfloat16())
            on_gpu[name].copy_(tensor)
        ours.start(), theirs.start()
    for name, average in ours.tensors().items():
        assert average.device.type == "cpu" and torch.equal(average, theirs.tensors()[name])
