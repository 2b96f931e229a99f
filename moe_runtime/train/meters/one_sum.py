"""Many tables, one sum over all ranks.

A reduction over all ranks costs its latency, whatever it carries. So everything that a step's record needs
goes into one vector: every number has one owner, or is a sum to which every rank adds its part; where each
rank's own value is wanted (for the slowest, the largest), the table has a row for each rank, zero on all
others.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class OneSum:
    """Tables of zeros that are views of one vector.

    Args:
        shapes: name -> shape; alike on every rank.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._vector = torch.zeros(sum(sizes), dtype=torch.float64)
        views = zip(shapes.items(), self._vector.split(sizes), strict=True)
        self._tables = {name: part.view(shape) for (name, shape), part in views}

    def __getitem__(self, name: str) -> Tensor:
        """The FP64 table of that name."""
        return self._tables[name]

    def get(self, name: str) -> Tensor | None:
        """The table of that name, if there is one."""
        return self._tables.get(name)

    def add_up(self, group: dist.ProcessGroup | None) -> None:
        """Sum all tables over the ranks of a group, in place; None: there is one rank."""
        if group is not None:
            dist.all_reduce(self._vector, group=group)
