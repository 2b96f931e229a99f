"""The fused FP8 step on a GPU against the time of its bytes.

First the step has to give the bits of the plain form on the CPU: weights, codes, scales, working copy and
counts, for ragged lengths, both types of gradient and an offset at which the noise carries. Outputs are
poisoned beforehand. Only then is it timed, in turn with a copy and with torch's fused AdamW on FP32
moments, on random gradients and on state that random gradients made; medians count. The bound is the
bytes a step cannot avoid over the bandwidth of the copy in the same run.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_runtime.optim.counter_rng import derive_key
from moe_runtime.optim.eager_step import eager_step, torch_step
from moe_runtime.optim.moments import Bf16Moments, Fp8Moments, FullMoments, MomentStorage, Noise, State
from moe_runtime.optim.statistics import blank_counters, read_counters
from moe_runtime.optim.update import Factors, factors_of

COPY_BYTES = 1 << 31
WARM_UP_ROUNDS = 4
GROUP = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STATE_BYTES = 2 + 2 + 2 / 128  # codes of m and sqrt(v) and the scales, each read and written
SWEEP = [(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8) if 1 <= rows / warps <= 8]


@dataclass(frozen=True)
class Case:
    """Tensors of one step: weights, gradient in two types, FP8 state, working copy."""

    value: Tensor
    grad: Tensor
    grad_bf16: Tensor
    state: State
    working: Tensor


def make_case(count: int, device: torch.device, seed: int = 0) -> Case:
    """Random weights, gradients of lognormal spread, state as one step leaves it."""
    generator = torch.Generator(device).manual_seed(seed)
    value = torch.randn(count, generator=generator, device=device)
    grad = torch.randn(count, generator=generator, device=device)
    spread = torch.randn(count, generator=generator, device=device)
    grad.mul_(spread.exp_()).mul_(1e-3)
    del spread
    storage = Fp8Moments()
    working = torch.full((count,), torch.nan, dtype=torch.bfloat16, device=device)
    return Case(value, grad, grad.bfloat16(), storage.blank(value), working)


def noise_of(step: int, offset: int = 0) -> Noise:
    """Noise of a step of this benchmark."""
    return Noise(derive_key(0, step, 0), offset)


def wrong_bits(device: torch.device, most: int = 1 << 20) -> list[str]:
    """Cases of up to `most` elements in which a fused step differs from the plain one on the CPU."""
    from moe_runtime.optim.bf16_step_triton import bf16_step
    from moe_runtime.optim.fused_step_triton import fused_step

    forms: list[tuple[MomentStorage, Callable[..., None]]] = [
        (Fp8Moments(), fused_step),
        (Bf16Moments(), bf16_step),
    ]
    carry = 1 << 32
    layouts = [(1, 0), (127, 5), (6682, 64), (1 << 20, 0), (300_001, carry - 100_000), (3001, carry - 1000)]
    return [
        f"{name} of {count} ({storage.kind}, {'bf16' if half else 'fp32'} gradient)"
        for count, offset in layouts
        if count <= most
        for half in (False, True)
        for storage, form in forms
        for name in _differing(form, storage, count, offset, half, device)
    ]


def _differing(
    form: Callable[..., None],
    storage: MomentStorage,
    count: int,
    offset: int,
    half: bool,
    device: torch.device,
) -> list[str]:
    """Names of what three steps leave with other bits."""
    cpu = torch.device("cpu")
    case = make_case(count, cpu)
    grad = case.grad_bf16 if half else case.grad
    value, working = case.value.to(device, copy=True), case.working.to(device, copy=True)
    expected, state = storage.blank(case.value), storage.blank(value)
    counts = blank_counters(cpu), blank_counters(device)
    for step in (1, 2, 3):
        factors, noise = factors_of(GROUP, step), noise_of(step, offset)
        counters = counts[0] if storage.kind == "fp8" else None
        eager_step(case.value, grad, storage, expected, factors, noise, counters)
        form(value, grad.to(device), state, factors, noise, working, counts[1])
    pairs = {"weight": (case.value, value), "working copy": (case.value.bfloat16(), working)}
    pairs |= {name: (expected[name], state[name]) for name in expected}
    found = [name for name, (want, got) in pairs.items() if not torch.equal(want, got.cpu())]
    joined = [read_counters(counters, count, 1.0) for counters in counts]
    return found if joined[0] == joined[1] else [*found, "counts"]


def contenders(case: Case, factors: Factors) -> dict[str, tuple[Callable[[], object], float]]:
    """By name: what to time, and the bytes it cannot avoid."""
    from moe_runtime.optim.bf16_step_triton import bf16_step
    from moe_runtime.optim.fused_step_triton import fused_step

    count, device = case.value.numel(), case.value.device
    full, bf16_state = FullMoments().blank(case.value), Bf16Moments().blank(case.value)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    counters = blank_counters(device)
    plain = (case.value, case.grad, case.state, factors, noise_of(2))
    half = (case.value, case.grad_bf16, case.state, factors, noise_of(2))
    return {
        "copy": (lambda: target.copy_(source), 2.0 * COPY_BYTES),
        "fp8": (lambda: fused_step(*plain), count * (12 + STATE_BYTES)),
        "fp8, working copy": (lambda: fused_step(*plain, case.working), count * (14 + STATE_BYTES)),
        "fp8, bf16 gradient, working copy": (
            lambda: fused_step(*half, case.working),
            count * (12 + STATE_BYTES),
        ),
        "fp8, working copy, counted": (
            lambda: fused_step(*plain, case.working, counters),
            count * (14 + STATE_BYTES),
        ),
        "bf16, working copy": (
            lambda: bf16_step(case.value, case.grad, bf16_state, factors, noise_of(2), case.working),
            22.0 * count,
        ),
        "torch fused, fp32 moments": (
            lambda: torch_step(case.value, case.grad, full, GROUP, 2),
            28.0 * count,
        ),
    }


def time_in_turn(
    tasks: dict[str, Callable[[], object]], cover: Callable[[], object], rounds: int
) -> dict[str, float]:
    """Median seconds of each task, tasks taking turns; a copy covers the host's time to launch."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, task in tasks.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cover()
            begin.record()
            task()
            end.record()
            end.synchronize()
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure_size(count: int, rounds: int, sweep: bool) -> dict[str, Any]:
    """Every contender at one length; with `sweep`, our kernel in other shapes too."""
    from moe_runtime.optim.fused_step_triton import fused_step

    case = make_case(count, torch.device("cuda"))
    factors = factors_of(GROUP, 2)
    fused_step(case.value, case.grad, case.state, factors_of(GROUP, 1), noise_of(1))
    tasks = contenders(case, factors)
    cover = tasks["copy"][0]
    seconds = time_in_turn({name: run for name, (run, _) in tasks.items()}, cover, rounds)
    bandwidth = tasks["copy"][1] / seconds["copy"]
    result: dict[str, Any] = {"elements": count, "copy_gb_per_s": bandwidth / 1e9}
    result["rows"] = [
        {
            "name": name,
            "ms": seconds[name] * 1e3,
            "bytes_an_element": moved / count,
            "gb_per_s": moved / seconds[name] / 1e9,
            "of_bound": moved / bandwidth / seconds[name],
        }
        for name, (_, moved) in tasks.items()
        if name != "copy"
    ]
    if sweep:
        arguments = (case.value, case.grad, case.state, factors, noise_of(2), case.working, None)
        shapes: dict[str, Callable[[], object]] = {
            f"{rows} rows, {warps} warps": partial(fused_step, *arguments, rows, warps)
            for rows, warps in SWEEP
        }
        moved = tasks["fp8, working copy"][1]
        timed = time_in_turn(shapes, cover, max(rounds // 2, 3))
        result["sweep"] = {name: moved / bandwidth / time for name, time in timed.items()}
    return result


def measure(sizes: list[int], rounds: int, sweep: bool) -> dict[str, Any]:
    """Check, then time.

    Returns:
        device, torch, `differing` (empty if the bits are right) and, if they are, one result for each size.
    """
    differing = wrong_bits(torch.device("cuda"))
    sweeps = [sweep and index == 0 for index in range(len(sizes))]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "differing": differing,
        "results": []
        if differing
        else [measure_size(n, rounds, wide) for n, wide in zip(sizes, sweeps, strict=True)],
    }


def describe(result: dict[str, Any]) -> str:
    """The measurement as a table."""
    lines = [f"AdamW step, {result['device']}, torch {result['torch']}"]
    if result["differing"]:
        lines += ["bits differ from the plain form:", *result["differing"]]
    for size in result["results"]:
        lines.append(f"\n{size['elements']:,} elements, copy {size['copy_gb_per_s']:.0f} GB/s")
        lines.append(f"{'':34}{'ms':>9}{'B/element':>11}{'GB/s':>8}{'of bound':>10}")
        lines += [
            f"{row['name']:34}{row['ms']:9.3f}{row['bytes_an_element']:11.2f}{row['gb_per_s']:8.0f}"
            f"{row['of_bound']:10.1%}"
            for row in size["rows"]
        ]
        lines += [f"    {name:30}{share:8.1%}" for name, share in size.get("sweep", {}).items()]
    return "\n".join(lines)
