"""Does the layout fit the model, the batch and the number of processes? Decided before any of them starts.

Every rule is looked at, so that one run of the check tells all; each finding names the axes and the
nearest choices that would do. A schedule asks this of M, the microbatches of one lane in a step:

    single     M >= 1                  one pipeline rank
    1f1b       M >= 1                  fewer than pp only makes the bubble larger
    dualpipe   M even, M >= 2 pp       half of them run each way, and each way must fill the pipeline
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_runtime.config.finding import Finding, divisors, nearest
from moe_runtime.config.schema import BatchConfig, LayoutConfig, ModelConfig, RunConfig
from moe_runtime.config.split import split_layers
from moe_runtime.errors import ConfigError

Schedule = Literal["single", "1f1b", "dualpipe"]


@dataclass(frozen=True)
class ResolvedLayout:
    """A layout that has been checked, with everything that `auto` and `null` stood for.

    Args:
        batch_quantum: admissible batch sizes are multiples of this many sequences ...
        smallest_batch: ... and not smaller than this.
        start_batch_size: sequences of the first step; the ramp's start, made admissible.
        num_microbatches: microbatches of one lane in a step after the ramp, both directions together.
        num_microbatches_start: the same in the first step.
        layers: the layers of each stage, in order of stage.
    """

    pp: int
    dp: int
    ep: int
    schedule: Schedule
    dispatcher: Literal["local", "alltoall"]
    world_size: int
    batch_quantum: int
    smallest_batch: int
    start_batch_size: int
    num_microbatches: int
    num_microbatches_start: int
    layers: tuple[range, ...]


def check_layout(config: RunConfig, world_size: int | None = None) -> ResolvedLayout:
    """Resolves the layout of a run, or says everything that is wrong with it.

    Args:
        config: the run.
        world_size: processes that there will be; None when that is for the layout to say.

    Raises:
        ConfigError: one line for each mistake.
    """
    model, layout, batch = config.model, config.layout, config.batch
    found = layout_findings(model, layout, batch, world_size)
    if found:
        raise ConfigError("\n".join(f"{finding.key}: {finding.text}" for finding in found))
    schedule = resolve_schedule(layout)
    quantum, smallest = batch_grid(layout, batch)
    start = admissible_size(batch, quantum, smallest, tokens=0)
    lane = layout.dp * batch.micro_batch_size
    counts = layout.layers_per_stage or split_layers(model, layout.pp)
    return ResolvedLayout(
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        schedule=schedule,
        dispatcher=resolve_dispatcher(layout),
        world_size=layout.pp * layout.dp,
        batch_quantum=quantum,
        smallest_batch=smallest,
        start_batch_size=start,
        num_microbatches=batch.global_batch_size // lane,
        num_microbatches_start=start // lane,
        layers=tuple(range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(layout.pp)),
    )


def resolve_schedule(layout: LayoutConfig) -> Schedule:
    """What `auto` means: single for pp 1, dualpipe for even pp, else 1f1b."""
    if layout.schedule != "auto":
        return layout.schedule
    if layout.pp == 1:
        return "single"
    return "1f1b" if layout.pp % 2 else "dualpipe"


def resolve_dispatcher(layout: LayoutConfig) -> Literal["local", "alltoall"]:
    """What `auto` means: local for ep 1, else alltoall."""
    if layout.dispatcher != "auto":
        return layout.dispatcher
    return "local" if layout.ep == 1 else "alltoall"


def batch_grid(layout: LayoutConfig, batch: BatchConfig) -> tuple[int, int]:
    """Admissible batch sizes: multiples of the first number, not smaller than the second."""
    lane = layout.dp * batch.micro_batch_size
    if resolve_schedule(layout) == "dualpipe":
        return 2 * lane, 2 * layout.pp * lane
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


def layout_findings(
    model: ModelConfig, layout: LayoutConfig, batch: BatchConfig, world_size: int | None = None
) -> list[Finding]:
    """Everything that is wrong between layout, model, batch and processes; keys are those of the run."""
    return [
        *_world_findings(layout, world_size),
        *_schedule_findings(layout),
        *_expert_findings(model, layout),
        *_batch_findings(layout, batch),
        *_stage_findings(model, layout),
    ]


def _world_findings(layout: LayoutConfig, world_size: int | None) -> list[Finding]:
    needed = layout.pp * layout.dp
    if world_size is None or world_size == needed:
        return []
    keeps = []
    if world_size % layout.pp == 0:
        keeps.append(f"pp {layout.pp} x dp {world_size // layout.pp}")
    if world_size % layout.dp == 0:
        keeps.append(f"pp {world_size // layout.dp} x dp {layout.dp}")
    if not keeps:
        pp = int(nearest(layout.pp, divisors(world_size), count=1))
        keeps.append(f"pp {pp} x dp {world_size // pp}")
    text = f"pp {layout.pp} x dp {layout.dp} needs {needed} processes, got {world_size}"
    return [Finding("layout", f"{text}; start {needed}, or set {' or '.join(keeps)}")]


def _schedule_findings(layout: LayoutConfig) -> list[Finding]:
    found = []
    if layout.schedule == "dualpipe" and layout.pp % 2:
        near = nearest(layout.pp, range(2, layout.pp + 2, 2))
        text = f"dualpipe needs an even pp, got pp {layout.pp}; nearest: {near}, or layout.schedule 1f1b"
        found.append(Finding("layout.pp", text))
    if layout.schedule == "single" and layout.pp > 1:
        text = f"single needs pp 1, got pp {layout.pp}; set pp 1, or layout.schedule auto"
        found.append(Finding("layout.schedule", text))
    if layout.zero_stage == 2 and layout.pp > 1:
        text = f"2 needs pp 1, got pp {layout.pp}; set zero_stage 1, or pp 1"
        found.append(Finding("layout.zero_stage", text))
    return found


def _expert_findings(model: ModelConfig, layout: LayoutConfig) -> list[Finding]:
    found = []
    valid = [ep for ep in divisors(layout.dp) if model.num_experts % ep == 0]
    near = f"nearest ep that divides both dp {layout.dp} and num_experts {model.num_experts}"
    if layout.dp % layout.ep:
        text = f"ep {layout.ep} does not divide dp {layout.dp}; {near}: {nearest(layout.ep, valid)}"
        found.append(Finding("layout.ep", text))
    if model.num_experts % layout.ep:
        text = f"ep {layout.ep} does not divide num_experts {model.num_experts}"
        found.append(Finding("layout.ep", f"{text}; {near}: {nearest(layout.ep, valid)}"))
    if layout.dispatcher == "local" and layout.ep > 1:
        text = f"local needs ep 1, got ep {layout.ep}; set dispatcher alltoall, or ep 1"
        found.append(Finding("layout.dispatcher", text))
    return found


def _batch_findings(layout: LayoutConfig, batch: BatchConfig) -> list[Finding]:
    quantum, smallest = batch_grid(layout, batch)
    size = batch.global_batch_size
    if size % quantum == 0 and size >= smallest:
        return []
    below = max(size // quantum * quantum, smallest)
    near = nearest(size, {below, max(below + quantum, smallest) if size > below else below})
    schedule = resolve_schedule(layout)
    lanes = f"dp {layout.dp} x micro_batch_size {batch.micro_batch_size}"
    if schedule == "dualpipe":
        wanted = f"a multiple of 2 x {lanes} and at least 2 x pp {layout.pp} x {lanes}"
        text = f"dualpipe runs an even number of microbatches, at least 2 x pp: expected {wanted}"
    else:
        text = f"expected a multiple of {lanes}"
    return [Finding("batch.global_batch_size", f"{text}, got {size}; nearest: {near}")]


def _stage_findings(model: ModelConfig, layout: LayoutConfig) -> list[Finding]:
    found = []
    if layout.pp > model.num_layers:
        text = f"{layout.pp} stages for {model.num_layers} layers; at most pp {model.num_layers}"
        found.append(Finding("layout.pp", text))
    counts: Sequence[int] | None = layout.layers_per_stage
    if counts is None:
        return found
    if len(counts) != layout.pp:
        wanted = f"one number for each of the {layout.pp} stages"
        found.append(Finding.expected("layout.layers_per_stage", wanted, f"{len(counts)}: {list(counts)}"))
    if sum(counts) != model.num_layers:
        wanted = f"a sum of num_layers {model.num_layers}"
        got = f"{' + '.join(map(str, counts))} = {sum(counts)}"
        found.append(Finding.expected("layout.layers_per_stage", wanted, got))
    return found
