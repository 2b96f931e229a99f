"""Where the time of one microbatch goes, by kernel."""

from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moe_runtime.cli.bench_slice.subject import Subject

SHOWN = 30


def time_by_kernel(subject: Subject, precision: str, tokens: Tensor) -> dict[str, Any]:
    """Milliseconds and launches of the longest kernels of one forward and backward; the rest summed up."""
    subject.use(precision)
    subject.add_gradients(tokens)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        subject.add_gradients(tokens)
        torch.cuda.synchronize()
    subject.update()
    events = [event for event in found.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    listed = [
        {"ms": event.self_device_time_total / 1e3, "launches": event.count, "kernel": event.key[:120]}
        for event in events[:SHOWN]
    ]
    rest = events[SHOWN:]
    listed.append(
        {
            "ms": sum(event.self_device_time_total for event in rest) / 1e3,
            "launches": sum(event.count for event in rest),
            "kernel": f"{len(rest)} others",
        }
    )
    return {"ms": sum(event.self_device_time_total for event in events) / 1e3, "kernels": listed}
