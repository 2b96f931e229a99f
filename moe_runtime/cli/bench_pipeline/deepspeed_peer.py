"""DeepSpeed's pipeline engines as contenders: PipelineModule (1F1B) and DualPipeVModule.

Set up so that `train_batch` does what the others do and no more: FP32, ZeRO 0, no clipping, gradients not
reduced over data-parallel ranks, and an optimizer whose step does nothing.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.cli.bench_pipeline.contenders import Bench, Told, add_sink
from moe_runtime.cli.bench_pipeline.exchange import PlainExchange
from moe_runtime.cli.bench_pipeline.peer_stage import PeerStage
from moe_runtime.cli.bench_pipeline.settings import CONTENDERS, Contender, Settings, run_config
from moe_runtime.parallel.zero_engine import join_process_group


class DeepSpeedPipeline:
    """One engine of DeepSpeed's.

    Args:
        contender: which.
        bench: of this rank.
    """

    said: str | None = None

    def __init__(self, contender: Contender, bench: Bench) -> None:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's launcher would say it; it names a device
        join_process_group()
        import deepspeed  # slow

        self._bench, settings = bench, bench.settings
        self.mesh, self.groups = bench.mesh, bench.groups_of(bench.mesh)
        self._exchange = PlainExchange(settings.num_experts, self.groups.expert)
        module = self._module(contender.chunks)
        self._stages = [part for part in module.modules() if isinstance(part, PeerStage)]
        self.named = [pair for stage in self._stages for pair in stage.chunk.named_parameters()]
        self._engine: Any = deepspeed.initialize(
            model=module,
            optimizer=_Still([param for _, param in self.named], lr=0.0),
            config=_config(settings),
            dist_init_required=False,
        )[0]
        self._engine.pipeline_enable_backward_allreduce = False
        # Only now: the engine has copied one rank's weights to all of a row, experts included.
        add_sink(self.named)
        for stage in self._stages:
            stage.chunk.init_weights(settings.seed)
        bench.share(self.named)
        self._batch = [(tokens, tokens) for tokens in bench.tokens.split(1)]

    def step(self) -> Told:
        """Train a batch."""
        self._exchange.restart()
        loss = self._engine.train_batch(iter(self._batch))
        # The engine tells all ranks the mean of all lanes; one rank of each lane tells it on.
        told = float(loss) if self.mesh.pp_rank == 0 else 0.0
        return self._bench.told(told, self._exchange)

    def _module(self, chunks: int) -> nn.Module:
        """All stages for DeepSpeed to cut; it builds those that this rank holds."""
        from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule
        from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

        settings = self._bench.settings
        config, count = run_config(settings, CONTENDERS["1f1b"]), settings.pp * chunks
        shape = (count, self.mesh.ep_rank, self._exchange)
        return (DualPipeVModule if chunks == 2 else PipelineModule)(
            layers=[LayerSpec(PeerStage, config, stage, *shape) for stage in range(count)],
            topology=PipeDataParallelTopology(num_pp=settings.pp, num_dp=settings.ep),
            loss_fn=self._loss,
            partition_method="uniform",
        )

    def _loss(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return next(stage for stage in self._stages if stage.is_last).loss(hidden, tokens)


class _Still(torch.optim.SGD):
    """Changes nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leave weights as they are."""


def _config(settings: Settings) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.microbatches,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }
