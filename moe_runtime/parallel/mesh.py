"""Which ranks belong together: arithmetic first, process groups second.

    world = pp x dp, global_rank = pp_rank * dp + dp_rank, ep_rank = dp_rank % ep

Expert parallelism folds into data parallelism, so the ranks of one expert-parallel group are
contiguous and, laid out node by node, share a node as far as possible.

Under a bidirectional schedule row r and row P-1-r hold the same two stages. They need no special
gradient path: they are one data-parallel group of 2 x dp ranks ("mirrored rows"). The gradient norm
must count each stage once, so its group is one half of the pipeline: rows 0..P/2-1, or P/2..P-1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

RankLists = list[list[int]]


@dataclass(frozen=True)
class Mesh:
    """Coordinates of one rank, and the rank lists of every group.

    Args:
        pp: pipeline ranks.
        dp: data-parallel lanes.
        ep: ranks that share one set of experts.
        is_mirrored: the schedule is bidirectional.
        rank: this global rank.
        is_folded: first and last stage are on one rank (a V), so that they share an embedding.
    """

    pp: int
    dp: int
    ep: int
    is_mirrored: bool
    rank: int
    is_folded: bool = False

    @property
    def world_size(self) -> int:
        return self.pp * self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.dp

    @property
    def dp_rank(self) -> int:
        return self.rank % self.dp

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.ep

    @property
    def replicas(self) -> int:
        """Ranks that hold the same stage and average its dense gradients."""
        return self.dp * (2 if self.is_mirrored else 1)

    @property
    def has_tied_copies(self) -> bool:
        """True if first and last stage are on different ranks, each with a copy of the embedding."""
        return self.pp > 1 and not self.is_mirrored and not self.is_folded

    @property
    def is_stage_owner(self) -> bool:
        """True on exactly one rank for each stage (for each pair of stages when mirrored)."""
        return self.dp_rank == 0 and (not self.is_mirrored or self.pp_rank < self.pp // 2)

    def rank_at(self, pp_rank: int) -> int:
        """The global rank of this lane in another pipeline row."""
        return pp_rank * self.dp + self.dp_rank

    def _row(self, pp_rank: int) -> list[int]:
        return list(range(pp_rank * self.dp, (pp_rank + 1) * self.dp))

    def _row_sets(self) -> RankLists:
        """Ranks that hold the same stages: one row, or two mirrored rows."""
        if not self.is_mirrored:
            return [self._row(row) for row in range(self.pp)]
        return [self._row(row) + self._row(self.pp - 1 - row) for row in range(self.pp // 2)]

    def data_groups(self) -> RankLists:
        return self._row_sets()

    def expert_groups(self) -> RankLists:
        return [list(range(first, first + self.ep)) for first in range(0, self.world_size, self.ep)]

    def expert_data_groups(self) -> RankLists:
        return [
            [rank for rank in ranks if rank % self.dp % self.ep == ep_rank]
            for ranks in self._row_sets()
            for ep_rank in range(self.ep)
        ]

    def norm_groups(self) -> RankLists:
        rows = list(range(self.pp))
        halves = [rows[: self.pp // 2], rows[self.pp // 2 :]] if self.is_mirrored else [rows]
        return [[row * self.dp + lane for row in half] for half in halves for lane in range(self.dp)]

    def pipe_groups(self) -> RankLists:
        return [[row * self.dp + lane for row in range(self.pp)] for lane in range(self.dp)]

    def tied_groups(self) -> RankLists:
        """First and last row of each lane: they share the embedding when the pipeline is one-way."""
        return [[lane, (self.pp - 1) * self.dp + lane] for lane in range(self.dp)]


@dataclass(frozen=True)
class Groups:
    """The process groups that this rank is in.

    Args:
        data: ranks that average the dense gradients of the stages held here.
        expert: the expert-parallel group.
        expert_data: ranks that hold the same experts of the same stages.
        norm: ranks that together hold every stage once.
        pipe_up, pipe_down: this lane's pipeline; two groups, so that the two directions between a
            pair of ranks are two independent channels on every backend (NCCL runs the transfers of
            one communicator in the order they were given, and would deadlock on crossing ones).
        tied: first and last row of this lane, or None.
        control: all ranks over gloo, for agreements.
    """

    data: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    norm: dist.ProcessGroup
    pipe_up: dist.ProcessGroup | None
    pipe_down: dist.ProcessGroup | None
    tied: dist.ProcessGroup | None
    control: dist.ProcessGroup


def open_groups(mesh: Mesh, timeout_s: float = 600.0) -> Groups:
    """Make the process groups; every rank of the world must call this, and calls alike.

    Args:
        timeout_s: a collective that takes longer raises. Groups do not inherit the world's limit.

    Raises:
        ValueError: the default process group has another size than the mesh.
    """
    if dist.get_world_size() != mesh.world_size:
        raise ValueError(f"the process group has {dist.get_world_size()} ranks, the mesh {mesh.world_size}")

    timeout = timedelta(seconds=timeout_s)

    def mine(lists: Callable[[], RankLists]) -> dist.ProcessGroup:
        own: dist.ProcessGroup | None = None
        for ranks in lists():
            group = dist.new_group(ranks, timeout=timeout)
            if mesh.rank in ranks:
                own = group
        assert own is not None or lists == mesh.tied_groups, f"rank {mesh.rank} is in no group"
        return own  # type: ignore[return-value]

    has_pipe = mesh.pp > 1
    return Groups(
        data=mine(mesh.data_groups),
        expert=mine(mesh.expert_groups),
        expert_data=mine(mesh.expert_data_groups),
        norm=mine(mesh.norm_groups),
        pipe_up=mine(mesh.pipe_groups) if has_pipe else None,
        pipe_down=mine(mesh.pipe_groups) if has_pipe else None,
        tied=mine(mesh.tied_groups) if mesh.has_tied_copies else None,
        control=dist.new_group(list(range(mesh.world_size)), timeout=timeout, backend="gloo"),
    )
