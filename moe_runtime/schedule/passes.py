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
from moe_runtime.schedule.products import Product, holder_of, made_by, receive_of, remote_needs, user_of


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
    rows = []
    for rank, row in enumerate(program.rows):
        receives = _receives(program, rank, prefetch)
        lowered: list[Entry] = []
        for position, entry in enumerate(row):
            lowered += [*receives[position], entry, *_sends(program, rank, entry)]
        rows.append(tuple(lowered))
    return replace(program, rows=tuple(rows))


def _sends(program: Program, rank: int, entry: Entry) -> list[Action]:
    """The sends that follow an entry, activation first."""
    sends = []
    for product in map(made_by, actions_of(entry)):
        user = None if product is None else user_of(program, product)
        if product is not None and user is not None and user != rank:
            kind = Kind.SEND_GRAD if product.is_gradient else Kind.SEND_ACT
            sends.append(Action(kind, product.stage, product.microbatch, product.direction))
    return sends


def _receives(program: Program, rank: int, prefetch: int) -> dict[int, list[Action]]:
    """The receives to post before each entry of a rank, in every sender's own order."""
    needed_at: dict[Product, int] = {}
    for position, entry in enumerate(program.rows[rank]):
        needed_at.update(dict.fromkeys(remote_needs(program, rank, entry), position))
    posts: dict[int, list[Action]] = defaultdict(list)
    for source in sorted({holder_of(program, product) for product in needed_at}):
        made = [made_by(action) for entry in program.rows[source] for action in actions_of(entry)]
        messages = [product for product in made if product in needed_at]
        latest = len(program.rows[rank])
        placed = []
        for product in reversed(messages):
            latest = max(0, min(latest, needed_at[product] - prefetch))
            placed.append((latest, receive_of(product)))
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
            yield replace(entry, kind=Kind.BACKWARD)
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
            yield replace(entry, kind=Kind.INPUT_GRAD)
            yield replace(entry, kind=Kind.WEIGHT_GRAD)
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
