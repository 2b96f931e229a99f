"""DeepSpeed's own MoE layer: the peer of a whole layer, and of an exchange.

Set up as its authors would for training without dropped tokens: gather-based encode and decode (0.19.4
and later), no random token selection, capacity as large as the fullest expert needs.

As a whole layer it has our weights in it, and each of its experts is our dense SwiGLU, so the layers
differ in how tokens travel and in what is padded, not in the GEMMs. As an exchange its gate is given the
routing, and its forward is held up in the experts: all up to there is the dispatch, all after it the
combine.
"""

import io
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_runtime.cli.bench_comm.contenders import sent_to_others
from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.model.ffn import SwiGLU
from moe_runtime.parallel.zero_engine import join_process_group


def open_deepspeed_layer(settings: Settings, gate: Tensor, gate_up: Tensor, down: Tensor) -> nn.Module:
    """The layer, with these weights; its forward gives (output, auxiliary loss, counts).

    Args:
        settings: shape.
        gate: FP32 [num_experts, hidden].
        gate_up: FP32 [local_experts, 2f, hidden].
        down: FP32 [local_experts, hidden, f].
    """
    layer = _open_layer(settings, SwiGLU(settings.hidden, settings.expert_width))
    inner = layer.deepspeed_moe
    with torch.no_grad():
        inner.gate.wg.weight.copy_(gate)
        for index, own in enumerate(inner.experts.deepspeed_experts):
            own.gate_up.weight.copy_(gate_up[index])
            own.down.weight.copy_(down[index])
    return layer


class DeepSpeedExchange:
    """The exchange inside DeepSpeed's layer, as a contender.

    Args:
        settings: of the measurement.
    """

    sums = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._layer = _open_layer(settings, nn.Identity())
        self._gate, self._experts = _GivenGate(settings), _HeldUp()
        inner = self._layer.deepspeed_moe
        self._gate.ep_group = inner.ep_group
        inner.gate, inner.experts = self._gate, self._experts
        # The forward runs on a thread, so that it can stand still between dispatch and combine.
        self._thread = ThreadPoolExecutor(1)
        self._sent = [0, 0]

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """[ranks, local_experts, capacity, hidden]: every expert has as many rows as the fullest one."""
        self._gate.routing = (weights, expert_ids)
        self._output: Future[Tensor] = self._thread.submit(self._forward, tokens)
        rows = self._experts.arrived.get()
        if isinstance(rows, BaseException):
            raise rows
        self._count(rows)
        return rows

    def apply_experts(self, rows: Tensor, factors: Tensor) -> Tensor:
        return (rows * factors.view(1, -1, 1, 1)).to(rows.dtype)

    def combine(self, rows: Tensor) -> Tensor:
        self._count(rows)
        self._experts.done.put(rows)
        return self._output.result()

    def sent_bytes(self) -> list[int]:
        sent, self._sent = self._sent, [0, 0]
        return sent

    @torch.no_grad()
    def _forward(self, tokens: Tensor) -> Tensor:
        try:
            return self._layer(tokens)[0]
        except BaseException as error:
            self._experts.arrived.put(error)
            raise

    def _count(self, rows: Tensor) -> None:
        self._sent = sent_to_others([rows[0].nbytes] * self._settings.world_size, self._settings)


class _GivenGate(nn.Module):
    """DeepSpeed's choice of slots for a routing that is given; what the layer calls as its gate."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._num_experts, self._top_k = settings.num_experts, settings.top_k
        self.ep_group: Any = None
        self.routing: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def forward(self, tokens: Tensor, *_: Any) -> Any:
        from deepspeed.moe.sharded_moe import topkgating

        weights, expert_ids = self.routing
        # Its softmax of these is the weights again, and nothing elsewhere.
        logits = torch.full((tokens.shape[0], self._num_experts), -1e4).scatter_(1, expert_ids, weights.log())
        return topkgating(
            logits, self._top_k, 1.0, 0, drop_tokens=False, ep_group=self.ep_group, sparse_routes=True
        )


class _HeldUp(nn.Module):
    """Experts that hand over what has arrived, and wait for what shall go back."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def forward(self, rows: Tensor) -> Tensor:
        self.arrived.put(rows)
        return self.done.get()


def _open_layer(settings: Settings, expert: nn.Module) -> Any:
    """A layer that drops no token, over all ranks."""
    from deepspeed.moe.layer import MoE  # seconds to import

    join_process_group()
    with redirect_stdout(io.StringIO()):
        layer = MoE(
            settings.hidden,
            expert,
            num_experts=settings.num_experts,
            ep_size=dist.get_world_size(),
            k=settings.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
            min_capacity=0,
        )
        layer.set_deepspeed_parallelism()
    return layer
