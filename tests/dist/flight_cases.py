"""What every rank of a gloo world runs to show that timing changes nothing.

Two microbatches and two directions are under way at once, waited for in several orders, with pauses
of random length on each rank between starting and waiting, while another thread of the caller uses the
default group for sums of its own.
"""

import copy
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from moe_comm.dispatcher import Dispatcher, Pending, Received
from moe_comm.pending import Started
from moe_comm.transport import Transport
from torch import Tensor

from tests.dist.exchange_cases import as_if_by_experts, expert_numbers, require_same_bits
from tests.dist.openings import Case, Setting, SharedGroups, run_each
from tests.dist.refusal_cases import raised
from tests.unit.comm.routings import Inputs, draw

PAUSE_S = 0.004


class Pauses:
    """Sleeps of random length; other on each rank."""

    def __init__(self, seed: int, rank: int) -> None:
        self._random = random.Random(1000 * seed + rank)

    def shuffled(self, names: list[str]) -> list[str]:
        """In an order of this rank's own."""
        return self._random.sample(names, len(names))

    def __call__(self) -> None:
        if self._random.random() < 0.5:
            time.sleep(self._random.random() * PAUSE_S)


@contextmanager
def default_group_in_use(rank: int, world_size: int) -> Iterator[list[str]]:
    """Another thread sums over the default group meanwhile; gives what went wrong there."""
    wrong: list[str] = []
    stop = torch.zeros(1)

    def work() -> None:
        step = 0
        while True:
            values = torch.cat((torch.full((64,), float(rank + step)), stop))
            dist.all_reduce(values)
            if float(values[0]) != sum(range(world_size)) + world_size * step:
                wrong.append(f"step {step}: {values[:3]}")
            if float(values[-1]) == world_size:  # all ranks have come to the end
                return
            step += 1
            time.sleep(PAUSE_S)  # leave the processor to the exchanges

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield wrong
    finally:
        stop.fill_(1.0)
        thread.join(timeout=30)
        assert not thread.is_alive(), "the sums of the other thread hang"


def _outputs(received: Received, dispatcher: Dispatcher) -> Tensor:
    return as_if_by_experts(received.rows, received.row_weights, expert_numbers(received, dispatcher))


def interleaved(
    dispatcher: Dispatcher, drawn: tuple[Inputs, Inputs], rank: int, seed: int
) -> dict[str, Tensor]:
    """The four operations of two microbatches, in one order on all ranks, waited for in any."""
    pause = Pauses(seed, rank)
    first, second = drawn
    under_way: dict[str, Pending] = {}
    under_way["dispatch 0"] = dispatcher.dispatch(*first.of(rank))
    pause()
    under_way["dispatch 1"] = dispatcher.dispatch(*second.of(rank))
    made = {}
    for name in pause.shuffled(["dispatch 0", "dispatch 1"]):
        pause()
        made[name] = under_way.pop(name).wait()
    zero, one = made["dispatch 0"], made["dispatch 1"]
    outputs = {name: _outputs(received, dispatcher) for name, received in made.items()}
    starts: dict[str, Callable[[], Pending]] = {
        "combine 0": lambda: dispatcher.combine(outputs["dispatch 0"], zero.handle),
        "backward of combine 1": lambda: dispatcher.combine_backward(second.tokens[rank], one.handle),
        "dispatch 0 again": lambda: dispatcher.dispatch(*first.of(rank)),
        "backward of dispatch 1": lambda: dispatcher.dispatch_backward(
            outputs["dispatch 1"], one.row_weights, one.handle
        ),
        "combine 1": lambda: dispatcher.combine(outputs["dispatch 1"], one.handle),
    }
    for name, start in starts.items():
        pause()
        under_way[name] = start()
    results = {}
    for name in pause.shuffled(list(under_way)):
        pause()
        results[name] = under_way[name].wait()
    d_tokens, d_weights = results.pop("backward of dispatch 1")
    again = results.pop("dispatch 0 again")
    return results | {
        "d_tokens": d_tokens,
        "d_weights": d_weights,
        "rows again": again.rows,
        "row weights again": again.row_weights,
        "rows 0": zero.rows,
        "rows 1": one.rows,
    }


