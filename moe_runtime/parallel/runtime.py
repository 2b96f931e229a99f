"""Everything of one rank that a training step touches."""

from dataclasses import dataclass

import torch
from moe_comm.dispatcher import Dispatcher
from torch.nn import Parameter

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError, ScheduleError
from moe_runtime.fp8.watch import Fp8Watch
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.clock import Clock
from moe_runtime.parallel.executor import Executor
from moe_runtime.parallel.expert_load import ExpertLoad
from moe_runtime.parallel.mesh import Groups, Mesh
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.router_meters import RouterMeters
from moe_runtime.planner.choose import choose
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.passes import lower, unpair


@dataclass
class Runtime:
    """Everything of one rank that a training step touches.

    Args:
        chunks: stage -> module, in ascending stage order.
        named_params: canonical name -> parameter, each object once, in ascending stage order.
        weight_casts: FP8 forms of the weights; dropped whenever weights change.
        fp8_watch: counts what casts to FP8 do, in sampled steps.
        tied_embedding: the embedding that first and last stage hold a copy of each, or None.
        executor: runs training and validation programs.
        meters: of the routers, filled by every training forward.
        sampler: runs forwards that end with the normed stream, before head and MTP.
        chosen: how the newest program was chosen, in one line, where a search chose it.
    """

    config: RunConfig
    layout: ResolvedLayout
    mesh: Mesh
    groups: Groups
    device: torch.device
    chunks: dict[int, Transformer]
    named_params: list[tuple[str, Parameter]]
    tied_embedding: Parameter | None
    weight_casts: WeightCasts
    fp8_watch: Fp8Watch
    load: ExpertLoad
    meters: RouterMeters
    clock: Clock
    dispatcher: Dispatcher
    executor: Executor
    sampler: Executor
    chosen: str | None = None

    @property
    def peers(self) -> Peers:
        """All ranks of the run."""
        return Peers(self.mesh.rank, self.mesh.world_size, self.groups.control)

    def program(self, num_microbatches: int) -> Program:
        """This run's schedule for a number of microbatches a lane, checked, with transfers.

        A collective call: where a search chooses, rank 0 searches and tells the others.
        """
        config, layout, peers = self.config, self.layout, self.peers
        said: list[str | None] = []

        def search() -> None:
            choice = choose(config.model, config.layout, layout, num_microbatches)
            said.extend((choice.program.to_text(), choice.said))

        if layout.schedule in ("auto", "searched"):
            peers.first_does(search, (ConfigError, ScheduleError))
            text, self.chosen = peers.first_says(said)
            program = Program.from_text(text)
        else:
            program = choose(config.model, config.layout, layout, num_microbatches).program
        return lower(program if config.layout.overlap else unpair(program))
