"""The costs of a measured step: what a simulation needs to say what that step, or another, should take.

Medians over all microbatches, directions and lanes, for each stage and kind of action. An entry that ran
alone gives its computation (its time less what it stood still for an exchange) and its exchange (what it
stood still), so that the two add up to what it took. For what never ran alone:

    I and W     known from I and W of this stage; else half of its B each; else the same from the medians
                over all stages; in a step of forwards alone, as long as F
    F           known from F of this stage; else the median over all stages
    F&B         the median of each pair of stages; for pairs that never ran, `hidden` says what they hide
    hidden      of what the measured pairs could have hidden, the share that they did (median, 0 to 1)
    transfer    median time from the end of the entry that made a tensor to the start of the one that
                needed it, where that one's rank stood idle meanwhile; 0 if none did
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.measured import timeline_of
from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.planner.trace import Trace
from moe_runtime.schedule.action import Kind, Overlap, Program, actions_of
from moe_runtime.schedule.products import Product, made_by, remote_needs

_Sample = tuple[float, float]  # computation, exchange
_Samples = dict[Kind, list[_Sample]]


def measured_costs(trace: Trace) -> Costs:
    """The costs of the trace's program, in seconds.

    Raises:
        ConfigError: an entry of the program is missing, twice there, or unknown.
    """
    timeline = timeline_of(trace)
    by_stage: list[_Samples] = [defaultdict(list) for _ in range(trace.program.num_stages)]
    together: _Samples = defaultdict(list)
    took: dict[tuple[int, int], list[float]] = defaultdict(list)
    for span in (span for row in timeline.rows for span in row):
        if isinstance(span.entry, Overlap):
            took[span.entry.forward.stage, span.entry.backward.stage].append(span.end - span.start)
            continue
        sample = (span.end - span.start - span.exposed, span.exposed)
        by_stage[span.entry.stage][span.entry.kind].append(sample)
        together[span.entry.kind].append(sample)
    live = trace.program.num_ranks / trace.program.num_stages
    costs = Costs(
        stages=tuple(_stage(own, together, live) for own in by_stage),
        transfer=median([*_transfers(trace, timeline)] or [0.0]),
        pairs={stages: median(times) for stages, times in took.items()},
    )
    return replace(costs, hidden=_hidden(costs))


def whole_model(costs: Costs, num_ranks: int) -> StageCosts:
    """The costs of one `num_ranks`-th of the model, from those of all its stages."""

    def share(name: str) -> float:
        return sum(getattr(stage, name) for stage in costs.stages) / num_ranks

    names = ("forward", "input_grad", "weight_grad", "forward_comm", "backward_comm")
    return StageCosts(*map(share, names))


def _stage(own: _Samples, together: _Samples, live: float) -> StageCosts:
    forward, forward_comm = _median(own[Kind.FORWARD] or together[Kind.FORWARD])
    backward = _backward(own) or _backward(together) or (forward, forward, forward_comm)
    input_grad, weight_grad, backward_comm = backward
    return StageCosts(forward, input_grad, weight_grad, forward_comm, backward_comm, live)


def _backward(samples: _Samples) -> tuple[float, float, float] | None:
    """Input gradient, weight gradient and exchange; None if no backward ran alone."""
    if samples[Kind.INPUT_GRAD] and samples[Kind.WEIGHT_GRAD]:
        input_grad, comm = _median(samples[Kind.INPUT_GRAD])
        return input_grad, _median(samples[Kind.WEIGHT_GRAD])[0], comm
    if samples[Kind.BACKWARD]:
        backward, comm = _median(samples[Kind.BACKWARD])
        return backward / 2, backward / 2, comm
    return None


def _median(samples: Sequence[_Sample]) -> _Sample:
    """The medians of both parts."""
    compute, comm = zip(*samples, strict=True)
    return median(compute), median(comm)


def _transfers(trace: Trace, timeline: Timeline) -> Iterator[float]:
    """Of every entry that another rank kept waiting: from what it waited for to its start."""
    lanes: dict[int, int] = defaultdict(int)
    program, copies = trace.program, defaultdict[int, list[tuple[int, tuple[Span, ...]]]](list)
    for (rank, _), row in zip(trace.by_pipeline_rank(), timeline.rows, strict=True):
        pp_rank = trace.pp_ranks[rank]
        copies[lanes[pp_rank]].append((pp_rank, row))  # a lane of data parallelism is a pipeline of its own
        lanes[pp_rank] += 1
    for pipeline in copies.values():
        made_at: dict[Product, float] = {}
        for _, row in pipeline:
            for span in row:
                made_at |= {product: span.end for a in actions_of(span.entry) if (product := made_by(a))}
        for pp_rank, row in pipeline:
            yield from _late_starts(program, pp_rank, row, made_at)


def _late_starts(
    program: Program, pp_rank: int, row: Sequence[Span], made_at: dict[Product, float]
) -> Iterator[float]:
    free = 0.0
    for span in row:
        needs = [made_at[need] for need in remote_needs(program, pp_rank, span.entry) if need in made_at]
        if needs and max(needs) > free:
            yield max(0.0, span.start - max(needs))
        free = span.end


def _hidden(costs: Costs) -> float:
    """What share of the exchange that they could hide the measured pairs hide; 1 where none could."""
    shares = []
    for (ahead, back), took in costs.pairs.items():
        forward, backward = costs.stages[ahead], costs.stages[back]
        compute = forward.forward + backward.input_grad + backward.weight_grad
        comm = forward.forward_comm + backward.backward_comm
        if min(compute, comm) > 0:
            shares.append((compute + comm - took) / min(compute, comm))
    return min(1.0, max(0.0, median(shares))) if shares else 1.0
