"""The meters of all routers of a rank, and what they sum up in a step."""

from collections.abc import Iterable

import torch
from moe_comm.placement import Placement
from torch import Tensor

from moe_runtime.model.router_meter import QUANTITIES, RouterMeter
from moe_runtime.model.transformer import Transformer


class RouterMeters:
    """Meters in every router of these chunks.

    Args:
        chunks: in ascending stage order.
        placement: where the experts are.

    Attributes:
        layers: canonical prefixes, one a row of the table.
        seconds: host time that the measuring has taken so far.
    """

    def __init__(self, chunks: Iterable[Transformer], placement: Placement, device: torch.device) -> None:
        routers = {name: moe.router for chunk in chunks for name, moe in chunk.moe_layers()}
        self.layers = tuple(routers)
        self._spent: list[float] = []
        self._sums = torch.zeros(len(routers), len(QUANTITIES), dtype=torch.float64, device=device)
        nodes = [placement.node_of(expert) for expert in range(placement.num_experts)]
        node_of = torch.tensor(nodes, device=device) if max(nodes) else None
        self._meters = [RouterMeter(row, node_of, self._spent) for row in self._sums]
        for router, meter in zip(routers.values(), self._meters, strict=True):
            router.meter = meter

    def clear(self) -> None:
        """A forward pass begins."""
        self._sums.zero_()
        for meter in self._meters:
            meter.tokens = 0

    def sums(self) -> Tensor:
        """What the step's forward pass added up on this rank: FP64 [layers, len(QUANTITIES)], on the CPU."""
        sums = self._sums.to("cpu", copy=True)
        sums[:, QUANTITIES.index("nodes")] += torch.tensor([float(meter.tokens) for meter in self._meters])
        return sums

    def take_seconds(self) -> float:
        """Host time that measuring took since the last call."""
        seconds = sum(self._spent)
        self._spent.clear()
        return seconds
