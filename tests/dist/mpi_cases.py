"""What ranks run to show that `MpiTransport` keeps the promises of `Transport`.

A case is `case(transport)` and raises where a promise is broken; each compares with blocks that every
rank can draw for itself. Exchanges come before comparisons, so that a failure leaves no rank waiting.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import torch
from moe_comm.errors import CommError, PlacementError, TransportError
from moe_comm.mpi_progress import Exchange
from moe_comm.transport import Transport
from moe_comm.transport_mpi import MpiTransport
from moe_comm.transport_torch import TorchTransport
from torch import Tensor

# Rows that rank s sends to rank d.
PATTERNS: dict[str, Callable[[int, int], int]] = {
    "even": lambda s, d: 3,
    "uneven": lambda s, d: (7 * s + 3 * d + 1) % 5,
    "idle rank": lambda s, d: 0 if 1 in (s, d) else 2 + s,
    "all to rank 0": lambda s, d: 4 + s if d == 0 else 0,
    "nothing": lambda s, d: 0,
    "long": lambda s, d: 2_000 * (s + 1) + d,
}
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64)
WIDTHS: tuple[tuple[int, ...], ...] = ((5,), (), (2, 3), (0,))
MEBIBYTE = 2**20


def block(source: int, target: int, rows: int, width: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What `source` sends to `target`: random bits [rows, *width]."""
    generator = torch.Generator().manual_seed(1000 * source + target)
    num_bytes = torch.Size((rows, *width)).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(rows, *width)


def start(
    transport: Transport, rows: Callable[[int, int], int], width: Sequence[int], dtype: torch.dtype
) -> tuple[object, Tensor]:
    """Start one exchange; gives it and what this rank shall receive."""
    here, ranks = transport.rank, range(transport.size)
    send = torch.cat([block(here, d, rows(here, d), width, dtype) for d in ranks])
    pending = transport.all_to_all(send, [rows(here, d) for d in ranks], [rows(s, here) for s in ranks])
    return pending, torch.cat([block(s, here, rows(s, here), width, dtype) for s in ranks])


