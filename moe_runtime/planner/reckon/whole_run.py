"""A whole run in time and money: its steps, smaller while the batch ramps, and what failures take.

A step of M microbatches takes a + b M: the pipeline fills and empties once. So a ramp is reckoned from two
simulated steps, at its start and at its end.
"""

from dataclasses import dataclass

from moe_runtime.config.derive import batch_levels, tokens_before, total_steps
from moe_runtime.planner.reckon.failures import Reliability, reliability
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.step import Step, reckon_step, run_program

HOUR_S = 3600.0


@dataclass(frozen=True)
class WholeRun:
    """Training time of a run, and all that goes with it.

    Args:
        tokens: of all steps.
        steps: number of them.
        steady_gpu_hours: if every step had the full batch; what reports give.
        gpu_hours: with the ramp's smaller batches.
        failures: what they take of the wall time.
        price: US$ an hour of one accelerator.
    """

    tokens: int
    steps: int
    steady_gpu_hours: float
    gpu_hours: float
    failures: Reliability
    price: float

    @property
    def gpu_hours_with_failures(self) -> float:
        """GPU hours of wall time: saves, work done twice and restarts too."""
        return self.gpu_hours / self.failures.training_share

    def cost(self, gpu_hours: float) -> float:
        """US$."""
        return gpu_hours * self.price


def whole_run(machine: Machine, step: Step, imbalance: float = 1.0) -> WholeRun:
    """The run that a config asks for.

    Args:
        step: one after the ramp.
    """
    config, layout = machine.config, machine.layout
    steps = total_steps(config, layout)
    tokens = tokens_before(config, layout, steps)
    per_step = config.batch.global_batch_size * config.batch.seq_len
    gpus = layout.world_size
    return WholeRun(
        tokens=tokens,
        steps=steps,
        steady_gpu_hours=tokens / per_step * step.seconds * gpus / HOUR_S,
        gpu_hours=_training_s(machine, step, steps, imbalance) * gpus / HOUR_S,
        failures=reliability(machine.cluster.failures, machine.num_nodes, machine.world),
        price=machine.cluster.price_usd_hour.burden(machine.world),
    )


def _training_s(machine: Machine, step: Step, steps: int, imbalance: float) -> float:
    """Seconds of all steps."""
    layout = machine.layout
    first, last = layout.num_microbatches_start, layout.num_microbatches
    if first == last:
        return steps * step.seconds
    small = reckon_step(machine, run_program(machine, first), imbalance).seconds
    each = (step.seconds - small) / (last - first)
    lane = layout.dp * machine.config.batch.micro_batch_size
    levels = batch_levels(machine.config, layout, steps)
    return sum(count * (small + each * (size // lane - first)) for count, size in levels)
