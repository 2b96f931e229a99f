"""Times steps of the slice, BF16 and FP8 in turn, against peaks measured in the same run."""

import statistics
import sys
import time
import traceback
from collections.abc import Callable
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
from moe_runtime.fp8.gemm_choice import used

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
    """

    experts: int | None = None
    sequences: int = 2
    seq_len: int = 4096
    microbatches: int = 16
    vocab_size: int = 16384
    rounds: int = 3
    steps: int = 1
    precisions: tuple[str, ...] = PRECISIONS
    kernels: bool = False


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
    failed: dict[str, str] = {}
    subject, experts = _open_subject(settings, failed)
    config = slice_config(experts, settings.vocab_size)
    batch = _draw_tokens(settings)
    works = [name for name in settings.precisions if name not in failed]
    same_weights: dict[str, float] = {}
    timed = {precision: Timed([], [], []) for precision in works}
    kernels: dict[str, dict[str, Any]] = {}

    def first_loss(precision: str) -> None:
        subject.use(precision)
        same_weights[precision] = float(subject.loss(batch[0]))

    def turn(precision: str) -> None:
        _take_turn(subject, precision, batch, settings.steps, timed[precision])
        _tell(f"a turn of {precision}: {timed[precision].steps[-1]:.3f} s a step")

    def list_kernels(precision: str) -> None:
        kernels[precision] = time_by_kernel(subject, precision, batch[0])

    _each(works, first_loss, failed)
    for number in range(settings.rounds):
        _each(works if number % 2 == 0 else works[::-1], turn, failed)
    if settings.kernels:
        _each(works, list_kernels, failed)
    work = operations(config, settings.sequences * settings.microbatches, settings.seq_len)
    tokens = settings.sequences * settings.microbatches * settings.seq_len
    results = {
        name: _result(found, name, work, tokens, peaks) for name, found in timed.items() if found.steps
    }
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
        "failed": failed,
        "fp8_products": used(),
    }


def _each(
    precisions: list[str],
    run: Callable[[str], None],
    failed: dict[str, str],
    passes: tuple[type[Exception], ...] = (),
) -> None:
    """Run it for each that has not failed; what fails is noted, and the others go on.

    Args:
        passes: errors that end the measurement all the same.
    """
    for precision in precisions:
        if precision in failed:
            continue
        try:
            run(precision)
        except passes:
            raise
        except Exception:
            failed[precision] = traceback.format_exc(limit=-8)
            _tell(f"{precision} failed: {failed[precision]}")


def _tell(what: str) -> None:
    """Say at once how far it is: a run that is cut short shall not have been in vain."""
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


def _open_subject(settings: Settings, failed: dict[str, str]) -> tuple[Subject, int]:
    """The model with as many experts as asked for, or as fit; what fits is tried by one microbatch."""
    free = torch.cuda.mem_get_info()[0]
    tokens = settings.sequences * settings.seq_len
    experts = settings.experts or experts_that_fit(free, settings.vocab_size, tokens)
    while True:
        try:
            return _try_subject(settings, experts, failed), experts
        except torch.cuda.OutOfMemoryError as error:
            if settings.experts is not None or experts <= 2 * EXPERT_STEP:
                raise ConfigError(
                    f"bench train: {experts} experts and {tokens} tokens do not fit in "
                    f"{free / 2**30:.0f} GiB; take fewer --experts or --sequences"
                ) from error
        torch.cuda.empty_cache()
        experts -= EXPERT_STEP


def _try_subject(settings: Settings, experts: int, failed: dict[str, str]) -> Subject:
    subject = Subject(slice_config(experts, settings.vocab_size), torch.device("cuda"))
    tokens = _draw_tokens(settings)[0]

    def one_step(precision: str) -> None:
        subject.use(precision)
        subject.add_gradients(tokens)
        subject.update()
        torch.cuda.synchronize()
        _tell(f"{experts} experts in {precision}: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

    _each(list(settings.precisions), one_step, failed, (torch.cuda.OutOfMemoryError,))
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
