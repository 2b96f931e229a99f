"""Exchanges and boundary tensors that go by way of host memory, as on a GPU shared by several processes.

Their order and places are tested here with tensors of the CPU, those of a GPU by `test_ranks_on_gpu.py`.
"""

import torch
import torch.distributed as dist
from moe_comm.through_host import all_to_all_through_host
from moe_comm.transport_torch import TorchTransport as Exchanges

from moe_runtime.parallel.p2p import ThroughHost, TorchTransport
from tests.ranks import run_ranks

SPLITS = ((2, 0, 3), (1, 1, 0), (0, 2, 1))  # rows from rank r to rank d


def _exchange(rank: int, world_size: int) -> list[list[float]]:
    below = Exchanges()
    gives, takes = SPLITS[rank], [row[rank] for row in SPLITS]
    send = (torch.arange(sum(gives) * 2.0) + 100 * rank).view(-1, 2)
    plain = below.all_to_all(send, gives, takes).wait()
    fresh = all_to_all_through_host(below.all_to_all, rank, send, gives, takes, None).wait()
    prepared = torch.full_like(plain, -1.0)
    own = slice(sum(takes[:rank]), sum(takes[: rank + 1]))
    prepared[own] = 7.0
    into = all_to_all_through_host(below.all_to_all, rank, send, gives, takes, prepared).wait()
    assert into is prepared and bool((into[own] == 7.0).all())
    into[own] = plain[own]
    return [plain.tolist(), fresh.tolist(), into.tolist()]


def test_rows_through_the_host_arrive_as_straight_ones_and_an_own_block_stays() -> None:
    for plain, fresh, into in run_ranks(_exchange, 3):
        assert plain == fresh == into and plain


def _boundary(rank: int, world_size: int) -> list[float]:
    up, down = dist.new_group(), dist.new_group()
    transport, peer = ThroughHost(TorchTransport(rank, [0, 1], up, down)), 1 - rank
    sent = [torch.full((3,), 10.0 * rank + number) for number in range(2)]
    buffers = [torch.empty(3) for _ in sent]
    arriving = [transport.receive(buffer, peer) for buffer in buffers]
    leaving = [transport.send(tensor, peer) for tensor in sent]
    for transfer in (*arriving, *leaving):
        transfer.wait()
    return [float(buffer.mean()) for buffer in buffers]


def test_boundary_tensors_through_the_host_arrive_in_their_order() -> None:
    assert run_ranks(_boundary, 2) == [[10.0, 11.0], [0.0, 1.0]]
