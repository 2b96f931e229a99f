"""A whole MoE layer, forward and backward, ours against DeepSpeed's: what one rank does and measures.

Both have the same gate, the same experts' weights and the same tokens, and both keep every token. The
first column of the tokens is 1, so the first column of the gate is a bias by expert: with it, popularity
is as uneven as the routing asks for.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_comm import Placement, autograd, open_dispatcher
from torch import Tensor, nn

from moe_runtime.cli.bench_comm.deepspeed_peer import open_deepspeed_layer
from moe_runtime.cli.bench_comm.exchange import processor_s
from moe_runtime.cli.bench_comm.routing import max_over_mean
from moe_runtime.cli.bench_comm.settings import NATURAL_MAX_OVER_MEAN, Settings
from moe_runtime.cli.testbed.line import Line
from moe_runtime.model.experts import Experts

_TOLERANCE = 1e-4  # FP32, sums in another order


class OurLayer(nn.Module):
    """Gate, dispatch, grouped experts, combine.

    Args:
        settings: shape.
        gate: FP32 [num_experts, hidden].
        gate_up: FP32 [local_experts, 2f, hidden].
        down: FP32 [local_experts, hidden, f].
    """

    def __init__(self, settings: Settings, gate: Tensor, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate.clone())
        self.experts = Experts(settings.local_experts, settings.hidden, settings.expert_width)
        with torch.no_grad():
            self.experts.gate_up.copy_(gate_up)
            self.experts.down.copy_(down)
        self._top_k = settings.top_k
        placement = Placement(settings.num_experts, dist.get_world_size(), dist.get_rank())
        self._dispatcher = open_dispatcher("auto", placement)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [tokens, hidden] -> [tokens, hidden]."""
        shares = (tokens @ self.gate.t()).softmax(dim=1)
        weights, expert_ids = shares.topk(self._top_k, dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True)
        received = autograd.dispatch(self._dispatcher, tokens, weights, expert_ids)
        rows = self.experts(received.rows, received.row_weights, received.row_counts)
        return autograd.combine(self._dispatcher, rows, received.handle)


def run_layer(settings: Settings, folder: Path, line: Line) -> dict[str, Any]:
    """Balanced and natural routing, both layers in turn.

    Returns:
        {routing: {"ours", "deepspeed": [{"s", "cpu_s"}], "load": max over mean, "difference": ...}}.
    """
    results: dict[str, Any] = {}
    for routing in settings.routings:
        tokens = _tokens(settings, settings.seed + 1 + dist.get_rank())
        gate = _gate(settings, routing)
        weights = _experts(settings)
        ours = OurLayer(settings, gate, *weights)
        theirs = open_deepspeed_layer(settings, gate, *weights)
        steps: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
            "ours": (ours, ours),
            "deepspeed": (theirs, lambda x, layer=theirs: layer(x)[0]),  # type: ignore[misc]
        }
        results[routing] = {"difference": _compare(steps, tokens), "load": _load(tokens, gate, settings)}
        times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for turn in range(settings.rounds):
            for name in steps if turn % 2 == 0 else reversed(steps):
                times[name].append(_timed(*steps[name], tokens))
        results[routing] |= times
    return results


def _tokens(settings: Settings, seed: int) -> Tensor:
    tokens = torch.randn(settings.tokens, settings.hidden, generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 1.0
    return tokens


def _gate(settings: Settings, routing: str) -> Tensor:
    """Gate weights [num_experts, hidden]; natural: so uneven that the fullest expert has the load wanted."""
    draw = torch.Generator().manual_seed(settings.seed)
    gate = torch.randn(settings.num_experts, settings.hidden, generator=draw)
    gate = gate / gate[:, 1:].norm(dim=1, keepdim=True)
    popularity = torch.randn(settings.num_experts, generator=draw)
    gate[:, 0] = 0.0
    if routing == "balanced":
        return gate
    sample = torch.cat([_tokens(settings, settings.seed + 1 + rank) for rank in range(settings.world_size)])
    logits = sample @ gate.t()
    low, high = 0.0, 2.0
    for _ in range(12):
        middle = (low + high) / 2
        if max_over_mean(_loads(logits + middle * popularity, settings)) < NATURAL_MAX_OVER_MEAN:
            low = middle
        else:
            high = middle
    gate[:, 0] = (low + high) / 2 * popularity
    return gate


def _loads(logits: Tensor, settings: Settings) -> Tensor:
    chosen = logits.topk(settings.top_k, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=settings.num_experts)


def _load(tokens: Tensor, gate: Tensor, settings: Settings) -> float:
    """Rows of the fullest expert over the mean, all ranks together."""
    loads = _loads(tokens @ gate.t(), settings)
    dist.all_reduce(loads)
    return max_over_mean(loads)


def _experts(settings: Settings) -> tuple[Tensor, Tensor]:
    """Weights of this rank's experts: [local, 2f, hidden] and [local, hidden, f]."""
    draw = torch.Generator().manual_seed(settings.seed + 100 + dist.get_rank())
    local, hidden, width = settings.local_experts, settings.hidden, settings.expert_width
    gate_up = torch.randn(local, 2 * width, hidden, generator=draw) * hidden**-0.5
    return gate_up, torch.randn(local, hidden, width, generator=draw) * width**-0.5


def _compare(steps: dict[str, Any], tokens: Tensor) -> float:
    """Relative difference of outputs and of token gradients; warms both layers up."""
    made = []
    for _, run in steps.values():
        x = tokens.clone().requires_grad_()
        out = run(x)
        out.backward(tokens)
        assert x.grad is not None
        made.append(torch.cat((out.detach().flatten(), x.grad.flatten())))
    difference = float((made[0] - made[1]).norm() / made[1].norm())
    assert difference < _TOLERANCE, f"the layers differ by {difference:.1e}"
    return difference


def _timed(layer: nn.Module, run: Callable[[Tensor], Tensor], tokens: Tensor) -> dict[str, float]:
    """One forward and backward of the layer."""
    layer.zero_grad(set_to_none=True)
    x = tokens.clone().requires_grad_()
    dist.barrier()
    processor, start = processor_s(), time.perf_counter()
    run(x).backward(tokens)
    return {"s": time.perf_counter() - start, "cpu_s": processor_s() - processor}
