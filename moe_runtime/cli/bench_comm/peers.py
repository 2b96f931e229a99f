"""What we are measured against, on torch.distributed alone.

`PlainExchange` is the dispatcher of most training code: sort the copies by expert, tell counts, send
every (token, expert) copy with one `all_to_all_single`, group what arrives by expert; back the same way,
then weigh and sum at the source. Weights stay at home, so nothing but rows and counts travels.

`RawExchange` is the floor: the same rows with one gather before, one scatter after, and two
`all_to_all_single` whose sizes are known beforehand; no counts, no grouping, no sum.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.cli.bench_comm.settings import Settings

_PROBE_BYTES = 512 * 1024  # for each pair of ranks


def all_to_all(send: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Rows from all ranks, one block from each."""
    out = torch.empty((sum(received), *send.shape[1:]), dtype=send.dtype)
    dist.all_to_all_single(out, send, received, sent)
    return out


class PlainExchange:
    """One `all_to_all_single` of every (token, expert) copy.

    Args:
        num_experts: in all; they lie on the ranks in order, in equal parts.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._size, self._rank = dist.get_world_size(), dist.get_rank()

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows by local expert, and how many of each.

        Args:
            tokens: [tokens, hidden].
            weights: [tokens, top_k]; kept for `combine`.
            expert_ids: int64 [tokens, top_k].

        Returns:
            [rows, hidden] and int64 [local_experts].
        """
        self._weights = weights
        flat = expert_ids.flatten()
        self._order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self._num_experts)
        rows = tokens.index_select(0, self._order // expert_ids.shape[1])
        heard = torch.empty_like(counts)
        dist.all_to_all_single(heard, counts)
        heard = heard.view(self._size, -1)
        self.sent = counts.view(self._size, -1).sum(1).tolist()
        self.received = heard.sum(1).tolist()
        arrived = all_to_all(rows, self.sent, self.received)
        local = torch.arange(heard.shape[1]).repeat(self._size)
        self._by_expert = torch.argsort(local.repeat_interleave(heard.flatten()), stable=True)
        return arrived.index_select(0, self._by_expert), heard.sum(0)

    def combine(self, rows: Tensor) -> Tensor:
        """Weighted sum of a token's rows: [tokens, hidden]."""
        by_source = torch.empty_like(rows)
        by_source[self._by_expert] = rows
        back = all_to_all(by_source, self.received, self.sent)
        slots = torch.empty_like(back)
        slots[self._order] = back
        slots = slots.view(*self._weights.shape, -1)
        return (slots * self._weights.unsqueeze(2).to(slots.dtype)).sum(1)


class RawExchange:
    """Rows there and back, and nothing else.

    Args:
        expert_ids: int64 [tokens, top_k] of this rank.
        local_experts: of each rank.
    """

    def __init__(self, expert_ids: Tensor, local_experts: int) -> None:
        flat = expert_ids.flatten()
        self._order = torch.argsort(flat, stable=True)
        self._tokens = self._order // expert_ids.shape[1]
        size = dist.get_world_size()
        sent = torch.bincount(flat // local_experts, minlength=size)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        self._sent, self._received = sent.tolist(), received.tolist()

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Gather, send: [rows, hidden] as they arrive."""
        return all_to_all(tokens.index_select(0, self._tokens), self._sent, self._received)

    def combine(self, rows: Tensor) -> Tensor:
        """Send back, scatter: [tokens x top_k, hidden]."""
        back = all_to_all(rows, self._received, self._sent)
        return torch.empty_like(back).index_copy_(0, self._order, back)


def probe_links(settings: Settings, barrier: Callable[[], None], times: int = 3) -> dict[str, float]:
    """How well an exchange of equal blocks fills the links: time over (bytes of a link / rate), at best.

    Two ways to do it. With all receives posted before the first send, links run at their rate, or the
    limiters are not what they should be. `all_to_all_single` of gloo posts them in turn, so that a pair
    of ranks now and then sends one way after the other.

    Args:
        settings: nodes and rate.
        barrier: of all ranks, that sends nothing over the links.
        times: each way is tried.
    """
    size, rank = settings.world_size, dist.get_rank()
    crossing = (size - settings.ranks_per_node) * settings.ranks_per_node * _PROBE_BYTES
    assert settings.rate_mbit is not None
    floor_s = crossing * 8 / (settings.rate_mbit * 1e6)
    send = torch.zeros(size, _PROBE_BYTES, dtype=torch.uint8)
    receive = torch.empty_like(send)
    others = [(rank + step) % size for step in range(1, size)]

    def receives_first() -> None:
        works = [dist.irecv(receive[other], other) for other in reversed(others)]
        barrier()
        works += [dist.isend(send[other], other) for other in others]
        for work in works:
            assert work is not None
            work.wait()

    ways = {"receives_first": receives_first, "all_to_all": lambda: dist.all_to_all_single(receive, send)}
    best: dict[str, float] = {}
    for name, run in ways.items():
        for _ in range(times):
            barrier()
            start = time.perf_counter()
            run()
            barrier()
            over = (time.perf_counter() - start) / floor_s
            best[name] = min(over, best.get(name, over))
    return best
