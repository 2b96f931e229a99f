"""Every computation exactly once, where its stage is; every transfer once, or none at all.

What has been done with a (stage, microbatch, direction) is a set of kinds, kept as the sum of their
bits: a program of half a million actions is gone through by adding bits, and the reason why a sum is
wrong is only looked for once it is.
"""

from typing import NoReturn

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program, actions_of, where
from moe_runtime.schedule.neighbours import neighbours_of

_EVERYTHING = -1  # the sum with all bits set: nothing may be added to it
_Key = tuple[int, ...]  # stage, microbatch, direction


def check_completeness(program: Program) -> None:
    """Check that all work is in the program, once, on the right ranks.

    Raises:
        ScheduleError: names the rank, entry and action that is wrong, or the rank and the action that
            is missing.
    """
    rows = [_done(program, rank) for rank in range(program.num_ranks)]
    lowered = program.has_transfers
    for rank, done in enumerate(rows):
        wholes = _wholes(program, rank, lowered)
        for key, kinds in done.items():
            if kinds not in wholes[key[0], key[2]]:
                _explain(program, rank, key, kinds)


def _done(program: Program, rank: int) -> dict[_Key, int]:
    """The kinds that a row does with everything that is for it to do, each once."""
    microbatches = range(program.microbatches_per_direction)
    done: dict[_Key, int] = {
        (stage, microbatch, direction): 0
        for direction, stage in program.stages_of(rank)
        for microbatch in microbatches
    }
    for position, entry in enumerate(program.rows[rank]):
        if isinstance(entry, Overlap):
            _check_pair(rank, position, entry)
        for action in actions_of(entry):
            key, bit = action[1:], action.kind.bit
            kinds = done.get(key, _EVERYTHING)
            if kinds & bit:
                raise ScheduleError(f"{where(rank, position, entry)}: {_problem(program, rank, action)}")
            done[key] = kinds | bit
    return done


def _check_pair(rank: int, position: int, pair: Overlap) -> None:
    if (pair.forward.kind, pair.backward.kind) != (Kind.FORWARD, Kind.BACKWARD):
        raise ScheduleError(f"{where(rank, position, pair)}: an overlap joins an F and a B, in this order")


def _problem(program: Program, rank: int, action: Action) -> str:
    """Why an action cannot be in this rank's row, or not again."""
    bounds = (
        ("direction", action.direction, program.num_directions),
        ("stage", action.stage, program.num_stages),
        ("microbatch", action.microbatch, program.microbatches_per_direction),
    )
    for what, value, count in bounds:
        if not 0 <= value < count:
            return f"{what} {value} of {action}; expected 0 to {count - 1}"
    holder = program.placement[action.direction][action.stage]
    if holder != rank:
        return f"stage {action.stage} of direction {action.direction} is on rank {holder}, not here"
    return f"{action} was done already, at {_place(program, rank, action)}"


def _wholes(program: Program, rank: int, lowered: bool) -> dict[tuple[int, int], tuple[int, int]]:
    """For each (stage, direction) of a rank the two sums that are whole: with a B, with I and W."""
    neighbours = neighbours_of(program)
    wholes = {}
    for direction, stage in program.stages_of(rank):
        transfers = sum(
            kind.bit
            for kind in Kind
            if lowered
            and kind.is_transfer
            and neighbours.peer_of(Action(kind, stage, 0, direction)) is not None
        )
        full = Kind.FORWARD.bit + Kind.BACKWARD.bit
        split = Kind.FORWARD.bit + Kind.INPUT_GRAD.bit + Kind.WEIGHT_GRAD.bit
        wholes[stage, direction] = (transfers + full, transfers + split)
    return wholes


def _explain(program: Program, rank: int, key: _Key, kinds: int) -> NoReturn:
    """Name what is missing or too much of a (stage, microbatch, direction)."""
    stage, microbatch, direction = key
    actions = {kind: Action(kind, stage, microbatch, direction) for kind in Kind}
    forward, full = actions[Kind.FORWARD], actions[Kind.BACKWARD]
    inputs, weights = actions[Kind.INPUT_GRAD], actions[Kind.WEIGHT_GRAD]
    found = {action for kind, action in actions.items() if kinds & kind.bit}
    if forward not in found:
        raise ScheduleError(f"rank {rank}: {forward} is missing")
    if full in found and (inputs in found or weights in found):
        again = _place(program, rank, inputs if inputs in found else weights)
        raise ScheduleError(f"{_place(program, rank, full)}: part of it is done again, at {again}")
    if full not in found and inputs not in found:
        raise ScheduleError(f"rank {rank}: {full}, or {inputs} and {weights}, is missing")
    if inputs in found and weights not in found:
        raise ScheduleError(f"{_place(program, rank, inputs)}: its {weights} is missing")
    neighbours = neighbours_of(program)
    for transfer in (action for kind, action in actions.items() if kind.is_transfer):
        if transfer not in found and neighbours.peer_of(transfer) is not None:
            raise ScheduleError(f"rank {rank}: {transfer} is missing")
        if transfer in found and neighbours.peer_of(transfer) is None:
            place = _place(program, rank, transfer)
            raise ScheduleError(f"{place}: {transfer} has no other rank to exchange with")
    raise AssertionError(f"nothing is wrong with {key}, kinds {kinds:b}")


def _place(program: Program, rank: int, action: Action) -> str:
    """Where an action of a rank stands first."""
    entries: enumerate[Entry] = enumerate(program.rows[rank])
    return next(where(rank, position, entry) for position, entry in entries if action in actions_of(entry))
