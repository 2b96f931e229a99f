"""Passes: each takes a program and returns a new one. None edits in place, none invents an order.

    build -> lower (check, add_transfers, check) -> executor

`add_transfers` decides where messages are posted. Nothing below it has tags: the n-th send from rank
a to rank b meets the n-th receive that b posts for a. So the *sender* fixes the order, since it makes
the tensors when it makes them, and the receiver follows:

- a send stands right after the entry that makes its tensor; after an overlap, activation before
  gradient;
- a receive is posted `prefetch` computations ahead of the one that needs it, so that the bytes move
  while something else is computed, and earlier still where a later message of the same pair is
  needed first.

Under DualPipe one pair of ranks carries activations of one direction and gradients of the other, made
and needed in different orders; the second clause is what keeps that safe. Posting early cannot
deadlock: neither a send nor a receive ever blocks its rank, only a computation does, and what it
waits for is posted before it. What early posting costs is buffers, which `check` counts.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Entry, Kind, Program, actions_of
from moe_runtime.schedule.check import check
from moe_runtime.schedule.neighbours import Neighbours, neighbours_of, receive_that_meets


def lower(program: Program, prefetch: int = 1) -> Program:
    """What an executor runs: the program checked, with transfers added, and checked again.

    Raises:
        ScheduleError: the program is wrong, or has transfers already.
    """
    check(program)
    lowered = add_transfers(program, prefetch)
    check(lowered)
    return lowered


def add_transfers(program: Program, prefetch: int = 1) -> Program:
    """Add the sends and receives between stages on different ranks.

    Args:
        program: complete, and without transfers.
        prefetch: computations between posting a receive and the one that needs it, at least.

    Raises:
        ScheduleError: the program has transfers already, or `prefetch` is negative.
    """
    if program.has_transfers:
        raise ScheduleError(f"schedule {program.name}: transfers were added already; add them once")
    if prefetch < 0:
        raise ScheduleError(f"schedule {program.name}: prefetch must be 0 or more, got {prefetch}")
    neighbours = neighbours_of(program)
    messages = _messages(program, neighbours)
    rows = []
    for rank, row in enumerate(program.rows):
        posts = _posts(row, messages[rank], neighbours, prefetch)
        lowered: list[Entry] = []
        for position, entry in enumerate(row):
            lowered += [*posts[position], entry, *neighbours.sends_of(entry)]
        rows.append(tuple(lowered))
    return replace(program, rows=tuple(rows))


def _messages(program: Program, neighbours: Neighbours) -> list[dict[int, list[Action]]]:
    """Each rank's receives by their sender, in the sender's order: `messages[rank][sender]`."""
    messages: list[dict[int, list[Action]]] = [defaultdict(list) for _ in program.rows]
    for sender, row in enumerate(program.rows):
        for entry in row:
            for send in neighbours.sends_of(entry):
                rank = neighbours.peer_of(send)
                assert rank is not None, f"{send} is sent to another rank"
                messages[rank][sender].append(receive_that_meets(send))
    return messages


def _posts(
    row: tuple[Entry, ...], messages: dict[int, list[Action]], neighbours: Neighbours, prefetch: int
) -> dict[int, list[Action]]:
    """The receives to post before each entry of a row, in every sender's own order."""
    needed_at = {
        receive: position for position, entry in enumerate(row) for receive in neighbours.receives_for(entry)
    }
    posts: dict[int, list[Action]] = defaultdict(list)
    for sender in sorted(messages):
        latest = len(row)
        placed = []
        for receive in reversed(messages[sender]):
            latest = max(0, min(latest, needed_at[receive] - prefetch))
            placed.append((latest, receive))
        for position, receive in reversed(placed):
            posts[position].append(receive)
    return posts


def merge_weight_grads(program: Program) -> Program:
    """Undo deferral: every I becomes a full B at its own place, and every W disappears.

    The merged program computes the same gradients, so it is what a deferred run is compared with.
    """
    return replace(program, rows=tuple(tuple(_merged(row)) for row in program.rows))


def _merged(row: tuple[Entry, ...]) -> Iterator[Entry]:
    for entry in row:
        if isinstance(entry, Action) and entry.kind is Kind.INPUT_GRAD:
            yield entry._replace(kind=Kind.BACKWARD)
        elif not (isinstance(entry, Action) and entry.kind is Kind.WEIGHT_GRAD):
            yield entry


def split_backward(program: Program) -> Program:
    """Cut every B that stands alone into I and, right after it, W; overlaps keep theirs whole.

    Run it before `add_transfers`, which then sends the gradient between the two.
    """
    return replace(program, rows=tuple(tuple(_split(row)) for row in program.rows))


def _split(row: tuple[Entry, ...]) -> Iterator[Entry]:
    for entry in row:
        if isinstance(entry, Action) and entry.kind is Kind.BACKWARD:
            yield entry._replace(kind=Kind.INPUT_GRAD)
            yield entry._replace(kind=Kind.WEIGHT_GRAD)
        else:
            yield entry


def unpair(program: Program) -> Program:
    """Undo overlapping: every overlap becomes its F and, right after it, its B.

    The same work in the same order with nothing hidden: what overlapping is measured against. A lowered
    program keeps its transfers, so both sends of a pair still follow its backward; run it before
    `add_transfers` to send the activation as soon as it is made.
    """
    rows = (tuple(action for entry in row for action in actions_of(entry)) for row in program.rows)
    return replace(program, rows=tuple(rows))
