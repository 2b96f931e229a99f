"""Records of a few steps as every rank holds them, and the reductions that they took."""

from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.open_run import open_run
from moe_runtime.config.load import load_config
from moe_runtime.parallel.world import World
from moe_runtime.train.step_record import StepRecorder

Records = list[dict[str, Any]]


def steps_of(
    rank: int, world_size: int, config: str, trials: tuple[tuple[str, ...], ...], steps: int
) -> list[tuple[Records, list[int]]]:
    """For each list of overrides: the records of so many steps, and the reductions of each record."""
    return [_steps(rank, world_size, config, overrides, steps) for overrides in trials]


def _steps(
    rank: int, world_size: int, config: str, overrides: tuple[str, ...], steps: int
) -> tuple[Records, list[int]]:
    world = World(rank, world_size, rank, world_size, torch.device("cpu"))
    run = open_run(load_config(config, overrides), world, fresh=True)
    counting = run.step.recorder = Counting(run.step.recorder)  # type: ignore[assignment]
    records = [run.step(step) for step in range(steps)]
    run.recorder.close()
    return records, counting.counts


class Counting:
    """Makes records as the one that it is put before, and counts the reductions within each making."""

    def __init__(self, recorder: StepRecorder) -> None:
        self._recorder = recorder
        self.counts: list[int] = []

    def __call__(self, *args: Any) -> dict[str, Any]:
        reduce = dist.all_reduce
        self.counts.append(0)

        def counting(*args: Any, **options: Any) -> Any:
            self.counts[-1] += 1
            return reduce(*args, **options)

        dist.all_reduce = counting
        try:
            return self._recorder(*args)
        finally:
            dist.all_reduce = reduce

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)
