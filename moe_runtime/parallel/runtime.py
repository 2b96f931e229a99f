"""Everything of one rank that a training step touches."""

from dataclasses import dataclass

import torch
from moe_comm.dispatcher import Dispatcher
from torch.nn import Parameter

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.clock import Clock
from moe_runtime.parallel.executor import Executor
from moe_runtime.parallel.expert_load import ExpertLoad
from moe_runtime.parallel.mesh import Groups, Mesh
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.builders import build
from moe_runtime.schedule.passes import lower, unpair


@dataclass
class Runtime:
    """Everything of one rank that a training step touches.

    Args:
        chunks: stage -> module, in ascending stage order.
        named_params: canonical name -> parameter, each object once, in ascending stage order.
        tied_embedding: the embedding that first and last stage hold a copy of each, or None.
        executor: runs training and validation programs.
        sampler: runs forwards that end with the normed stream, before head and MTP.
    """

    config: RunConfig
    layout: ResolvedLayout
    mesh: Mesh
    groups: Groups
    device: torch.device
    chunks: dict[int, Transformer]
    named_params: list[tuple[str, Parameter]]
    tied_embedding: Parameter | None
    load: ExpertLoad
    clock: Clock
    dispatcher: Dispatcher
    executor: Executor
    sampler: Executor

    def program(self, num_microbatches: int) -> Program:
        """This run's schedule for a number of microbatches a lane, checked, with transfers."""
        layout = self.config.layout
        program = build(self.layout.schedule, self.mesh.pp, num_microbatches, layout.chunks)
        return lower(program if layout.overlap else unpair(program))
