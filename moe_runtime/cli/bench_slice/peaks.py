"""What this device reaches on plain products and copies, measured in the run that is held against it."""

from collections.abc import Callable
from typing import Any

import torch

SIDE = 8192
COPY_BYTES = 2**31


def milliseconds(run: Callable[[], Any], times: int = 10) -> float:
    """Median time of a call on the device, after one that is not counted."""
    run()
    marks = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)[times // 2]


def measure_peaks() -> dict[str, float]:
    """Rates in 1/s: `bf16` and `fp8` operations of products 8192^3 of random numbers, `copy` bytes.

    The FP8 product has one scale for each operand and no promotion: the fastest that the library has.
    """
    flops = 2.0 * SIDE**3
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = flops / milliseconds(lambda: torch.mm(left, right.t()), 20) * 1e3
    codes = [x.to(torch.float8_e4m3fn) for x in (left, right)]
    one = torch.ones((), device="cuda")

    def fp8_product() -> Any:
        return torch._scaled_mm(
            codes[0], codes[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    fp8 = flops / milliseconds(fp8_product, 20) * 1e3
    source = torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2.0 * COPY_BYTES / milliseconds(lambda: target.copy_(source)) * 1e3
    return {"bf16": bf16, "fp8": fp8, "copy": copy}
