"""What ranks run to hold all dispatchers on all wires against the oracle, on routings drawn at random.

Rank 0 lets Hypothesis draw an example and tells it to the others; all make the exchange, compare, and tell
each other what failed, so that all go on to the same next example, also while Hypothesis looks for a
smaller one. One world thus serves any number of examples. Over MPI the same examples are run again.
"""

import hashlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from moe_comm.errors import ReceiveOverflow
from moe_comm.reference import reference_rows_sent
from moe_comm.transport_torch import TorchTransport
from moe_comm.wire.codec import WIRES
from torch import Tensor

from tests.dist.exchange_cases import exchange, expect, require_gradients_of_a_layer, require_same_bits
from tests.dist.openings import Setting, SharedGroups
from tests.unit.comm.routings import Inputs, fullest_office, without_some

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 20  # of a rank
MAX_TOP_K = 8


@dataclass(frozen=True)
class Example:
    """One routing; runs with every kind of dispatcher on every wire.

    Args:
        ranks_per_node: consecutive ranks of a machine.
        chunks: parts of a dispatch of two hops.
        max_rows: rows that a rank may receive.
        counts: tokens of each rank.
        local_experts: of a rank.
        top_k: choices of a token.
        hidden: width of a row.
        dtypes: of tokens and of gate weights.
        masked: share of the slots without a choice.
        skew: 0 for a balanced routing; the larger, the fewer experts get nearly everything.
        seed: of the values.
    """

    ranks_per_node: int
    chunks: int | None
    max_rows: int | None
    counts: tuple[int, ...]
    local_experts: int
    top_k: int
    hidden: int
    dtypes: tuple[torch.dtype, torch.dtype]
    masked: float
    skew: float
    seed: int

    def settings(self) -> Iterator[Setting]:
        """Every dispatcher that the world can have."""
        if len(self.counts) == 1:
            yield Setting("local", 1, max_rows=self.max_rows)
        for wire in WIRES:
            yield Setting("alltoall", self.ranks_per_node, wire, max_rows=self.max_rows)
            if self.ranks_per_node < len(self.counts):
                yield Setting("two_hop", self.ranks_per_node, wire, self.chunks, self.max_rows)

    def draw(self) -> Inputs:
        """The inputs of all ranks."""
        generator = torch.Generator().manual_seed(self.seed)
        num_experts = self.local_experts * len(self.counts)
        popularity = self.skew * torch.rand(num_experts, generator=generator)
        tokens, weights, expert_ids = [], [], []
        for count in self.counts:
            scores = torch.rand(count, num_experts, generator=generator) + popularity
            ids = scores.topk(self.top_k, dim=1).indices
            values = torch.randn(count, self.hidden, generator=generator, dtype=torch.float64)
            if self.dtypes[0] != torch.float16:  # rows of very different size, but for the narrow range
                values *= torch.randint(-9, 9, (count, 1), generator=generator).double().exp2()
            tokens.append(values.to(self.dtypes[0]))
            drawn = torch.rand(count, self.top_k, generator=generator, dtype=torch.float64)
            weights.append(drawn.to(self.dtypes[1]))
            expert_ids.append(without_some(ids, self.masked, generator))
        return Inputs(tokens, weights, expert_ids, num_experts)


@st.composite
def examples(draw: st.DrawFn, world_size: int) -> Example:
    """Any example for a world of that size."""
    sizes = [n for n in range(1, max(world_size, 2)) if world_size % n == 0]
    local_experts = draw(st.integers(1, 4))
    dtypes = st.sampled_from(DTYPES)
    return Example(
        ranks_per_node=draw(st.sampled_from(sizes)),
        chunks=draw(st.sampled_from([None, 1, 2, 3, 5, 30])),
        max_rows=draw(st.none() | st.integers(1, 8 * MAX_TOKENS * world_size)),
        counts=tuple(draw(st.lists(st.integers(0, MAX_TOKENS), min_size=world_size, max_size=world_size))),
        local_experts=local_experts,
        top_k=draw(st.integers(1, min(MAX_TOP_K, local_experts * world_size))),
        hidden=draw(st.sampled_from([1, 3, 16, 130])),
        dtypes=(draw(dtypes), draw(dtypes)),
        masked=draw(st.sampled_from([0.0, 0.2, 0.9])),
        skew=draw(st.sampled_from([0.0, 0.5, 5.0])),
        seed=draw(st.integers(0, 2**20)),
    )


