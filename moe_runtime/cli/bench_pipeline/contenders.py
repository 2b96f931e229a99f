"""Everybody in the race, behind one face; and what they have in common on a rank."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from moe_runtime.cli.bench_pipeline.exchange import PlainExchange
from moe_runtime.cli.bench_pipeline.settings import Contender, Settings
from moe_runtime.parallel.clock import Span
from moe_runtime.parallel.mesh import Groups, Mesh, open_groups
from moe_runtime.parallel.weight_grad import WeightGradSink, ensure_accumulator


@dataclass(frozen=True)
class Told:
    """What a contender says of its last step on this rank.

    Args:
        loss: sum over the microbatches whose loss was computed here, over the number of microbatches.
        exchange_s: seconds in which exchanges of tokens were under way.
        exchange_wait_s: seconds in which this rank stood still for an exchange of tokens.
        transfer_wait_s: the same for what goes from stage to stage; None: the peer does not say.
        exchange_bytes: sent to other ranks in exchanges.
        spans: (lane, name, start, end) of all that was done; None: the peer does not say.
        program: what ran, as text; ours alone.
    """

    loss: float
    exchange_s: float
    exchange_wait_s: float
    transfer_wait_s: float | None
    exchange_bytes: int
    spans: list[Span] | None = None
    program: str = ""


class Runner(Protocol):
    """A contender that is set up on this rank.

    Attributes:
        named: canonical name and parameter of all that is held here.
        groups: of its mesh.
        mesh: its mesh.
        said: how it came to its program, where that was searched for.
    """

    named: list[tuple[str, Parameter]]
    groups: Groups
    mesh: Mesh
    said: str | None

    def step(self) -> Told:
        """Forward and backward of all microbatches; gradients are added to the accumulators."""
        ...


class Bench:
    """What all contenders share on a rank: the batch, the weights, their gradients, the groups.

    There is one copy of the weights and one of their accumulated gradients, which contenders use in turn:
    nobody changes weights, and memory does not grow with the number of contenders.

    Args:
        settings: of the measurement.
        rank: this rank.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        draw = torch.Generator().manual_seed(settings.seed)
        shape = (settings.ep, settings.microbatches, settings.seq_len + 1)
        lanes = torch.randint(0, settings.vocab, shape, generator=draw)
        self.mesh = Mesh(settings.pp, settings.ep, settings.ep, False, rank)
        self.tokens: Tensor = lanes[self.mesh.dp_rank]  # [microbatches, seq_len + 1]
        self._weights: dict[str, Tensor] = {}
        self._grads: dict[str, Tensor] = {}
        self._groups: dict[Mesh, Groups] = {}

    def groups_of(self, mesh: Mesh) -> Groups:
        """The process groups of a mesh; contenders of like meshes share them."""
        if mesh not in self._groups:
            self._groups[mesh] = open_groups(mesh)
        return self._groups[mesh]

    def share(self, named: Iterable[tuple[str, Parameter]]) -> None:
        """Let these parameters use the one copy of weights and gradients."""
        for name, param in named:
            param.data = self._weights.setdefault(name, param.data)
            param.grad_accum = self._grads.setdefault(name, ensure_accumulator(param))  # type: ignore[attr-defined]

    def clear_gradients(self) -> None:
        """Take the gradients of the last step away."""
        for grad in self._grads.values():
            grad.zero_()

    def told(self, loss: float, exchange: PlainExchange) -> Told:
        """What a peer says, whose exchanges are waited for from beginning to end."""
        return Told(loss, exchange.wait_s, exchange.wait_s, None, exchange.sent_bytes)


def add_sink(named: Iterable[tuple[str, Parameter]]) -> WeightGradSink:
    """Let weight gradients of a peer's modules be added up as ours are, in place."""
    sink = WeightGradSink()
    sink.install(param for _, param in named)
    return sink


def open_runner(contender: Contender, bench: Bench) -> Runner:
    """Set up a contender on this rank; all ranks call this together."""
    if contender.family == "ours":
        from moe_runtime.cli.bench_pipeline.ours import Ours

        return Ours(contender, bench)
    if contender.family == "torch":
        from moe_runtime.cli.bench_pipeline.torch_peer import TorchPipeline

        return TorchPipeline(contender, bench)
    from moe_runtime.cli.bench_pipeline.deepspeed_peer import DeepSpeedPipeline  # seconds to import

    return DeepSpeedPipeline(contender, bench)


def gradient_squares(runner: Runner) -> dict[str, float]:
    """This rank's share of the squared norm of each parameter's gradient, averaged as ZeRO does.

    A gradient is summed over the ranks that hold the parameter and divided by the ranks that hold its
    stage; each of those who then hold the same sum tells an equal part.
    """
    squares: dict[str, float] = {}
    for name, param in runner.named:
        grad = param.grad_accum.clone()  # type: ignore[attr-defined]
        is_expert = getattr(param, "is_expert", False)
        group = runner.groups.expert_data if is_expert else runner.groups.data
        dist.all_reduce(grad, group=group)
        squares[name] = float((grad / runner.mesh.replicas).double().square().sum()) / group.size()
    return squares
