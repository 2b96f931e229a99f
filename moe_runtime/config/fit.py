"""Does the layout fit the model, the batch and the number of processes? And what would, if it does not?

Every rule is looked at, so that one run of the check tells all. Each finding names the axes and the
nearest choices that would do. A choice that obeys the broken rule alone may break another: pp 4
where pp 3 was odd, of a model of 3 layers. So choices are tried on the whole layout (`_Trial.fits`), and
those that pass everything are named. Only if none does, because more than one thing is wrong, the
choices are those of the broken rule.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.config.axes import batch_grid, resolve_dispatcher, resolve_schedule
from moe_runtime.config.finding import Finding, divisors, nearest
from moe_runtime.config.schema import BatchConfig, LayoutConfig, ModelConfig
from moe_runtime.config.split import split_layers
from moe_runtime.config.stages import num_stages


def layout_findings(
    model: ModelConfig, layout: LayoutConfig, batch: BatchConfig, world_size: int | None = None
) -> list[Finding]:
    """Everything that is wrong between layout, model, batch and processes; keys are those of the run."""
    trial = _Trial(model, layout, batch)
    return [
        *_world_findings(trial, world_size),
        *_schedule_findings(trial),
        *_expert_findings(trial),
        *_batch_findings(trial),
        *_stage_findings(trial),
    ]


@dataclass(frozen=True)
class _Trial:
    model: ModelConfig
    layout: LayoutConfig
    batch: BatchConfig

    def fits(self, **changes: Any) -> bool:
        """Whether the layout with these keys changed breaks no rule at all.

        The same rules as the findings, without their words; how many processes there are is left
        aside, for it changes with the axes.
        """
        layout = self.layout.model_copy(update=changes)
        size = changes.get("global_batch_size", self.batch.global_batch_size)
        schedule, counts = resolve_schedule(layout), layout.layers_per_stage
        quantum, smallest = batch_grid(layout, self.batch)
        stages = num_stages(layout, self.model.num_layers)
        return (
            not (schedule == "dualpipe" and layout.pp % 2)
            and not (schedule == "single" and layout.pp > 1)
            and not (layout.zero_stage == 2 and layout.pp > 1)
            and layout.dp % layout.ep == 0
            and self.model.num_experts % layout.ep == 0
            and not (resolve_dispatcher(layout) == "local" and layout.ep > 1)
            and not _why_not_two_hop(layout, self.model)
            and size % quantum == 0
            and size >= smallest
            and stages <= self.model.num_layers
            and (counts is None or _counts_do(counts, stages, self.model.num_layers))
        )

    def near(self, key: str, valid: Iterable[int]) -> str:
        """The choices nearest to the present one, those that fit in everything if there are any."""
        choices = list(valid)
        fitting = [choice for choice in choices if self.fits(**{key: choice})]
        wanted = getattr(self.layout, key) if hasattr(self.layout, key) else getattr(self.batch, key)
        return nearest(wanted, fitting or choices)

    def remedies(self, *changes: tuple[str, Any]) -> str:
        """The single changes that make everything fit as text, or all if none does: `pp 1, or ep 1`."""
        fitting = [change for change in changes if self.fits(**dict([change]))]
        return ", or ".join(f"{key} {value}" for key, value in fitting or changes)


def _counts_do(counts: Sequence[int], stages: int, num_layers: int) -> bool:
    return len(counts) == stages and sum(counts) == num_layers and all(counts[1:-1])


def _world_findings(trial: _Trial, world_size: int | None) -> list[Finding]:
    layout = trial.layout
    needed = layout.pp * layout.dp
    if world_size is None or world_size == needed:
        return []
    pairs = [(pp, world_size // pp) for pp in divisors(world_size)]
    fitting = [pair for pair in pairs if trial.fits(pp=pair[0], dp=pair[1])]
    # Those that keep an axis come first, then the nearest pp.
    fitting.sort(key=lambda pair: (pair[0] != layout.pp and pair[1] != layout.dp, abs(pair[0] - layout.pp)))
    choices = [f"start {needed}", *(f"set pp {pp} x dp {dp}" for pp, dp in fitting[:2])]
    text = f"pp {layout.pp} x dp {layout.dp} needs {needed} processes, got {world_size}"
    return [Finding("layout", f"{text}; {', or '.join(choices)}")]


def _schedule_findings(trial: _Trial) -> list[Finding]:
    layout, found = trial.layout, []
    if layout.schedule == "dualpipe" and layout.pp % 2:
        text = f"dualpipe needs an even pp, got pp {layout.pp}; {_even_choices(trial)}"
        found.append(Finding("layout.pp", text))
    if layout.schedule == "single" and layout.pp > 1:
        remedies = trial.remedies(("pp", 1), ("schedule", "auto"), ("schedule", "1f1b"))
        found.append(Finding("layout.schedule", f"single needs pp 1, got pp {layout.pp}; set {remedies}"))
    if layout.zero_stage == 2 and layout.pp > 1:
        remedies = trial.remedies(("zero_stage", 1), ("pp", 1))
        found.append(Finding("layout.zero_stage", f"2 needs pp 1, got pp {layout.pp}; set {remedies}"))
    return found


def _even_choices(trial: _Trial) -> str:
    """`nearest: 2, 4, or layout.schedule 1f1b`, as far as these do."""
    pp, num_layers = trial.layout.pp, trial.model.num_layers
    even = range(2, max(2, min(pp + 1, num_layers)) + 1, 2)
    schedule = "single" if pp == 1 else "1f1b"
    by_pp = f"nearest: {trial.near('pp', even)}"
    by_schedule = f"layout.schedule {schedule}"
    if not trial.fits(schedule=schedule):
        return by_pp
    return (
        f"{by_pp}, or {by_schedule}"
        if any(trial.fits(pp=choice) for choice in even)
        else f"set {by_schedule}"
    )


def _expert_findings(trial: _Trial) -> list[Finding]:
    layout, experts, found = trial.layout, trial.model.num_experts, []
    valid = [ep for ep in divisors(layout.dp) if experts % ep == 0]
    near = ""
    if layout.dp % layout.ep or experts % layout.ep:
        both = f"dp {layout.dp} and num_experts {experts}"
        near = f"nearest ep that divides both {both}: {trial.near('ep', valid)}"
    if layout.dp % layout.ep:
        found.append(Finding("layout.ep", f"ep {layout.ep} does not divide dp {layout.dp}; {near}"))
    if experts % layout.ep:
        found.append(Finding("layout.ep", f"ep {layout.ep} does not divide num_experts {experts}; {near}"))
    if layout.dispatcher == "local" and layout.ep > 1:
        remedies = trial.remedies(("dispatcher", "alltoall"), ("ep", 1))
        found.append(Finding("layout.dispatcher", f"local needs ep 1, got ep {layout.ep}; set {remedies}"))
    reason = _why_not_two_hop(layout, trial.model)
    if reason:
        remedies = trial.remedies(("dispatcher", "alltoall"), ("dispatcher", "auto"))
        found.append(Finding("layout.dispatcher", f"two_hop needs {reason}; set {remedies}"))
    return found


def _why_not_two_hop(layout: LayoutConfig, model: ModelConfig) -> str | None:
    """What `two_hop` lacks, as far as a config can tell; without ranks_per_node the machines decide."""
    if layout.dispatcher != "two_hop":
        return None
    per_node = layout.ranks_per_node
    if layout.ep == 1 or (per_node is not None and per_node >= layout.ep):
        return f"an ep group of at least 2 nodes, got ep {layout.ep} with {per_node or 'any'} ranks a node"
    if per_node is None:
        return None
    if layout.ep % per_node:
        return f"ep groups of whole nodes, got ep {layout.ep} with {per_node} ranks a node"
    nodes = layout.ep // per_node
    if model.num_groups % nodes:
        return f"whole routing groups on each node, got num_groups {model.num_groups} on {nodes} nodes"
    return None


def _batch_findings(trial: _Trial) -> list[Finding]:
    layout, batch = trial.layout, trial.batch
    quantum, smallest = batch_grid(layout, batch)
    size, least = batch.global_batch_size, max(smallest, batch.ramp_start_size or 0)
    if size % quantum == 0 and size >= smallest:
        return []
    least = -(-least // quantum) * quantum
    below = max(size // quantum * quantum, least)
    near = trial.near("global_batch_size", sorted({below, max(below + quantum * (below < size), least)}))
    lanes = f"dp {layout.dp} x micro_batch_size {batch.micro_batch_size}"
    least_text = f"at least 2 x pp {layout.pp} x {lanes}"
    match resolve_schedule(layout):
        case "dualpipe":
            wanted = f"a multiple of 2 x {lanes} and {least_text}"
            text = f"dualpipe runs an even number of microbatches, at least 2 x pp: expected {wanted}"
        case "dualpipev":
            wanted = f"a multiple of {lanes} and {least_text}"
            text = f"dualpipev runs at least 2 x pp microbatches: expected {wanted}"
        case _:
            text = f"expected a multiple of {lanes}"
    return [Finding("batch.global_batch_size", f"{text}, got {size}; nearest: {near}")]


def _stage_findings(trial: _Trial) -> list[Finding]:
    layout, num_layers, found = trial.layout, trial.model.num_layers, []
    stages = num_stages(layout, num_layers)
    if stages > num_layers:
        each = stages // layout.pp
        most = max(1, num_layers // each)
        near = trial.near("pp", range(1, most + 1))
        made = f"{layout.pp} stages" if each == 1 else f"{stages} stages ({each} on each of pp {layout.pp})"
        text = f"{made} for {num_layers} layers; at most pp {most}; nearest: {near}"
        found.append(Finding("layout.pp", text))
    counts = layout.layers_per_stage
    if counts is None or _counts_do(counts, stages, num_layers):
        return found
    return [*found, *_count_findings(trial, counts)]


def _count_findings(trial: _Trial, counts: Sequence[int]) -> list[Finding]:
    num_layers, found = trial.model.num_layers, []
    stages = num_stages(trial.layout, num_layers)
    remedy = ""
    if stages <= num_layers:
        remedy = f"; such as {list(split_layers(trial.model, stages))}, or null for that"
    key = "layout.layers_per_stage"
    if len(counts) != stages:
        pp = trial.layout.pp
        what = f"pp {pp} stages" if stages == pp else f"{stages} stages of pp {pp}"
        wanted = f"one number for each of the {what}"
        found.append(Finding.expected(key, wanted, f"{len(counts)}: {list(counts)}{remedy}"))
    if sum(counts) != num_layers:
        got = f"{' + '.join(map(str, counts))} = {sum(counts)}"
        found.append(Finding.expected(key, f"a sum of num_layers {num_layers}", f"{got}{remedy}"))
    empty = [str(stage) for stage in range(1, len(counts) - 1) if counts[stage] == 0]
    if empty and len(counts) == stages:
        # The first stage has the embedding at least and the last one the head; the others nothing.
        wanted = "a layer at least on every stage but the first and the last"
        found.append(Finding.expected(key, wanted, f"none on stage {', '.join(empty)}{remedy}"))
    return found
