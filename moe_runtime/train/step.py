"""One optimizer step: tokens in, updated weights and one record out.

    loader -> microbatches -> executor (program) -> gradients in FP32 accumulators
           -> tied embedding summed -> expert counts summed -> ZeRO: reduce, norm, clip, AdamW
           -> routing biases moved -> record

Everything that varies over training is a pure function of the step, so that resuming needs the step
number alone.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.config.derive import batch_size_at, tokens_before
from moe_runtime.data.loader import Loader
from moe_runtime.data.vocabulary import Ids
from moe_runtime.errors import DataError
from moe_runtime.model.targets import count_targets, head_names
from moe_runtime.optim.ema import HostEma
from moe_runtime.optim.schedule import bias_gamma_at, lr_at, mtp_lambda_at
from moe_runtime.parallel.executor import StepScalars
from moe_runtime.parallel.expert_load import move_biases
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.stage import ObjectiveWeights
from moe_runtime.parallel.zero import StepResult, ZeroOptimizer
from moe_runtime.schedule.action import Program
from moe_runtime.train.guard.integrity import Integrity
from moe_runtime.train.guard.replay import is_replayed, replay
from moe_runtime.train.guard.skips import Blame, gather_blame
from moe_runtime.train.guard.state import GuardState
from moe_runtime.train.meters.numerics import is_sampled, of_casts, of_gradients
from moe_runtime.train.optim_numerics import is_due, reduce_statistics
from moe_runtime.train.step_record import Record, StepFacts, StepRecorder
from moe_runtime.train.straggler import Straggler, StragglerWatch, peers_of


@dataclass(frozen=True)
class StepPlan:
    """What is due at one step.

    Args:
        step: from 0.
        tokens: trained on before this step.
        batch_size: sequences of this step over all lanes.
        first_sequence: position of the first of them, skipped data not counted.
        num_microbatches: per lane, over all directions.
        applies: False if the config leaves out this step's update.
    """

    step: int
    tokens: int
    batch_size: int
    first_sequence: int
    num_microbatches: int
    lr: float
    gamma: float
    mtp_lambda: float
    applies: bool


class TrainStep:
    """Runs steps on one rank.

    Args:
        runtime: this rank's part of the run.
        optimizer: ZeRO over the runtime's parameters.
        loader: gives any sequence of training by its number.
        guard: knows which data to pass over.
        integrity: holds the state against what it was before each update.
        ema: average of the weights; the next update waits for it, nothing else does.

    Attributes:
        blames: of the newest step, which gradients were not finite, alike on every rank.
    """

    def __init__(
        self,
        runtime: Runtime,
        optimizer: ZeroOptimizer,
        loader: Loader,
        guard: GuardState,
        integrity: Integrity,
        ema: HostEma | None = None,
    ) -> None:
        self.ema = ema
        self.guard = guard
        self.integrity = integrity
        self.runtime = runtime
        self.optimizer = optimizer
        self.loader = loader
        self.blames: list[Blame] = []
        self._bad_data: str | None = None
        self._programs: dict[int, Program] = {}
        self._data_s = 0.0
        self.recorder = StepRecorder(runtime)
        self._watch = _straggler_watch(runtime)
        self.stragglers: list[Straggler] = []

    def plan(self, step: int) -> StepPlan:
        """Everything that is due at `step`, by arithmetic alone."""
        config, mesh = self.runtime.config, self.runtime.mesh
        tokens = tokens_before(config, self.runtime.layout, step)
        batch_size = batch_size_at(config, self.runtime.layout, step)
        return StepPlan(
            step=step,
            tokens=tokens,
            batch_size=batch_size,
            first_sequence=tokens // config.batch.seq_len,
            num_microbatches=batch_size // (mesh.dp * config.batch.micro_batch_size),
            lr=lr_at(config.recipe, config.optim.peak_lr, step, tokens),
            gamma=bias_gamma_at(config.recipe, tokens),
            mtp_lambda=mtp_lambda_at(config.recipe, tokens),
            applies=step + 1 not in config.train.skip_updates,
        )

    def __call__(self, step: int) -> Record:
        """Train one step; gives its record on every rank.

        Raises:
            ActionFailed: an action of the program raised.
            NumericsError: DeepSpeed's gradient norm is not ours, or a rank cannot be trusted.
            StateDamaged: optimizer state is not what it was; nothing has been updated with it.
        """
        begun = time.perf_counter()
        plan, runtime = self.plan(step), self.runtime
        self._data_s = 0.0
        runtime.clock.progress.begins_step(step + 1)
        samples = is_sampled(runtime.config.metrics.numerics_every, step)
        scalars = self._sound_gradients(plan, samples)
        self._sum_tied_embedding()
        total = runtime.load.take_total(runtime.groups.data)
        optim, client = runtime.config.optim, self.optimizer.client
        counts = is_due(optim.numerics, optim.moments, step)
        client.collect_statistics = counts  # type: ignore[attr-defined]
        if self.ema is not None:
            self.ema.join()
        result = self.optimizer.step(plan.lr, plan.applies, measures_updates=samples)
        runtime.clock.meters_s += result.sampling_s
        self.blames = []
        if result.skipped:
            self.blames = gather_blame(result.culprits, runtime, self._bad_data)
        else:
            move_biases(runtime.chunks, runtime.load, total, plan.gamma)
            self.integrity.take()
            if self.ema is not None:
                self.ema.start()
        record = self._record(plan, scalars, total, result, time.perf_counter() - begun)
        record |= of_gradients(result, self.blames)
        if samples and runtime.config.precision == "fp8":
            with runtime.clock.metering():
                record |= of_casts(runtime.fp8_watch, runtime.groups.control, runtime.mesh.world_size)
        if counts:
            own = client.take_statistics()  # type: ignore[attr-defined]
            record["optim_numerics"] = reduce_statistics(own, runtime.groups.control, runtime.mesh.world_size)
        return record

    def _sound_gradients(self, plan: StepPlan, samples: bool) -> StepScalars:
        """Forward and backward, again where the first time cannot be trusted; ends in phase `optimizer`."""
        config, step, watch = self.runtime.config.guard, plan.step + 1, self.runtime.fp8_watch
        watch.begin(samples)
        if is_replayed(config.replay_every, step):
            run = partial(self._forward_backward, plan)
            scalars = replay(run, self.optimizer, self.runtime.peers, step, self.integrity.tell)
        else:
            scalars = self._forward_backward(plan)
        while self.integrity.heals_weights(step):
            scalars = self._forward_backward(plan)
        if samples:
            with self.runtime.clock.metering():
                watch.saw_weights(self.runtime.weight_casts)
        watch.is_on = False
        return scalars

    def _start(self, plan: StepPlan) -> None:
        """Clear what a step counts and adds up."""
        runtime = self.runtime
        runtime.clock.restart(keep_spans=plan.step + 1 == runtime.config.metrics.trace_step)
        runtime.dispatcher.traffic.snapshot(reset=True)
        runtime.load.counts.zero_()
        runtime.meters.clear()
        self.optimizer.zero_grad()

    def _forward_backward(self, plan: StepPlan) -> StepScalars:
        runtime, program = self.runtime, self.program(plan.num_microbatches)
        self._start(plan)
        reading = time.perf_counter()
        rows = self._tokens(plan)
        size = runtime.config.batch.micro_batch_size
        tokens = split_microbatches(rows.to(runtime.device), size, program.num_directions)
        self._data_s += time.perf_counter() - reading
        factors = self._target_factors(rows, plan.batch_size) if self.loader.is_masked else {}
        weights = objective_weights(runtime, plan.num_microbatches, plan.mtp_lambda, factors)
        runtime.clock.progress.enters("step")
        scalars = runtime.executor.run(program, tokens, weights, self.optimizer.end_microbatch)
        if self._bad_data is not None:
            self.optimizer.spoil()
        runtime.clock.progress.enters("optimizer")
        return scalars

    @property
    def newest_program(self) -> Program | None:
        """The last one that was new; None before the first step."""
        return next(reversed(self._programs.values()), None)

    def program(self, num_microbatches: int) -> Program:
        """What a step of so many microbatches a lane runs; a collective call when it is the first."""
        if num_microbatches not in self._programs:
            self._programs[num_microbatches] = self.runtime.program(num_microbatches)
        return self._programs[num_microbatches]

    def _tokens(self, plan: StepPlan) -> Tensor:
        """This lane's rows of the global batch."""
        mesh = self.runtime.mesh
        count = plan.num_microbatches * self.runtime.config.batch.micro_batch_size
        first = plan.first_sequence + mesh.dp_rank * count
        return self._rows(self.guard.skipped_data.numbers(first, count))

    def _target_factors(self, rows: Tensor, batch_size: int) -> dict[str, float]:
        """What makes each head's loss a mean over the targets of the global batch; a collective call."""
        config, mesh = self.runtime.config, self.runtime.mesh
        counts = count_targets(rows, config.batch.seq_len, config.model.mtp_depth)
        if mesh.world_size > 1:
            dist.all_reduce(counts, group=self.runtime.groups.control)
        # All pipeline ranks of a lane have counted the same rows.
        return target_factors(counts // mesh.pp, batch_size * config.batch.seq_len)

    def _rows(self, numbers: Ids) -> Tensor:
        """Tokens of these sequences; zeros in place of bad ones, for the others wait for this rank."""
        self._bad_data = None
        try:
            return self.loader.rows(numbers)
        except DataError as error:
            self._bad_data = str(error)
            return torch.zeros(len(numbers), self.loader.row_tokens, dtype=torch.int64)

    def _sum_tied_embedding(self) -> None:
        """Both copies of a tied embedding get the sum of both gradients, and stay equal."""
        tied, group = self.runtime.tied_embedding, self.runtime.groups.tied
        if tied is not None and group is not None:
            dist.all_reduce(tied.grad_accum, group=group)  # type: ignore[attr-defined]

    def _record(
        self, plan: StepPlan, scalars: StepScalars, total: Tensor, result: StepResult, seconds: float
    ) -> Record:
        facts = StepFacts(
            step=plan.step + 1,
            tokens=plan.tokens + plan.batch_size * self.runtime.config.batch.seq_len,
            new_tokens=plan.batch_size * self.runtime.config.batch.seq_len,
            sequences=plan.batch_size,
            lr=plan.lr,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            seconds=seconds,
            data_s=self._data_s,
            microbatches=plan.num_microbatches * self.runtime.mesh.dp,
        )
        record = self.recorder(facts, scalars, total, self.program(plan.num_microbatches))
        record |= self._learned(facts, record["loss"])
        # The first step of a process says nothing: kernels are compiled and buffers made in it.
        if self._watch is not None and not self.runtime.clock.progress.is_first_step:
            self.stragglers = self._watch.update(self.recorder.work_s)
            record["straggler_ratio"], record["straggler_rank"] = self._watch.worst
        return record

    def _learned(self, facts: StepFacts, loss: float) -> Record:
        """What the guard and the data know of a step."""
        self.guard.skipped_steps += facts.skipped
        read = self.guard.skipped_data.number(facts.tokens // self.runtime.config.batch.seq_len)
        return {
            "spike_z": self.guard.spike_z(loss),
            "skipped_steps": self.guard.skipped_steps,
            "epoch": max(self.loader.epochs(read).values()),
        }


def _straggler_watch(runtime: Runtime) -> StragglerWatch | None:
    """None where there is nobody to compare with, or nothing to compare by."""
    mesh, ratio = runtime.mesh, runtime.config.reliability.straggler_ratio
    if ratio is None or mesh.world_size == 1 or runtime.device.type != "cpu":
        return None
    return StragglerWatch(peers_of(mesh.data_groups(), mesh.world_size), ratio)


def target_factors(counts: Tensor, positions: int) -> dict[str, float]:
    """Positions over targets, by the name of the head; 0 for one without any target, which learns nothing.

    Args:
        counts: targets of each head in the global batch, from `count_targets`.
        positions: tokens of the global batch.
    """
    names = head_names(len(counts) - 1)
    return {
        name: positions / count if count else 0.0 for name, count in zip(names, counts.tolist(), strict=True)
    }


def objective_weights(
    runtime: Runtime, num_microbatches: int, mtp_lambda: float, factors: Mapping[str, float] | None = None
) -> ObjectiveWeights:
    """Derivatives of the objective, so that ZeRO's mean over data-parallel ranks is the batch mean.

    A stage's gradients come from `dp` lanes and, when mirrored, from both rows: ZeRO divides by all of
    these ranks, so each microbatch counts one over the microbatches of one direction.
    """
    directions = 2 if runtime.mesh.is_mirrored else 1
    scale = directions / num_microbatches
    depth = max(1, runtime.config.model.mtp_depth)
    return ObjectiveWeights(
        loss=scale,
        loss_mtp=scale * mtp_lambda / depth,
        balance=scale * runtime.config.recipe.balance_alpha,
        factors=factors or {},
    )


def split_microbatches(rows: Tensor, size: int, directions: int) -> list[list[Tensor]]:
    """Cut [sequences, tokens] into `directions` lists of microbatches of `size` sequences."""
    microbatches = list(torch.split(rows, size))
    per_direction = len(microbatches) // directions
    return [microbatches[d * per_direction : (d + 1) * per_direction] for d in range(directions)]
