"""Every way we know to spoil a valid program, so that nothing spoilt is valid by accident.

A fault lists all its `Edit`s of a program. Why each is wrong whatever the program stands beside it;
what is right in spite of an edit (two forwards swapped, say) is never made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from moe_runtime import schedule
from moe_runtime.schedule import Action, Entry, Kind, Overlap, Program
from moe_runtime.schedule.action import actions_of, is_transfer

TRANSFERS = [kind for kind in Kind if kind.is_transfer]


@dataclass(frozen=True)
class Edit:
    """One spoilt program.

    Args:
        names: what the error has to say, all of it.
    """

    program: Program
    names: tuple[str, ...]


Fault = Callable[[Program], Iterator[Edit]]


def with_row(program: Program, rank: int, row: list[Entry]) -> Program:
    return replace(program, rows=(*program.rows[:rank], tuple(row), *program.rows[rank + 1 :]))


def places(program: Program) -> Iterator[tuple[int, int, Entry]]:
    for rank, row in enumerate(program.rows):
        for position, entry in enumerate(row):
            yield rank, position, entry


def action_at(program: Program, rank: int) -> dict[Action, int]:
    return {action: at for at, entry in enumerate(program.rows[rank]) for action in actions_of(entry)}


def dropped(program: Program) -> Iterator[Edit]:
    """Everything in a program has to be done."""
    for rank, at, entry in places(program):
        row = list(program.rows[rank])
        missing = [] if isinstance(entry, Overlap) else [str(entry)]  # of two, the lower stage is named
        names = (f"rank {rank}", *missing, "missing")
        yield Edit(with_row(program, rank, row[:at] + row[at + 1 :]), names)


def doubled(program: Program) -> Iterator[Edit]:
    """And done once."""
    for rank, at, entry in places(program):
        row = list(program.rows[rank])
        names = (f"rank {rank}, entry {at + 1} ({entry})", "was done already")
        yield Edit(with_row(program, rank, [*row[: at + 1], *row[at:]]), names)


def on_another_rank(program: Program) -> Iterator[Edit]:
    """A stage of a direction is on one rank."""
    for rank, at, entry in places(program):
        for other in {(rank + 1) % program.num_ranks, (rank - 1) % program.num_ranks} - {rank}:
            row = list(program.rows[rank])
            moved = with_row(program, rank, row[:at] + row[at + 1 :])
            moved = with_row(moved, other, [*program.rows[other][:at], entry, *program.rows[other][at:]])
            yield Edit(moved, (f"rank {other}, entry", f"({entry})", f"is on rank {rank}, not here"))


def with_action(entry: Entry, old: Action, new: Action) -> Entry:
    if isinstance(entry, Overlap):
        first, second = (new if part is old else part for part in actions_of(entry))
        return Overlap(first, second)
    return new


def out_of_range(program: Program) -> Iterator[Edit]:
    """Stages, microbatches and directions are numbered from 0."""
    bounds = {
        "stage": program.num_stages,
        "microbatch": program.microbatches_per_direction,
        "direction": program.num_directions,
    }
    for rank, at, entry in places(program):
        for action in actions_of(entry):
            for what, bound in bounds.items():
                for value in (-1, bound):
                    row = list(program.rows[rank])
                    row[at] = with_action(entry, action, action._replace(**{what: value}))
                    names = (f"rank {rank}, entry {at} ({row[at]})", f"{what} {value} of ", "expected 0 to")
                    yield Edit(with_row(program, rank, row), names)


def of_another_kind(program: Program) -> Iterator[Edit]:
    """Then its own kind is missing; among these, a B that becomes an I without its W."""
    for rank, at, entry in places(program):
        for action in actions_of(entry):
            for kind in Kind:
                if kind is not action.kind and (not kind.is_transfer or program.has_transfers):
                    row = list(program.rows[rank])
                    row[at] = with_action(entry, action, action._replace(kind=kind))
                    yield Edit(with_row(program, rank, row), (f"rank {rank}",))


def joined(program: Program) -> Iterator[Edit]:
    """An overlap is an F with a B, and not the B of that very F."""
    for rank, row in enumerate(program.rows):
        for at, (first, second) in enumerate(pairwise(row)):
            if not isinstance(first, Action) or not isinstance(second, Action):
                continue
            names = [f"rank {rank}, entry {at} ({first}+{second})"]
            if (first.kind, second.kind) != (Kind.FORWARD, Kind.BACKWARD):
                names.append("an overlap joins an F and a B")
            elif first[1:] == second[1:]:
                names.append(f"{second} comes before its F")
            else:
                continue
            pair = Overlap(first, second)
            yield Edit(with_row(program, rank, [*row[:at], pair, *row[at + 2 :]]), tuple(names))


def dependent(program: Program) -> Iterator[tuple[int, int, int, str]]:
    """(rank, earlier, later, reason): entries of a rank of which the later one needs the earlier one."""
    needs = {
        Kind.BACKWARD: {Kind.FORWARD: "before its F", Kind.RECV_GRAD: "before the receive"},
        Kind.INPUT_GRAD: {Kind.FORWARD: "before its F", Kind.RECV_GRAD: "before the receive"},
        Kind.WEIGHT_GRAD: {Kind.INPUT_GRAD: "before its I"},
        Kind.FORWARD: {Kind.RECV_ACT: "before the receive"},
        Kind.SEND_ACT: {Kind.FORWARD: "before it is made"},
        Kind.SEND_GRAD: {Kind.BACKWARD: "before it is made", Kind.INPUT_GRAD: "before it is made"},
    }
    for rank in range(program.num_ranks):
        at = action_at(program, rank)
        for action, later in at.items():
            for kind, reason in needs.get(action.kind, {}).items():
                earlier = at.get(action._replace(kind=kind))
                if earlier is not None:
                    yield rank, earlier, later, reason


def swapped_with_what_it_needs(program: Program) -> Iterator[Edit]:
    """Nothing can be used before it is there."""
    for rank, earlier, later, _ in dependent(program):
        row = list(program.rows[rank])
        row[earlier], row[later] = row[later], row[earlier]
        yield Edit(with_row(program, rank, row), (f"rank {rank}, entry ", "before"))


def moved_before_what_it_needs(program: Program) -> Iterator[Edit]:
    """The same by moving one entry: a W before its I, a B before its F, a send before its tensor ..."""
    for rank, earlier, later, reason in dependent(program):
        row = list(program.rows[rank])
        entry = row.pop(later)
        row.insert(earlier, entry)
        reason = "before" if isinstance(entry, Overlap) else reason  # the other half may be named first
        yield Edit(with_row(program, rank, row), (f"rank {rank}, entry {earlier} ({entry})", reason))


def swapped_messages(program: Program, is_send: bool) -> Iterator[Edit]:
    for rank, row in enumerate(program.rows):
        mine = [
            (at, program.peer_of(entry))
            for at, entry in enumerate(row)
            if isinstance(entry, Action) and is_transfer(entry) and entry.kind.is_send == is_send
        ]
        for (first, peer), (second, other) in combinations(mine, 2):
            if peer == other:
                changed = list(row)
                changed[first], changed[second] = row[second], row[first]
                yield Edit(with_row(program, rank, changed), ("rank ", ", entry "))


def swapped_sends(program: Program) -> Iterator[Edit]:
    """Without tags the n-th send of a pair of ranks meets the n-th receive."""
    return swapped_messages(program, is_send=True)


def swapped_receives(program: Program) -> Iterator[Edit]:
    """As for sends."""
    return swapped_messages(program, is_send=False)


def misplaced(program: Program) -> Iterator[Edit]:
    """The placement says where every stage is, and rows have to agree."""
    for direction, holders in enumerate(program.placement):
        for first, second in combinations(range(len(holders)), 2):
            if holders[first] != holders[second]:
                ranks = list(holders)
                ranks[first], ranks[second] = holders[second], holders[first]
                yield Edit(with_placement(program, direction, ranks), ("rank ", ", entry ", "not here"))
        for value in (-1, program.num_ranks):
            name = f"stage 0 of direction {direction} is placed on rank {value}"
            yield Edit(with_placement(program, direction, [value, *holders[1:]]), (name, "expected one of"))


def with_placement(program: Program, direction: int, ranks: list[int]) -> Program:
    placement = list(program.placement)
    placement[direction] = tuple(ranks)
    return replace(program, placement=tuple(placement))


def circular(program: Program) -> Iterator[Edit]:
    """A backward put ahead of a forward that its own gradient comes back from only after.

    Rank a moves the backward of m ahead of its forward of n; rank b, which holds the next stage, does
    the forward of n, and so waits for a, before the backward of m that a now waits for.
    """
    bare = replace(program, rows=tuple(tuple(e for e in row if not is_transfer(e)) for row in program.rows))
    at = [action_at(bare, rank) for rank in range(bare.num_ranks)]
    for a, position, entry in places(bare):
        if not isinstance(entry, Action) or not entry.kind.makes_gradient:
            continue
        holders = bare.placement[entry.direction]
        if entry.stage + 1 == bare.num_stages or (b := holders[entry.stage + 1]) == a:
            continue
        above = entry._replace(stage=entry.stage + 1)
        back = min(at[b].get(above._replace(kind=kind), 10**6) for kind in (Kind.BACKWARD, Kind.INPUT_GRAD))
        for n in range(bare.microbatches_per_direction):
            forward = entry._replace(kind=Kind.FORWARD, microbatch=n)
            own = at[a][entry._replace(kind=Kind.FORWARD)]
            if own < at[a][forward] < position and at[b][forward._replace(stage=above.stage)] < back:
                row = list(bare.rows[a])
                row.insert(at[a][forward], row.pop(position))
                spoilt = with_row(bare, a, row)
                spoilt = schedule.add_transfers(spoilt) if program.has_transfers else spoilt
                yield Edit(
                    spoilt, ("deadlock: ", f"({entry}) waits for", f"from rank {b}", f"rank {b}, entry")
                )


FAULTS: list[Fault] = [
    dropped,
    doubled,
    on_another_rank,
    out_of_range,
    of_another_kind,
    joined,
    swapped_with_what_it_needs,
    moved_before_what_it_needs,
    swapped_sends,
    swapped_receives,
    misplaced,
    circular,
]
