"""Counts tokens per expert over the whole global batch, and moves the routing biases by them.

Counts are int64 from the first forward only (never from recomputation, evaluation or a skipped
step), so every layout sees the same numbers and the sign of the bias update cannot be rounded away.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.model.router import update_bias
from moe_runtime.model.transformer import Transformer


class ExpertLoad:
    """Counts of the MoE layers that this rank holds.

    Args:
        layers: canonical prefixes of the layers, in ascending stage order, alike on every rank of
            the data-parallel group.
        num_experts: routed experts a layer.
        device: where counts live.
    """

    def __init__(self, layers: Iterable[str], num_experts: int, device: torch.device) -> None:
        self.layers = tuple(layers)
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self.counts = torch.zeros(len(self.layers), num_experts, dtype=torch.int64, device=device)

    def add(self, layer: str, expert_ids: Tensor) -> None:
        """Count int64 `expert_ids` [tokens, top_k] of one forward."""
        chosen = expert_ids.reshape(-1)
        # Not bincount, which on a GPU would have the host wait for the largest number.
        self.counts[self._row[layer]].scatter_add_(0, chosen, torch.ones_like(chosen))

    def take_total(self, data_group: dist.ProcessGroup | None) -> Tensor:
        """Counts of the global batch, int64 [layers, experts], and start again from zero."""
        total = self.counts.clone()
        self.counts.zero_()
        if data_group is not None and total.numel():
            dist.all_reduce(total, group=data_group)
        return total


def move_biases(chunks: Mapping[int, Transformer], load: ExpertLoad, total: Tensor, gamma: float) -> None:
    """One step of the auxiliary-loss-free balance, alike on every rank. Ref: DSV3 §2.1.2."""
    rows = dict(zip(load.layers, total, strict=True))
    for chunk in chunks.values():
        for layer, moe in chunk.moe_layers():
            update_bias(moe.router.bias, rows[layer], gamma)
