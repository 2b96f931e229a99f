"""What `auto` stands for in a layout, and which batch sizes a layout admits.

A schedule asks this of M, the microbatches of one lane in a step:

    dualpipe    M even, M >= 2 pp      half of them run each way, and each way must fill the pipeline
    dualpipev   M >= 2 pp
    the others  M >= 1                 fewer than pp only makes the bubble larger
"""

from typing import Literal

from moe_runtime.config.schema import BatchConfig, LayoutConfig, Schedule

Dispatcher = Literal["auto", "local", "alltoall", "two_hop"]


def resolve_schedule(layout: LayoutConfig) -> Schedule:
    """What `auto` and `searched` mean, as far as a config can tell: single for pp 1; else costs decide."""
    is_free = layout.schedule in ("auto", "searched")
    return "single" if is_free and layout.pp == 1 else layout.schedule


def resolve_dispatcher(layout: LayoutConfig) -> Dispatcher:
    """What `auto` means, as far as a config can tell: local for ep 1; the rest depends on the machines."""
    return "local" if layout.dispatcher == "auto" and layout.ep == 1 else layout.dispatcher


def batch_grid(layout: LayoutConfig, batch: BatchConfig) -> tuple[int, int]:
    """Admissible batch sizes: multiples of the first number, not smaller than the second."""
    lane = layout.dp * batch.micro_batch_size
    match resolve_schedule(layout):
        case "dualpipe":
            return 2 * lane, 2 * layout.pp * lane
        case "dualpipev":
            return lane, 2 * layout.pp * lane
    return lane, lane


def admissible_size(batch: BatchConfig, quantum: int, smallest: int, tokens: int) -> int:
    """Sequences of the step that begins after so many tokens: the ramp, to the nearest admissible size.

    Integer arithmetic throughout, so that every rank and every restart agrees; halves go up.
    """
    end = batch.global_batch_size
    if batch.ramp_start_size is None or tokens >= batch.ramp_tokens:
        return end
    length = batch.ramp_tokens
    ideal = batch.ramp_start_size * length + (end - batch.ramp_start_size) * tokens  # in 1/length
    size = (2 * ideal + quantum * length) // (2 * quantum * length) * quantum
    return min(max(size, smallest), end)