def one_after_another(dispatcher: Dispatcher, drawn: tuple[Inputs, Inputs], rank: int) -> dict[str, Tensor]:
    """The same, each operation waited for at once."""
    results = {}
    for index, inputs in enumerate(drawn):
        received = dispatcher.dispatch(*inputs.of(rank)).wait()
        outputs = _outputs(received, dispatcher)
        results[f"rows {index}"] = received.rows
        results[f"combine {index}"] = dispatcher.combine(outputs, received.handle).wait()
        if index == 0:
            results |= {"rows again": received.rows, "row weights again": received.row_weights}
            continue
        d_rows = dispatcher.combine_backward(inputs.tokens[rank], received.handle)
        results["backward of combine 1"] = d_rows.wait()
        both = dispatcher.dispatch_backward(outputs, received.row_weights, received.handle)
        results["d_tokens"], results["d_weights"] = both.wait()
    return results


def timing_changes_no_bit(repetitions: int, wire: str, setting: Setting, groups: SharedGroups) -> None:
    """Same inputs, same bits, whatever the pauses, the order of the waits and the other thread."""
    rank, size = groups.rank, groups.size
    drawn = tuple(
        draw(p, size, dtype=torch.bfloat16, weight_dtype=torch.float32, hidden=40)
        for p in ("random", "unequal")
    )
    if setting.ranks_per_node != max(size // 2, 1):
        repetitions = 1 + repetitions // 4  # one layout of nodes with all of them is enough
    dispatcher = setting.but(wire=wire).open(drawn[0].num_experts, groups)
    expected = one_after_another(dispatcher, drawn, rank)
    with default_group_in_use(rank, size) as wrong:
        results = [interleaved(dispatcher, drawn, rank, seed) for seed in range(repetitions)]
    assert not wrong, wrong
    for got in results:
        assert got.keys() == expected.keys()
        require_same_bits(**{name: (got[name], expected[name]) for name in expected})


def a_handle_serves_again(setting: Setting, groups: SharedGroups) -> None:
    """Combines and backwards with an old handle give the same as the first ones."""
    drawn = draw("masked", groups.size, dtype=torch.float32, weight_dtype=torch.float32)
    dispatcher = setting.open(drawn.num_experts, groups)
    received = dispatcher.dispatch(*drawn.of(groups.rank)).wait()
    tokens, handle = drawn.tokens[groups.rank], received.handle
    results = []
    for _ in range(3):
        pending = (
            dispatcher.combine(received.rows, handle),
            dispatcher.combine_backward(tokens, handle),
            dispatcher.dispatch_backward(received.rows, received.row_weights, handle),
        )
        summed, d_rows, (d_tokens, d_weights) = (p.wait() for p in pending)
        results.append((summed, d_rows, d_tokens, d_weights))
    for again in results[1:]:
        require_same_bits(**{str(i): pair for i, pair in enumerate(zip(again, results[0], strict=True))})


def never_waited_for(setting: Setting, groups: SharedGroups) -> None:
    """Operations that nobody waits for take place all the same: later ones are right."""
    drawn = draw("unequal", groups.size, dtype=torch.float32, weight_dtype=torch.float32)
    dispatcher = setting.open(drawn.num_experts, groups)
    received = dispatcher.dispatch(*drawn.of(groups.rank)).wait()
    dispatcher.dispatch(*drawn.of(groups.rank))
    dispatcher.combine(received.rows, received.handle)
    got = dispatcher.dispatch(*drawn.of(groups.rank)).wait()
    require_same_bits(rows=(got.rows, received.rows), row_weights=(got.row_weights, received.row_weights))


def changed_before_the_wait(setting: Setting, groups: SharedGroups) -> None:
    """Who writes to an input before the wait is told; changed ids change nothing; the next one is right."""
    drawn = draw("random", groups.size, dtype=torch.float32, weight_dtype=torch.float32)
    dispatcher = setting.open(drawn.num_experts, groups)
    good = dispatcher.dispatch(*drawn.of(groups.rank)).wait()
    told: list[BaseException | None] = []
    for index in (0, 1):
        inputs = [tensor.clone() for tensor in drawn.of(groups.rank)]
        pending = dispatcher.dispatch(*inputs)
        inputs[index].add_(1)
        told.append(raised(pending.wait))
    pending = dispatcher.combine(good.rows, good.handle)
    good.rows.add_(0)
    told.append(raised(pending.wait))
    inputs = [tensor.clone() for tensor in drawn.of(groups.rank)]
    pending_again = dispatcher.dispatch(*inputs)
    inputs[2].fill_(0)
    again = pending_again.wait()
    assert all("changed in place" in str(error) for error in told), told
    require_same_bits(rows=(again.rows, good.rows), row_weights=(again.row_weights, good.row_weights))


def a_copy_of_a_layer_uses_the_same_dispatcher(setting: Setting, groups: SharedGroups) -> None:
    """A deep copy is the dispatcher itself."""
    dispatcher = setting.open(groups.size, groups)
    assert copy.deepcopy({"layer": dispatcher})["layer"] is dispatcher


class Paced:
    """Part of a transport whose exchanges end only when another part has begun as many less one.

    A dispatcher that takes all of one hop before it begins the next one is late at every exchange but the
    first.
    """

    def __init__(self, part: Transport) -> None:
        self._part = part
        self._begun = threading.Condition()
        self.started = 0
        self.follows: Paced | None = None
        self.late: list[int] = []
        self.size, self.rank, self.device = part.size, part.rank, part.device

    def all_to_all(self, send: Tensor, *splits: Any) -> Started[Tensor]:
        """See `Transport.all_to_all`."""
        pending = self._part.all_to_all(send, *splits)
        index, self.started = self.started, self.started + 1
        with self._begun:
            self._begun.notify_all()

        def finish() -> Tensor:
            other = self.follows
            if other is not None and not other.has_begun(index):
                self.late.append(index)
            return pending.wait()

        return Started(finish)

    def has_begun(self, number: int) -> bool:
        """Whether that many exchanges begin within the time that one may take."""
        with self._begun:
            return self._begun.wait_for(lambda: self.started >= number, timeout=2.0)


class PacedHops(SharedGroups):
    """A transport that paces its parts."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.parts: list[Paced] = []

    def split(self, ranks: Sequence[int]) -> Paced:  # type: ignore[override]
        """See `Transport.split`."""
        self.parts.append(Paced(self._transport.split(ranks)))
        return self.parts[-1]


def one_hop_begins_before_the_other_has_ended(setting: Setting, groups: SharedGroups) -> None:
    """Chunks of a dispatch are on the second hop while later ones are on the first; so on the way back."""
    if setting.kind == "alltoall":
        return
    drawn = draw("random", groups.size, dtype=torch.float32, weight_dtype=torch.float32)
    hops = PacedHops(groups)
    dispatcher = setting.but(chunks=3).open(drawn.num_experts, hops)
    far, near = hops.parts
    far.follows = near
    received = dispatcher.dispatch(*drawn.of(groups.rank)).wait()
    begun = far.started, near.started
    far.started, near.started, far.follows, near.follows = 0, 0, None, far
    dispatcher.combine(received.rows, received.handle).wait()
    assert begun == (far.started, near.started) == (3, 3)
    assert (far.late, near.late) == ([], [])


def all_cases(repetitions: int = 20) -> dict[str, Case]:
    """Every case by name; each runs with every setting."""
    return {
        "timing": partial(timing_changes_no_bit, repetitions, "auto"),
        "timing on the fp8 wire": partial(timing_changes_no_bit, max(repetitions // 6, 1), "fp8"),
        "handles": a_handle_serves_again,
        "never waited for": never_waited_for,
        "changed inputs": changed_before_the_wait,
        "deep copies": a_copy_of_a_layer_uses_the_same_dispatcher,
        "two hops at once": one_hop_begins_before_the_other_has_ended,
    }


def run_cases(rank: int, world_size: int, repetitions: int = 20) -> dict[str, str]:
    """Run every case; what failed on this rank, by case."""
    return run_each(all_cases(repetitions), world_size)