def run_example(example: Example, groups: SharedGroups) -> bytes:
    """Make the exchange with all dispatchers; gives a digest of all bits that came of it on this rank."""
    drawn = example.draw()
    rows_sent = reference_rows_sent(drawn.expert_ids, drawn.num_experts)
    results = {}
    for setting in example.settings():
        lanes = setting.ranks_per_node if setting.kind == "two_hop" else 1
        if example.max_rows is not None and fullest_office(rows_sent, lanes) > example.max_rows:
            _require_overflow(setting, groups, drawn, torch.tensor(rows_sent))
            setting = setting.but(max_rows=None)
        got = exchange(setting, groups, drawn)
        expected = expect(setting, drawn, groups.rank)
        require_same_bits(**{f"{setting} {name}": (got[name], expected[name]) for name in expected})
        if example.dtypes == (torch.float64, torch.float64) and setting.wire == "auto":
            require_gradients_of_a_layer(drawn, setting, groups)
        results |= {f"{setting} {name}": value for name, value in got.items()}
    return digest(results)


def _require_overflow(setting: Setting, groups: SharedGroups, drawn: Inputs, table: Tensor) -> None:
    dispatcher = setting.open(drawn.num_experts, groups)
    try:
        dispatcher.dispatch(*drawn.of(groups.rank)).wait()
    except ReceiveOverflow as overflow:
        require_same_bits(rows_sent=(overflow.rows_sent, table))
    else:
        raise AssertionError(f"{setting}: expected ReceiveOverflow of {table.sum(0).tolist()} rows")


def digest(results: dict[str, Tensor]) -> bytes:
    """A digest of the bits of all results."""
    found = hashlib.sha256()
    for name, value in sorted(results.items()):
        found.update(name.encode() + str((value.shape, value.dtype)).encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


@dataclass
class Outcome:
    """What a rank found.

    Args:
        examples: those run, in order; on rank 0 alone.
        digests: of each.
        failure: the smallest failing example in words; None if all was well.
    """

    examples: list[Example]
    digests: list[bytes]
    failure: str | None = None


Gather = Callable[[Any], list[Any]]


def _gather_over_gloo(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class _Round:
    """One example after another on all ranks alike."""

    def __init__(
        self, groups: SharedGroups, gather: Gather, check: Callable[[Example, SharedGroups], bytes]
    ) -> None:
        self._groups, self._gather, self._check = groups, gather, check
        self.outcome = Outcome([], [])

    def run(self, example: Example) -> None:
        """Run it; raises on all ranks if one failed, naming ranks and what failed."""
        failure = None
        try:
            self.outcome.digests.append(self._check(example, self._groups))
        except AssertionError:
            failure = traceback.format_exc(limit=-2)
        failures = self._gather(failure)
        failed = {rank: text for rank, text in enumerate(failures) if text}
        assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
        self.outcome.examples.append(example)


def search(
    rank: int,
    world_size: int,
    number: int,
    first_seed: int,
    check: Callable[[Example, SharedGroups], bytes] = run_example,
) -> Outcome:
    """Run a number of drawn examples over gloo."""
    rounds = _Round(SharedGroups(TorchTransport()), _gather_over_gloo, check)
    if rank > 0:
        while (example := _gather_over_gloo(None)[0]) is not None:
            try:
                rounds.run(example)
            except AssertionError as error:
                rounds.outcome.failure = str(error)
        return rounds.outcome

    @seed(first_seed)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples(world_size))
    def look(example: Example) -> None:
        _gather_over_gloo(example)
        rounds.run(example)

    try:
        look()
    except AssertionError as error:
        rounds.outcome.failure = "\n".join([str(error), *getattr(error, "__notes__", [])])
    _gather_over_gloo(None)
    return rounds.outcome


def search_with_a_fault(rank: int, world_size: int, number: int, first_seed: int) -> Outcome:
    """As `search`, where each token that rank 1 gets back has one wrong bit."""

    def check(example: Example, groups: SharedGroups) -> bytes:
        drawn, setting = example.draw(), Setting("alltoall", 1)
        got, expected = exchange(setting, groups, drawn), expect(setting, drawn, rank)
        if rank == 1 and got["summed"].numel():
            got["summed"].view(torch.uint8).view(-1)[0] ^= 1
        require_same_bits(summed=(got["summed"], expected["summed"]))
        return digest(got)

    return search(rank, world_size, number, first_seed, check)


def replay_over_mpi(rank: int, world_size: int, given_examples: list[Example]) -> Outcome:
    """Run the same examples over MPI."""
    from moe_comm.transport_mpi import MpiTransport
    from mpi4py import MPI

    rounds = _Round(SharedGroups(MpiTransport()), MPI.COMM_WORLD.allgather, run_example)
    for example in given_examples:
        rounds.run(example)
    return rounds.outcome
