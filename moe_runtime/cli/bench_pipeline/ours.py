"""Our executor as a contender: a schedule by name, pairs merged or not."""

import torch

from moe_runtime.build import build_mesh, build_runtime
from moe_runtime.cli.bench_pipeline.contenders import Bench, Told
from moe_runtime.cli.bench_pipeline.settings import Contender, run_config
from moe_runtime.config.layout import check_layout
from moe_runtime.train.step import objective_weights, split_microbatches


class Ours:
    """One schedule of ours.

    Args:
        contender: which.
        bench: of this rank.
    """

    def __init__(self, contender: Contender, bench: Bench) -> None:
        settings = bench.settings
        config = run_config(settings, contender)
        layout = check_layout(config, settings.world_size)
        self.mesh = build_mesh(layout, bench.rank)
        self.groups = bench.groups_of(self.mesh)
        cpu = torch.device("cpu")
        self._runtime = build_runtime(config, layout, self.mesh, self.groups, cpu, ranks_per_node=1)
        self.named = self._runtime.named_params
        bench.share(self.named)
        self._program = self._runtime.program(settings.microbatches)
        self.said = self._runtime.chosen
        self._tokens = split_microbatches(bench.tokens, 1, self._program.num_directions)
        self._weights = objective_weights(self._runtime, settings.microbatches, 0.0)

    def step(self) -> Told:
        """Run the program."""
        runtime = self._runtime
        clock = runtime.clock
        clock.restart(keep_spans=True)
        scalars = runtime.executor.run(self._program, self._tokens, self._weights)
        traffic = runtime.dispatcher.traffic.snapshot(reset=True)
        return Told(
            loss=scalars.totals.get("loss", 0.0) / runtime.layout.num_microbatches,
            exchange_s=clock.exchange_s,
            exchange_wait_s=clock.exchange_wait_s,
            transfer_wait_s=clock.transfer_wait_s,
            exchange_bytes=traffic.all_bytes_intra + traffic.all_bytes_inter,
            spans=clock.spans,
            program=self._program.to_text(),
        )
