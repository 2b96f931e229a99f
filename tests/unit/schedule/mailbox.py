"""The slow oracle of checker and passes: runs a lowered program with mailboxes that know no tags.

The n-th message from a to b is handed to the n-th receive that b posts for a, whatever either means; a
computation then looks at what it was really given. Ranks advance in random order. With a capacity, a
send has to wait while so many messages before it lie there that nobody has asked for.
"""

import random
from collections import defaultdict

from moe_runtime.schedule import Action, Entry, Kind, Program
from moe_runtime.schedule.action import actions_of
from moe_runtime.schedule.products import Product, carried_by, made_by, needed_by


class Wrong(Exception):
    """The program did something that a real run would get wrong."""


class Mailboxes:
    """All ranks of a program in one place; `run` is true if every gradient came out once and right."""

    def __init__(self, program: Program, capacity: int | None = None) -> None:
        self.program = program
        self.capacity = capacity
        self.at = [0] * program.num_ranks
        self.sent: dict[tuple[int, int], list[Product]] = defaultdict(list)
        self.asked: dict[tuple[int, int], list[Product]] = defaultdict(list)
        self.made: list[set[Product]] = [set() for _ in program.rows]
        self.done: dict[str, int] = defaultdict(int)

    def run(self, rng: random.Random) -> bool:
        ranks = list(range(self.program.num_ranks))
        moved = True
        try:
            while moved:
                rng.shuffle(ranks)
                moved = any(self.step(rank) for rank in ranks)
        except Wrong:
            return False
        return self.complete()

    def step(self, rank: int) -> bool:
        row = self.program.rows[rank]
        if self.at[rank] == len(row) or not self.ready(rank, row[self.at[rank]]):
            return False
        for action in actions_of(row[self.at[rank]]):
            self.act(rank, action)
        self.at[rank] += 1
        return True

    def ready(self, rank: int, entry: Entry) -> bool:
        if isinstance(entry, Action) and entry.kind.is_send and self.capacity is not None:
            pair = rank, self.program.peer_of(entry)
            return len(self.sent[pair]) - len(self.asked[pair]) < self.capacity
        inputs = [self.has_input(rank, action) for action in actions_of(entry)]
        return all(self.has_past(action) for action in actions_of(entry)) and all(inputs)

    def has_past(self, action: Action) -> bool:
        """An action whose own past is missing fails at once: nobody else can bring it about."""
        before = {Kind.BACKWARD: "F", Kind.INPUT_GRAD: "F", Kind.WEIGHT_GRAD: "I"}.get(action.kind)
        if before and not self.done[f"{before}{action.stage},{action.microbatch},{action.direction}"]:
            raise Wrong
        return True

    def has_input(self, rank: int, action: Action) -> bool:
        need = None if action.kind.is_transfer else needed_by(action, self.program.num_stages)
        if need is None or need in self.made[rank]:
            return True
        source = self.program.placement[need.direction][need.stage]
        if source == rank or need not in self.asked[source, rank]:
            raise Wrong
        turn = self.asked[source, rank].index(need)
        if turn >= len(self.sent[source, rank]):
            return False
        if self.sent[source, rank][turn] != need:
            raise Wrong
        return True

    def act(self, rank: int, action: Action) -> None:
        if action.kind.is_transfer:
            product, peer = carried_by(action), self.program.peer_of(action)
            if action.kind.is_send and product not in self.made[rank]:
                raise Wrong
            box = self.sent[rank, peer] if action.kind.is_send else self.asked[peer, rank]
            box.append(product)
            return
        self.done[f"{action.kind.value}{action.stage},{action.microbatch},{action.direction}"] += 1
        product = made_by(action)
        if product is not None:
            self.made[rank].add(product)

    def complete(self) -> bool:
        keys = [
            f"{stage},{microbatch},{direction}"
            for direction in range(self.program.num_directions)
            for stage in range(self.program.num_stages)
            for microbatch in range(self.program.microbatches_per_direction)
        ]
        for key in keys:
            counts = [self.done[f"{kind}{key}"] for kind in "FBIW"]
            if counts not in ([1, 1, 0, 0], [1, 0, 1, 1]):
                return False
        ended = all(at == len(row) for at, row in zip(self.at, self.program.rows, strict=True))
        return ended and all(self.sent[pair] == self.asked[pair] for pair in {*self.sent, *self.asked})
