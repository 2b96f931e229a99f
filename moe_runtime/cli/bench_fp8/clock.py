"""Time of calls on a GPU or a CPU: medians, in turn, with the device kept busy while calls are launched."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_WARM_UP = 3
_CYCLES_PER_SECOND = 2e9  # at most; a longer cover does no harm
_MOST_COVER_SECONDS = 0.05

Call = Callable[[], Any]


def device_seconds(calls: Sequence[Call], repeats: int = 20) -> float:
    """Median seconds of a call on the GPU, the calls taken in turn.

    All are launched while the device spins, so that its time is free of the host's.
    """
    for turn in range(max(_WARM_UP, len(calls))):
        calls[turn % len(calls)]()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    calls[0]()
    host_seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    cover = min(_MOST_COVER_SECONDS, host_seconds * repeats * 1.5 + 2e-4)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(int(cover * _CYCLES_PER_SECOND))
    for turn, (start, end) in enumerate(pairs):
        start.record()
        calls[turn % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def host_seconds(calls: Sequence[Call], repeats: int = 5) -> float:
    """Median wall seconds of a call on a CPU, the calls taken in turn."""
    calls[0]()
    seconds = []
    for turn in range(repeats):
        begin = time.perf_counter()
        calls[turn % len(calls)]()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def peaks() -> dict[str, float]:
    """TFLOP/s of a BF16 product of 8,192 cubed of random numbers, and GB/s of a copy of 1 GiB."""
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    product = device_seconds([lambda: torch.mm(left, right, out=out)])
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = device_seconds([lambda: target.copy_(source)])
    return {
        "bf16_tflops": round(2 * 8192**3 / product / 1e12, 1),
        "copy_gb_per_s": round(2 * 2**30 / copy / 1e9, 1),
    }
