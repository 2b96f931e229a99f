"""torch.distributed.pipelining as a contender.

At its best: shapes are told beforehand, and stages defer their own weight gradients (`dw_builder`, which
is there for that), by the same closures that our W actions run. Left to walk the autograd graph it would
keep the graph alive and run every backward of a Function twice, once for inputs and once for weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from moe_runtime.cli.bench_pipeline.contenders import Bench, Told, add_sink
from moe_runtime.cli.bench_pipeline.exchange import PlainExchange
from moe_runtime.cli.bench_pipeline.peer_stage import PeerStage, held_stages
from moe_runtime.cli.bench_pipeline.settings import CONTENDERS, Contender, run_config
from moe_runtime.parallel.weight_grad import WeightGrads, run_weight_grads


class TorchPipeline:
    """One schedule of torch's.

    Args:
        contender: which; its `schedule` is torch's name for it.
        bench: of this rank.
    """

    said: str | None = None

    def __init__(self, contender: Contender, bench: Bench) -> None:
        self._settings, self._tokens = bench.settings, bench.tokens
        self._bench = bench
        self.mesh, self.groups = bench.mesh, bench.groups_of(bench.mesh)
        self._exchange = PlainExchange(bench.settings.num_experts, self.groups.expert)
        self._late: WeightGrads = []
        self._stages = self._open_stages(contender.chunks)
        self.named = [pair for stage in self._stages for pair in stage.chunk.named_parameters()]
        self._sink = add_sink(self.named)
        bench.share(self.named)
        count = bench.settings.pp * contender.chunks
        places = held_stages(self.mesh.pp_rank, bench.settings.pp, contender.chunks)
        stages = [self._place(stage, place, count) for stage, place in zip(self._stages, places, strict=True)]
        make = get_schedule_class(contender.schedule)
        self._schedule: Any = make(
            stages if contender.chunks > 1 else stages[0],  # type: ignore[arg-type]
            bench.settings.microbatches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    def step(self) -> Told:
        """Run the schedule."""
        self._exchange.restart()
        losses: list[Tensor] = []
        first = [self._tokens] if any(stage.is_first for stage in self._stages) else []
        last = {"target": self._tokens, "losses": losses} if self._last() else {}
        with self._sink.collect(self._late):
            self._schedule.step(*first, **last, return_outputs=False)
        assert not self._late, "a weight gradient was left over"
        loss = float(torch.stack(losses).detach().sum()) if losses else 0.0
        return self._bench.told(loss, self._exchange)

    def _open_stages(self, chunks: int) -> list[PeerStage]:
        settings = self._settings
        config = run_config(settings, CONTENDERS["1f1b"])
        return [
            PeerStage(config, stage, settings.pp * chunks, self.mesh.ep_rank, self._exchange)
            for stage in held_stages(self.mesh.pp_rank, settings.pp, chunks)
        ]

    def _place(self, stage: PeerStage, number: int, count: int) -> PipelineStage:
        settings = self._settings
        stream = torch.empty(1, settings.seq_len, settings.hidden, requires_grad=True)
        tokens = torch.empty(1, settings.seq_len + 1, dtype=torch.int64)
        return PipelineStage(
            stage,
            number,
            count,
            torch.device("cpu"),
            input_args=tokens if stage.is_first else stream,
            output_args=stream,
            group=self.groups.pipe_up,
            dw_builder=self._defer,
        )

    def _defer(self) -> Callable[[], None]:
        """What the backward just run has left for later."""
        left = list(self._late)
        self._late.clear()
        return lambda: run_weight_grads(left)

    def _last(self) -> PeerStage | None:
        return next((stage for stage in self._stages if stage.is_last), None)

    def _loss(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        last = self._last()
        assert last is not None
        return last.loss(hidden, tokens) / self._settings.microbatches