def require_same_bits(got: Tensor, expected: Tensor) -> None:
    """Shape, dtype and every bit; NaNs are bits like others."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(got), bits(expected))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.reshape(-1).view(torch.uint8)


def exchanges_blocks(pattern: str, dtype: torch.dtype, transport: MpiTransport) -> None:
    """Every block arrives in rank order, bit for bit, whatever the width of a row."""
    for width in WIDTHS:
        pending, expected = start(transport, PATTERNS[pattern], width, dtype)
        require_same_bits(pending.wait(), expected)


def several_in_flight(transport: MpiTransport) -> None:
    """Exchanges of all patterns under way at once, waited for in another order, one by another thread."""
    started = [start(transport, rows, (4,), torch.float32) for rows in PATTERNS.values()]
    order = [len(started) - 1, *range(0, len(started) - 1, 2), *range(1, len(started) - 1, 2)]
    got: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: started[i][0].wait()})) for i in order[:2]]
    for thread in threads:
        thread.start()
    for index in order[2:]:
        got[index] = started[index][0].wait()
    for thread in threads:
        thread.join()
    for index, (_, expected) in enumerate(started):
        require_same_bits(got[index], expected)


def never_waited_for(transport: MpiTransport) -> None:
    """An exchange whose pending is dropped keeps its buffers until it has ended."""
    for _ in range(3):
        start(transport, PATTERNS["long"], (8,), torch.float32)
    pending, expected = start(transport, PATTERNS["uneven"], (8,), torch.float32)
    require_same_bits(pending.wait(), expected)


def splits_into_groups(transport: MpiTransport) -> None:
    """All pairs, groups of one and groups of groups, with exchanges under way in all of them."""
    groups = [list(pair) for pair in combinations(range(transport.size), 2)] + [
        [0],
        list(range(transport.size)),
    ]
    parts = [(ranks, transport.split(ranks)) for ranks in groups if transport.rank in ranks]
    parts += [([0], part.split([part.rank])) for _, part in parts[:1]]
    started = [start(transport, PATTERNS["uneven"], (3,), torch.float32)]
    for rows in (PATTERNS["uneven"], PATTERNS["long"]):
        started += [start(part, rows, (3,), torch.bfloat16) for _, part in parts]
    for ranks, part in parts[:-1]:
        assert (part.size, part.rank) == (len(ranks), ranks.index(transport.rank))
    for pending, expected in reversed(started):
        require_same_bits(pending.wait(), expected)


def completes_during_computation(transport: MpiTransport) -> None:
    """4 MiB arrive while this rank computes; without the thread's looks they would not."""
    width = 4 * MEBIBYTE // 8 // transport.size  # int64: each rank sends 4 MiB
    ones = [1] * transport.size

    def finished_while_computing(at_most_s: float) -> bool:
        transport.all_to_all(torch.zeros(transport.size), ones, ones).wait()
        pending = transport.all_to_all(torch.full((transport.size, width), transport.rank), ones, ones)
        began = time.perf_counter()
        matrix = torch.ones(256, 256)
        while pending.finished_at is None and time.perf_counter() - began < at_most_s:
            for _ in range(20):
                matrix = matrix @ matrix / 256
        finished_at, ended = pending.finished_at, time.perf_counter()
        require_same_bits(pending.wait(), torch.arange(transport.size).view(-1, 1).expand(-1, width))
        return finished_at is not None and began < finished_at < ended

    # A busy machine may keep the thread waiting for long; without it the exchange would never end.
    with_thread = finished_while_computing(at_most_s=20.0)
    transport._progress._num_waiting += 1  # as if somebody else were looking
    without_thread = finished_while_computing(at_most_s=0.3)
    transport._progress._num_waiting -= 1
    assert with_thread, "the exchange did not end during the computation"
    assert not without_thread, "it ended although nobody looked"


def _error(action: Callable[[], object]) -> CommError:
    try:
        action()
    except CommError as error:
        assert "\n" not in str(error), error
        return error
    raise AssertionError("nothing was raised")


def refuses_mistakes(transport: MpiTransport) -> None:
    """Wrong tensors, splits and ranks are named errors of one line, before anything is sent."""
    size = transport.size
    ones, rows = [1] * size, torch.zeros(size, 2)
    refused = {
        "meta": lambda: transport.all_to_all(rows.to("meta"), ones, ones),
        "contiguous": lambda: transport.all_to_all(torch.zeros(2, size).t(), ones, ones),
        "sum to the": lambda: transport.all_to_all(rows, [2] * size, ones),
        f"expected {size} splits": lambda: transport.all_to_all(rows, ones, [*ones, 1]),
        "from this rank as to it": lambda: transport.all_to_all(rows, ones, [2] * size),
        "splits of 0 or more": lambda: transport.all_to_all(rows, [size + 1, -1, *ones[2:]], ones),
    }
    for words, action in refused.items():
        error = _error(action)
        assert isinstance(error, TransportError) and words in str(error), error
    for ranks in (
        [transport.rank, transport.rank],
        [1 - min(transport.rank, 1)],
        [size, transport.rank],
        [1, 0],
    ):
        assert isinstance(_error(lambda ranks=ranks: transport.split(ranks)), PlacementError)
    assert "intracommunicator" in str(_error(lambda: MpiTransport("world")))
    pending, _ = start(transport, PATTERNS["even"], (), torch.float32)
    pending.wait()
    assert "twice" in str(_error(pending.wait))


