"""Times steps of the slice, BF16 and FP8 in turn, against peaks measured in the same run."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.cli.bench_slice.kernels import time_by_kernel
from moe_runtime.cli.bench_slice.peaks import measure_peaks
from moe_runtime.cli.bench_slice.shapes import (
    EXPERT_STEP,
    Convention,
    Operations,
    count_parameters,
    experts_that_fit,
    operations,
    slice_config,
)
from moe_runtime.cli.bench_slice.subject import PRECISIONS, Subject
from moe_runtime.errors import ConfigError

CONVENTIONS: tuple[Convention, ...] = ("causal", "full")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        experts: routed experts a layer; None: as many as fit.
        sequences: of a microbatch.
        seq_len: tokens of a sequence.
        microbatches: of a step.
        vocab_size: rows of embedding and head.
        rounds: turns of each precision.
        steps: timed steps of a turn; one before them is not timed.
        precisions: which, in turn.
        kernels: also list where the time of a microbatch goes.
        peer: also measure BF16 against transformers' model.
    """

    experts: int | None = None
    sequences: int = 2
    seq_len: int = 4096
    microbatches: int = 4
    vocab_size: int = 16384
    rounds: int = 3
    steps: int = 2
    precisions: tuple[str, ...] = PRECISIONS
    kernels: bool = False
    peer: bool = False


@dataclass
class Timed:
    """Seconds of the steps of one precision."""

    steps: list[float]
    updates: list[float]
    losses: list[float]
    peak_bytes: int = 0


def measure(settings: Settings) -> dict[str, Any]:
    """Everything, as one JSON object; `report.describe` makes a table of it.

    Raises:
        ConfigError: no GPU, or not enough memory.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench train: expected a CUDA device for --device cuda, got none; use --device cpu")
    peaks = measure_peaks()
    torch.cuda.empty_cache()
    subject, experts = _open_subject(settings)
    config = slice_config(experts, settings.vocab_size)
    batch = _draw_tokens(settings)
    same_weights = {}
    for precision in settings.precisions:
        subject.use(precision)
        same_weights[precision] = float(subject.loss(batch[0]))
    timed = {precision: Timed([], [], []) for precision in settings.precisions}
    for turn in range(settings.rounds):
        order = settings.precisions if turn % 2 == 0 else settings.precisions[::-1]
        for precision in order:
            _take_turn(subject, precision, batch, settings.steps, timed[precision])
    work = operations(config, settings.sequences * settings.microbatches, settings.seq_len)
    tokens = settings.sequences * settings.microbatches * settings.seq_len
    results = {name: _result(found, name, work, tokens, peaks) for name, found in timed.items()}
    kernels = {}
    if settings.kernels:
        kernels = {name: time_by_kernel(subject, name, batch[0]) for name in settings.precisions}
    del subject
    torch.cuda.empty_cache()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "settings": asdict(settings) | {"experts": experts},
        "parameters": count_parameters(config),
        "flops_per_token": {kind: work.total(kind) / tokens for kind in CONVENTIONS},
        "peaks": peaks,
        "loss_at_the_same_weights": same_weights,
        "results": results,
        "kernels": kernels,
        "peer": _peer(settings) if settings.peer else None,
    }


def _peer(settings: Settings) -> dict[str, Any]:
    from moe_runtime.cli.bench_slice.peer import measure_peer  # needs transformers

    return measure_peer(settings.rounds)


def _open_subject(settings: Settings) -> tuple[Subject, int]:
    """The model with as many experts as asked for, or as fit; what fits is tried by one microbatch."""
    free = torch.cuda.mem_get_info()[0]
    tokens = settings.sequences * settings.seq_len
    experts = settings.experts or experts_that_fit(free, settings.vocab_size, tokens)
    while True:
        try:
            return _try_subject(settings, experts), experts
        except torch.cuda.OutOfMemoryError as error:
            if settings.experts is not None or experts <= 2 * EXPERT_STEP:
                raise ConfigError(
                    f"bench train: {experts} experts and {tokens} tokens do not fit in "
                    f"{free / 2**30:.0f} GiB; take fewer --experts or --sequences"
                ) from error
        torch.cuda.empty_cache()
        experts -= EXPERT_STEP


def _try_subject(settings: Settings, experts: int) -> Subject:
    subject = Subject(slice_config(experts, settings.vocab_size), torch.device("cuda"))
    tokens = _draw_tokens(settings)[0]
    for precision in settings.precisions:
        subject.use(precision)
        subject.add_gradients(tokens)
        subject.update()
    torch.cuda.synchronize()
    return subject


def _draw_tokens(settings: Settings) -> list[Tensor]:
    """int64 [sequences, seq_len + 1] of each microbatch, at random."""
    generator = torch.Generator("cuda").manual_seed(2)
    shape = (settings.sequences, settings.seq_len + 1)
    return [
        torch.randint(settings.vocab_size, shape, device="cuda", generator=generator)
        for _ in range(settings.microbatches)
    ]


def _take_turn(subject: Subject, precision: str, batch: list[Tensor], steps: int, into: Timed) -> None:
    """One step that is not timed, and `steps` that are."""
    subject.use(precision)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for number in range(steps + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        losses = [subject.add_gradients(tokens) for tokens in batch]
        torch.cuda.synchronize()
        middle = time.perf_counter()
        subject.update()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        if number > 0:
            into.steps.append(ended - begun)
            into.updates.append(ended - middle)
            into.losses.append(float(torch.stack(losses).mean()))
    into.peak_bytes = max(into.peak_bytes, torch.cuda.max_memory_allocated())


def _result(
    found: Timed, precision: str, work: Operations, tokens: int, peaks: dict[str, float]
) -> dict[str, Any]:
    """Speed of one precision, and the share of what the device can do."""
    step = statistics.median(found.steps)
    shares = {kind: work.seconds(kind, peaks["bf16"]) / step for kind in CONVENTIONS}
    result = {
        "step_s": step,
        "step_s_range": [min(found.steps), max(found.steps)],
        "update_s": statistics.median(found.updates),
        "tokens_per_s": tokens / step,
        "tflops": {kind: work.total(kind) / step / 1e12 for kind in CONVENTIONS},
        "mfu_of_bf16_peak": shares,
        "losses": found.losses,
        "peak_gib": found.peak_bytes / 2**30,
    }
    if precision == "fp8":
        result["mfu_of_both_peaks"] = {
            kind: work.seconds(kind, peaks["bf16"], peaks["fp8"]) / step for kind in CONVENTIONS
        }
    return result
