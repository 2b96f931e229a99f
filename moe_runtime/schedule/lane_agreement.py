"""Do all lanes of a pipeline rank meet the same collectives in the same order?

The ranks of an expert-parallel group are data-parallel lanes of one pipeline rank. Each walks its own
copy of the rank's row, and every F, B, I and overlap in it exchanges tokens with the other lanes: a
forward dispatches and combines in each of its blocks, a backward does the same in reverse, and for an
overlap a fixed table says how the two alternate. So what a lane exchanges, and in which order, is a
function of the sequence of these entries, whatever stands between them: W exchanges nothing, transfers
concern other ranks, and I exchanges what B does.

Lanes that build from the same name and sizes have equal rows and nothing to compare. Lanes whose
programs come from files, or from settings read on each host, may differ, and then hang or mix up
tokens; comparing their programs beforehand says where.
"""

from collections.abc import Sequence
from itertools import zip_longest

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Entry, Kind, Program, where


def collectives_of(program: Program, rank: int) -> tuple[str, ...]:
    """The entries of a rank that exchange tokens with its lanes, in order, an I written as the B it is."""
    return tuple(_exchange(entry) for _, entry in _exchanging(program, rank))


def check_lanes(lanes: Sequence[Program]) -> None:
    """Check that every pipeline rank meets the same collectives in all lanes.

    Args:
        lanes: the program of each lane of an expert-parallel group; at least one.

    Raises:
        ScheduleError: names the lane, and the rank, entry and action at which it departs from lane 0.
    """
    for lane, program in enumerate(lanes):
        if program.num_ranks != lanes[0].num_ranks:
            got = f"lane {lane} has {program.num_ranks} pipeline ranks"
            raise ScheduleError(f"schedule {program.name}: {got}; expected {lanes[0].num_ranks}, as lane 0")
        for rank in range(program.num_ranks):
            if collectives_of(program, rank) != collectives_of(lanes[0], rank):
                raise ScheduleError(_first_difference(lanes[0], program, lane, rank))


def _first_difference(first: Program, other: Program, lane: int, rank: int) -> str:
    ends = zip_longest(_exchanging(first, rank), _exchanging(other, rank))
    for one, two in ends:
        if one is None or two is None or _exchange(one[1]) != _exchange(two[1]):
            places = ["nothing more" if at is None else where(rank, *at) for at in (one, two)]
            return f"lane {lane}: {places[1]} meets {places[0]} of lane 0; lanes must exchange in one order"
    raise AssertionError(f"the rows of rank {rank} exchange the same")


def _exchanging(program: Program, rank: int) -> list[tuple[int, Entry]]:
    return [(at, entry) for at, entry in enumerate(program.rows[rank]) if _exchanges(entry)]


def _exchanges(entry: Entry) -> bool:
    return not isinstance(entry, Action) or entry.kind.makes_activation or entry.kind.makes_gradient


def _exchange(entry: Entry) -> str:
    if isinstance(entry, Action) and entry.kind is Kind.INPUT_GRAD:
        return str(entry._replace(kind=Kind.BACKWARD))
    return str(entry)
