"""Proves a program right before anything runs it.

Five questions, from the plainest to the subtlest; the first that fails is reported with rank, entry
and action:

1. shape: does every stage have a rank, and do M and the directions fit?          (this file)
2. completeness: is everything done exactly once, by the rank that holds the stage? (completeness.py)
3. order: does each rank, on its own, use only what it has?                        (order.py)
4. matching: without tags, does each receive get the message that it means?        (matching.py)
5. progress: do all ranks reach their end, whatever their speeds?                  (progress.py)

A program is checked in either form. Before transfers are added, a computation is taken to see what its
neighbour has made as soon as it is made; afterwards only through a matched send and receive.

Collectives inside an entry (the dispatch and combine of an expert-parallel group) are met by the lanes
of one pipeline rank, each walking its copy of the rank's row in order. They match if the copies exchange
the same in the same order. That is a question about several copies of a program, not about one, and
`lane_agreement.py` answers it. Nor can collectives and messages block each other in a ring: joining the
lanes' copies of an entry into one node gives the graph of a single lane again, which has no ring. Both
arguments fall as soon as a reader of a program reorders a row by what happens to be ready; none may.
"""

from dataclasses import dataclass

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.completeness import check_completeness
from moe_runtime.schedule.matching import check_matching
from moe_runtime.schedule.neighbours import neighbours_of
from moe_runtime.schedule.order import walk_row
from moe_runtime.schedule.progress import check_progress

_FEW = 10_000


@dataclass(frozen=True, slots=True)
class Report:
    """What a correct program costs, one number per pipeline rank.

    Args:
        peak_live: most (stage, microbatch) activations alive at once: from F to the end of B or W.
        peak_pending_weight_grads: most I at once whose W is still to come.
        peak_posted_receives: most receives posted at once whose tensor has not been used yet.
        peak_unmatched_sends: most sends at once whose receive may not have been posted yet, with all
            other ranks as slow as their dependencies allow.
        stages_held: different stages on the rank; its share of the parameters is this over all stages.
    """

    peak_live: tuple[int, ...]
    peak_pending_weight_grads: tuple[int, ...]
    peak_posted_receives: tuple[int, ...]
    peak_unmatched_sends: tuple[int, ...]
    stages_held: tuple[int, ...]


def check(program: Program, max_unmatched: int | None = None) -> Report:
    """Prove a program complete, ordered, matched and free of deadlock.

    Args:
        max_unmatched: N, the buffers of a transport: of the sends of one ordered pair of ranks N may wait
            for their receive, and the next blocks its rank until it is among them; 0 is a rendezvous.
            None, as for the transports we run on: sends never block.

    Raises:
        ScheduleError: it is not; names rank, entry and action, or each blocked rank's entry.
    """
    _check_shape(program)
    check_completeness(program)
    if max_unmatched is not None and max_unmatched < 0:
        raise ScheduleError(f"schedule {program.name}: max_unmatched must be 0 or more, got {max_unmatched}")
    lowered, neighbours = program.has_transfers, neighbours_of(program)
    peaks = [walk_row(program, rank, lowered, neighbours) for rank in range(program.num_ranks)]
    channels = check_matching(program)
    return Report(
        peak_live=tuple(peak.live for peak in peaks),
        peak_pending_weight_grads=tuple(peak.pending for peak in peaks),
        peak_posted_receives=tuple(peak.posted for peak in peaks),
        peak_unmatched_sends=check_progress(program, channels, max_unmatched),
        stages_held=tuple(len(stages) for stages in _stages_held(program)),
    )


def _stages_held(program: Program) -> list[set[int]]:
    """The different stages of each rank: with two directions it may hold one of them twice."""
    return [{stage for _, stage in program.stages_of(rank)} for rank in range(program.num_ranks)]


def _check_shape(program: Program) -> None:
    name, ranks = program.name, program.num_ranks
    if len(program.placement) not in (1, 2):
        raise ScheduleError(f"schedule {name}: expected 1 or 2 directions, got {len(program.placement)}")
    for direction, holders in enumerate(program.placement):
        if not holders or len(holders) != program.num_stages:
            sizes = " and ".join(str(len(each)) for each in program.placement)
            raise ScheduleError(f"schedule {name}: expected the same stages in each direction, got {sizes}")
        for stage, holder in enumerate(holders):
            if not 0 <= holder < ranks:
                what = f"stage {stage} of direction {direction} is placed on rank {holder}"
                raise ScheduleError(f"schedule {name}: {what}; expected one of the {ranks} rows")
    if program.num_microbatches < 1 or program.num_microbatches % program.num_directions:
        expected = f"a positive multiple of {program.num_directions} microbatches"
        raise ScheduleError(f"schedule {name}: expected {expected}, got {program.num_microbatches}")
    entries, forwards = sum(map(len, program.rows)), program.num_microbatches * program.num_stages
    if forwards > max(entries, _FEW):  # before anything as long as M is made
        raise ScheduleError(f"schedule {name}: expected {forwards} forwards, got {entries} entries in all")
