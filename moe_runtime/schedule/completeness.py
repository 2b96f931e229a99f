"""Every computation exactly once, where its stage is; every transfer once, or none at all."""

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program, actions_of, where

_Seen = dict[Action, tuple[int, int, Entry]]


def check_completeness(program: Program) -> None:
    """Check that all work is in the program, once, on the right ranks.

    Raises:
        ScheduleError: names the rank, entry and action that is wrong, or the action that is missing.
    """
    seen: _Seen = {}
    for rank, row in enumerate(program.rows):
        for position, entry in enumerate(row):
            for action in actions_of(entry):
                problem = _problem(program, rank, entry, action)
                if action in seen:
                    problem = f"{action} was done already, at {where(*seen[action])}"
                if problem is not None:
                    raise ScheduleError(f"{where(rank, position, entry)}: {problem}")
                seen[action] = (rank, position, entry)
    for action in _computations(program):
        _check_present(action, seen)
    if program.has_transfers:
        for transfer in _transfers(program):
            if transfer not in seen:
                holder = program.placement[transfer.direction][transfer.stage]
                raise ScheduleError(f"rank {holder}: {transfer} is missing")


def _problem(program: Program, rank: int, entry: Entry, action: Action) -> str | None:
    """Why the action cannot be in this rank's row at all; None if it can."""
    pair = tuple(part.kind for part in actions_of(entry))
    if isinstance(entry, Overlap) and pair != (Kind.FORWARD, Kind.BACKWARD):
        return "an overlap joins an F and a B, in this order"
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
    if action.kind.is_transfer and not _crosses_ranks(program, action):
        return f"{action} has no other rank to exchange with"
    return None


def _crosses_ranks(program: Program, transfer: Action) -> bool:
    neighbour = transfer.stage + (1 if transfer.kind in (Kind.SEND_ACT, Kind.RECV_GRAD) else -1)
    holders = program.placement[transfer.direction]
    return 0 <= neighbour < program.num_stages and holders[neighbour] != holders[transfer.stage]


def _computations(program: Program) -> list[Action]:
    """The forward of everything that has to be computed."""
    return [
        Action(Kind.FORWARD, stage, microbatch, direction)
        for direction in range(program.num_directions)
        for stage in range(program.num_stages)
        for microbatch in range(program.microbatches_per_direction)
    ]


def _check_present(forward: Action, seen: _Seen) -> None:
    full, inputs, weights = (
        Action(kind, forward.stage, forward.microbatch, forward.direction)
        for kind in (Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
    )
    if forward not in seen:
        raise ScheduleError(f"{forward} is missing on every rank")
    if full in seen and (inputs in seen or weights in seen):
        other = inputs if inputs in seen else weights
        raise ScheduleError(f"{where(*seen[full])}: part of it is done again, at {where(*seen[other])}")
    if full not in seen and inputs not in seen:
        raise ScheduleError(f"{full}, or {inputs} and {weights}, is missing on every rank")
    if inputs in seen and weights not in seen:
        raise ScheduleError(f"{where(*seen[inputs])}: its {weights} is missing")


def _transfers(program: Program) -> list[Action]:
    """Every transfer that a lowered program must have."""
    return [
        transfer
        for forward in _computations(program)
        for kind in Kind
        if kind.is_transfer
        for transfer in [Action(kind, forward.stage, forward.microbatch, forward.direction)]
        if _crosses_ranks(program, transfer)
    ]
