"""Bandwidth of the local kernels of dispatch and combine on a GPU, against a copy timed in the same run.

    python benchmarks/comm_kernels.py [--tokens 8192] [--hidden 7168] [--top-k 8] [--experts 256]

Prints one JSON object. Each kernel first has to give the bits of a plain torch form; then all of them,
a copy and torch's own gather are timed in turn, `--repeats` rounds, and the median counts. (Rounding by
the cast instruction is left out, and listed as differing, where it gives other codes.) A kernel's
bandwidth is the bytes it cannot avoid (each token read once, each row read or written once, scales and
indices too) over its time; `fraction` is that over the copy's. Buffers are many times the size of L2,
so nothing needs to be flushed between rounds.

Exit codes: 0; 1 where bits differ; 2 without a CUDA device.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COPY_BYTES = 1 << 30
WARM_UP_ROUNDS = 5
HARDWARE_CAST = "quantise_permute_hardware_cast"


@dataclass(frozen=True)
class Task:
    """Something to time.

    Args:
        run: does it once.
        moved_bytes: what it has to read and write, at least.
    """

    run: Callable[[], object]
    moved_bytes: int


@dataclass(frozen=True)
class Buffers:
    """Tensors of one shape; rows are in records as dispatch sends them."""

    tokens: Tensor
    expert_ids: Tensor
    weights: Tensor
    row_tokens: Tensor
    slot_rows: Tensor
    rows: Tensor
    codes: Tensor
    scales: Tensor
    d_rows: Tensor


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The shape, by default that of the project's bandwidth target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_buffers(options: argparse.Namespace, device: torch.device) -> Buffers:
    """Random tokens and routing, and room for the rows."""
    from moe_comm.kernels.layout import plan_slots

    generator = torch.Generator(device).manual_seed(options.seed)
    shape = (options.tokens, options.hidden)
    scores = torch.rand(options.tokens, options.experts, generator=generator, device=device)
    expert_ids = scores.topk(options.top_k, dim=1).indices
    layout = plan_slots(expert_ids, options.experts)
    num_rows = expert_ids.numel()
    num_tiles = -(-options.hidden // 128)
    # Records of a multiple of 16 bytes: codes, scales, one gate weight.
    record_bytes = -(-(options.hidden + 4 * num_tiles + 4) // 16) * 16
    records = torch.zeros(num_rows, record_bytes, dtype=torch.uint8, device=device)
    scales = records[:, -(-options.hidden // 4) * 4 :][:, : 4 * num_tiles].view(torch.float32)
    rows = torch.zeros(num_rows, options.hidden, dtype=torch.bfloat16, device=device)
    return Buffers(
        tokens=torch.randn(*shape, generator=generator, device=device).bfloat16(),
        expert_ids=expert_ids,
        weights=torch.rand(expert_ids.shape, generator=generator, device=device),
        row_tokens=layout.row_tokens,
        slot_rows=layout.slot_rows,
        rows=rows,
        codes=records[:, : options.hidden],
        scales=scales,
        d_rows=torch.zeros_like(rows),
    )


def wrong_bits(buffers: Buffers) -> list[str]:
    """Names of the kernels whose bits differ from a plain torch form."""
    from moe_comm.kernels.permute import gather_rows, permute_quantise, permute_tokens
    from moe_comm.kernels.unpermute import sum_rows
    from moe_comm.wire.tile_triton import quantise_on_device

    order = torch.argsort(buffers.expert_ids.flatten(), stable=True)
    row_tokens = order // buffers.expert_ids.shape[1]
    expected_rows = buffers.tokens[row_tokens]
    expected_codes, expected_scales = (part[row_tokens] for part in quantise_on_device(buffers.tokens, False))
    total = torch.zeros_like(buffers.tokens, dtype=torch.float32)
    for choice in range(buffers.slot_rows.shape[1]):
        total += expected_rows[buffers.slot_rows[:, choice]].float()
    permute_tokens(buffers.tokens, buffers.slot_rows, buffers.rows)
    found = {
        "layout": (buffers.row_tokens, row_tokens),
        "permute": (buffers.rows, expected_rows),
        "gather": (gather_rows(buffers.tokens, row_tokens), expected_rows),
        "unpermute": (sum_rows(buffers.rows, buffers.slot_rows), total.bfloat16()),
    }
    wrong = [name for name, (ours, plain) in found.items() if not torch.equal(ours, plain)]
    for cast in (False, True):
        permute_quantise(buffers.tokens, buffers.slot_rows, buffers.codes, buffers.scales, hardware_cast=cast)
        if not (buffers.codes.equal(expected_codes) and buffers.scales.equal(expected_scales)):
            wrong.append(HARDWARE_CAST if cast else "quantise_permute")
    return wrong


def make_tasks(buffers: Buffers, num_experts: int) -> dict[str, Task]:
    """What is timed, by name."""
    from moe_comm.kernels.layout import plan_slots
    from moe_comm.kernels.permute import permute_quantise, permute_tokens
    from moe_comm.kernels.unpermute import sum_rows, sum_rows_backward

    b = buffers
    token_bytes, row_bytes = b.tokens.nbytes, b.rows.nbytes
    index_bytes = b.slot_rows.nbytes
    code_bytes = b.codes.numel() + b.scales.numel() * b.scales.element_size()
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=b.tokens.device)
    target = torch.empty_like(source)
    quantise = (b.tokens, b.slot_rows, b.codes, b.scales)
    gradients = (b.tokens, b.slot_rows, b.d_rows)
    moved = token_bytes + row_bytes + index_bytes
    return {
        "copy": Task(lambda: target.copy_(source), 2 * COPY_BYTES),
        "permute": Task(lambda: permute_tokens(b.tokens, b.slot_rows, b.rows), moved),
        "torch_index_select": Task(
            lambda: torch.index_select(b.tokens, 0, b.row_tokens, out=b.rows), token_bytes + row_bytes
        ),
        "unpermute": Task(lambda: sum_rows(b.rows, b.slot_rows), moved),
        "unpermute_backward": Task(
            lambda: sum_rows_backward(*gradients, weights=b.weights, rows=b.rows), moved + row_bytes
        ),
        "quantise_permute": Task(lambda: permute_quantise(*quantise), token_bytes + code_bytes + index_bytes),
        HARDWARE_CAST: Task(
            lambda: permute_quantise(*quantise, hardware_cast=True), token_bytes + code_bytes + index_bytes
        ),
        "quantise_permute_4_warps": Task(
            lambda: permute_quantise(*quantise, hardware_cast=True, num_warps=4),
            token_bytes + code_bytes + index_bytes,
        ),
        "layout": Task(lambda: plan_slots(b.expert_ids, num_experts), 4 * index_bytes),
    }


def time_in_turn(tasks: dict[str, Task], repeats: int) -> dict[str, float]:
    """Median seconds of each task, the tasks taking turns.

    The device is busy with a copy while a task is launched, so that its time is free of the host's.
    """
    cover = tasks["copy"].run
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(WARM_UP_ROUNDS + repeats):
        for name, task in tasks.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cover()
            begin.record()
            task.run()
            end.record()
            end.synchronize()
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(
    options: argparse.Namespace, tasks: dict[str, Task], seconds: dict[str, float], differing: list[str]
) -> dict[str, Any]:
    """The JSON object that is printed."""
    rates = {name: task.moved_bytes / seconds[name] for name, task in tasks.items()}
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": {name: getattr(options, name) for name in ("tokens", "hidden", "top_k", "experts")},
        "differing": differing,
        "results": {
            name: {
                "bytes": task.moved_bytes,
                "time_us": round(seconds[name] * 1e6, 1),
                "gb_per_s": round(rates[name] / 1e9, 1),
                "fraction": round(rates[name] / rates["copy"], 3),
            }
            for name, task in tasks.items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            "comm_kernels: expected a CUDA device, found none; run it on a machine with a GPU",
            file=sys.stderr,
        )
        return 2
    buffers = make_buffers(options, torch.device("cuda"))
    differing = wrong_bits(buffers)
    if set(differing) - {HARDWARE_CAST}:
        names = ", ".join(differing)
        print(
            f"comm_kernels: expected the bits of the plain torch form, got others in {names}", file=sys.stderr
        )
        return 1
    tasks = make_tasks(buffers, options.experts)
    for name in differing:
        del tasks[name]
    print(json.dumps(report(options, tasks, time_in_turn(tasks, options.repeats), differing)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