def reports_errors_of_mpi(transport: MpiTransport) -> None:
    """An error of MPI, at the start or later, is a TransportError of one line; others go on."""
    broken = transport.split(range(transport.size))
    other, expected = start(transport, PATTERNS["long"], (3,), torch.float32)
    # A message to oneself that is longer than the receiver expects: MPI reports it when the request ends.
    lane, space = broken._lane, bytearray(4)
    request = lane.comm.Irecv(space, lane.rank, 1)
    lane.comm.Send(bytearray(8), lane.rank, 1)
    cut = Exchange(broken._progress, lane, request, torch.empty(0), torch.empty(0))
    broken._progress.drive(cut)
    in_wait = _error(cut.wait)
    require_same_bits(other.wait(), expected)
    lane.comm.Free()
    at_start = _error(lambda: start(broken, PATTERNS["even"], (3,), torch.float32))
    transport._progress._lanes.remove(lane)
    assert isinstance(in_wait, TransportError) and "truncated" in str(in_wait), in_wait
    assert isinstance(at_start, TransportError) and "ommunicator" in str(at_start), at_start


def all_cases() -> dict[str, Callable[[MpiTransport], None]]:
    """Every case by name."""
    cases: dict[str, Callable[[MpiTransport], None]] = {
        f"{pattern} {dtype}": partial(exchanges_blocks, pattern, dtype)
        for pattern in PATTERNS
        for dtype in (*DTYPES, torch.float8_e4m3fn)
    }
    plain = (several_in_flight, never_waited_for, splits_into_groups)
    later = (completes_during_computation, refuses_mistakes, reports_errors_of_mpi)
    return cases | {case.__name__: case for case in (*plain, *later)}


def run_cases(rank: int, world_size: int) -> tuple[dict[str, str], list[bytes]]:
    """Run every case over MPI; what failed on this rank, by case, and the results of `received`."""
    transport = MpiTransport()
    assert (transport.rank, transport.size, transport.device.type) == (rank, world_size, "cpu")
    failures = {}
    for name, case in all_cases().items():
        try:
            case(transport)
        except Exception:
            failures[name] = traceback.format_exc()
    return failures, received(transport)


def received(transport: Transport) -> list[bytes]:
    """What this rank receives in one exchange of every pattern and dtype, as bytes."""
    return [
        bits(start(transport, rows, (6,), dtype)[0].wait()).numpy().tobytes()
        for rows in PATTERNS.values()
        for dtype in DTYPES
    ]


def received_over_gloo(rank: int, world_size: int) -> list[bytes]:
    """As `received`, in a gloo world."""
    return received(TorchTransport())


def end_early(rank: int, world_size: int, how: str) -> None:
    """Rank 1 ends after one exchange, in the way given; the others wait for a second."""
    transport = MpiTransport()
    start(transport, PATTERNS["even"], (4,), torch.float32)[0].wait()
    if rank == 1 and how == "raises":
        raise ValueError("planted")
    if rank == 1 and how == "exits":
        sys.exit(3)
    if rank == 1 and how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "leaves":
        os._exit(4)
    start(transport, PATTERNS["even"], (4,), torch.float32)[0].wait()


def raise_while_others_compute(rank: int, world_size: int) -> None:
    """Rank 1 raises; the others are busy for a minute without any exchange."""
    MpiTransport()
    if rank == 1:
        raise ValueError("planted")
    time.sleep(60)


def end_without_waiting(rank: int, world_size: int) -> None:
    """Ranks end at different times, with an exchange that nobody waits for."""
    transport = MpiTransport()
    time.sleep(0.3 * rank)
    start(transport, PATTERNS["long"], (16,), torch.float32)


def exchange_more_than_2_gib(rank: int, world_size: int) -> None:
    """One message of 2 GiB and a bit, from rank 0 to rank 1; every row has its number on it."""
    transport = MpiTransport()
    rows = 2**21 + 5
    numbers = torch.arange(rows, dtype=torch.int32)
    send = torch.zeros(rows if rank == 0 else 0, 256, dtype=torch.int32)
    send[:, -1] = numbers[: len(send)]
    got = transport.all_to_all(send, [0, len(send)], [rows if rank == 1 else 0, 0]).wait()
    assert got.shape == (rows if rank == 1 else 0, 256)
    assert torch.equal(got[:, -1], numbers[: len(got)])
