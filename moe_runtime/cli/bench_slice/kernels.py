"""Where the time of one microbatch goes, by kernel and by kind of work."""

import re
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe_runtime.cli.bench_slice.subject import Subject

SHOWN, IDLE_SHOWN, SHORT = 30, 12, 60
# The first kind whose pattern is found in a kernel's name; what none finds is `other`.
KINDS = (
    ("attention", r"sdpa|flash|fmha|attention|_mha"),
    ("moved rows", r"permute|sum_rows|gather|index_select|embedding|scatter|sort|indexSelect"),
    ("casts", r"cast_|gated_backward_kernel|columns_of|decode_kernel|pack_kernel|quantise_kernel"),
    ("products", r"product_kernel|gemm|nvjet|cutlass|xmma|wgmma|deep_gemm|grouped"),
    ("SwiGLU and heads", r"swiglu|join_kernel|part_kernel|silu"),
    ("norms", r"rms_?norm|layer_?norm|RMSNorm|GammaBeta"),
    ("copies", r"copy|Memcpy|Memset|transpose|CatArray|fill"),
    ("elementwise", r"elementwise|reduce|softmax|foreach|multi_tensor|adam"),
)


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    for kind, pattern in KINDS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"


def time_by_kernel(subject: Subject, precision: str, tokens: Tensor) -> dict[str, Any]:
    """Milliseconds and launches of the longest kernels of one forward and backward; the rest summed up."""
    subject.use(precision)
    subject.add_gradients(tokens)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        begin.record()
        subject.add_gradients(tokens)
        end.record()
        torch.cuda.synchronize()
    subject.update()
    events = [(e.key, e.self_device_time_total / 1e3, e.count) for e in found.key_averages()]
    spans = [
        (e.time_range.start / 1e3, e.time_range.end / 1e3, e.name)
        for e in found.events() or ()
        if e.device_type == DeviceType.CUDA
    ]
    idle = {"elapsed_ms": begin.elapsed_time(end), "idle": idle_between(spans)}
    return summarise([event for event in events if event[1] > 0]) | idle


def idle_between(spans: list[tuple[float, float, str]]) -> list[dict[str, Any]]:
    """Where nothing ran: milliseconds between two kernels, summed over their names, the longest first.

    Args:
        spans: (start, end, name) of kernels, in milliseconds, in any order.
    """
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    before, until = "", min((start for start, _, _ in spans), default=0.0)
    for start, end, name in sorted(spans):
        if start > until:
            ms, count = sums.get((before, name), (0.0, 0))
            sums[before, name] = (ms + start - until, count + 1)
        if end >= until:
            before, until = name, end
    longest = sorted(sums.items(), key=lambda item: -item[1][0])[:IDLE_SHOWN]
    return [
        {"ms": ms, "times": count, "after": after[:SHORT], "before": then[:SHORT]}
        for (after, then), (ms, count) in longest
    ]


def summarise(events: list[tuple[str, float, int]]) -> dict[str, Any]:
    """Sums and the longest kernels of (name, milliseconds, launches)."""
    events = sorted(events, key=lambda event: -event[1])
    listed = [
        {"ms": ms, "launches": count, "kind": kind_of(name), "kernel": name[:120]}
        for name, ms, count in events[:SHOWN]
    ]
    rest = events[SHOWN:]
    if rest:
        ms, count = sum(event[1] for event in rest), sum(event[2] for event in rest)
        listed.append({"ms": ms, "launches": count, "kind": "", "kernel": f"{len(rest)} others"})
    kinds: dict[str, float] = {}
    for name, ms, _ in events:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    return {
        "ms": sum(event[1] for event in events),
        "launches": sum(event[2] for event in events),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": listed,
    }
