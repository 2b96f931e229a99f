"""The training loop: resume, step, validate, sample, save, until the end or until asked to stop."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from moe_runtime.config.schema import RunConfig
from moe_runtime.data.baseline import order1_bits_per_byte
from moe_runtime.data.bits import ByteCounter
from moe_runtime.errors import DataError, NumericsError, PeerLost
from moe_runtime.fp8.which_path import which_path
from moe_runtime.metrics.files import TRACE_FILE
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.parallel.heartbeat import STATUS_DIR
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.watchdog import Watchdog
from moe_runtime.parallel.world import shared_store
from moe_runtime.planner.trace import write_trace
from moe_runtime.train.alerting import Alarm
from moe_runtime.train.checkpoints import RunCheckpoints
from moe_runtime.train.guard.guard import Guard
from moe_runtime.train.guard.integrity import StateDamaged
from moe_runtime.train.guard.roll_back import RollBack
from moe_runtime.train.open_data import RunData
from moe_runtime.train.optim_numerics import Report, check_report
from moe_runtime.train.preempted import leave_marker
from moe_runtime.train.sample import sample_tokens
from moe_runtime.train.saving import TrainingState
from moe_runtime.train.step import TrainStep
from moe_runtime.train.stopping import StopRequest
from moe_runtime.train.tracing import collect_trace
from moe_runtime.train.validate import Validation, validate_sets


@dataclass
class Run:
    """A run that is ready to step.

    Args:
        start: steps already done.
        end: steps to do in all.
        lock: keeps other processes out of the run folder as long as it lives; rank 0 only.
        latest: the newest validation, if it was made in this process.
    """

    config: RunConfig
    state: TrainingState
    step: TrainStep
    data: RunData
    checkpoints: RunCheckpoints
    recorder: Recorder
    guard: Guard
    alarm: Alarm
    roll_back: RollBack
    start: int
    end: int
    lock: TextIO | None
    latest: Validation | None = None

    @property
    def runtime(self) -> Runtime:
        return self.state.runtime


def train(run: Run) -> bool:
    """Train from where the run stands to its end; call within `join_world` on every rank.

    Returns:
        Whether the end was reached; else it was stopped, and is saved.

    Raises:
        CheckpointError: the last checkpoint could not be written.
        PeerLost: the launchers of some machines are gone; the others can go on from what was saved.
    """
    with StopRequest() as stop, nullcontext() if STATUS_DIR in os.environ else _watchdog(run):
        try:
            steps_done = _loop(run, stop)
        except (NumericsError, DataError):  # the ranks live: what they write is good
            run.checkpoints.settle()
            raise
    if steps_done == run.end:
        _finish(run)
    else:
        message = f"stopped at step {steps_done}; the same command continues"
        run.recorder.event("stopped", step=steps_done)
        run.recorder.say(message)
    orphaned = run.state.peers.gather_json(stop.is_orphaned)
    run.recorder.close()
    run.checkpoints.check()
    if steps_done < run.end and any(orphaned) and not all(orphaned):
        raise PeerLost(
            f"rank {orphaned.index(True)}: the launcher of its machine is gone; saved at step {steps_done}"
        )
    if stop.is_preemption and STATUS_DIR not in os.environ and run.state.peers.is_first:
        leave_marker(Path(run.config.out_dir) / run.config.name, steps_done)  # else the launcher does
    return steps_done == run.end


def _watchdog(run: Run) -> Watchdog:
    """For ranks without a launcher of ours, which would watch them from outside."""
    mesh, limit_s = run.runtime.mesh, run.config.train.watchdog_s
    place = f"pp {mesh.pp_rank}, dp {mesh.dp_rank}"
    return Watchdog(shared_store(), run.runtime.clock, mesh.rank, mesh.world_size, place, limit_s)


def _loop(run: Run, stop: StopRequest) -> int:
    """Step until the end or the wish to stop; gives the steps done."""
    step, stopping = run.start, False
    while step < run.end and not stopping:
        try:
            step, stopping = _advance(run, step, stop)
        except StateDamaged as damage:
            step = run.roll_back.same_data(step, str(damage))
    run.checkpoints.settle()
    return step


def _advance(run: Run, step: int, stop: StopRequest) -> tuple[int, bool]:
    """One step and what is due after it; gives the steps done, fewer after a roll-back, and whether to stop.

    Raises:
        StateDamaged: optimizer state is not what it was.
    """
    every = run.config.train
    record = run.step(step)
    step += 1
    _tell_choice(run)
    _tell_stragglers(run, step)
    if step == run.start + 1:
        _tell_fp8(run)
    if step == run.config.metrics.trace_step:
        _trace(run, step)
    is_last = step == run.end
    if is_last or (every.eval_every and step % every.eval_every == 0):
        run.latest = _validate(run)
        record |= run.latest.record()
    run.recorder.step(record)
    with run.runtime.clock.metering():
        run.recorder.expert_load(step, run.step.recorder.expert_load)
    run.checkpoints.tell()
    verdict = run.alarm.judge(record, stop.wanted)
    stopping = verdict.stops
    is_spike = run.guard.finds_spike(record, run.step.blames)
    if is_spike or (verdict.calls_for("roll_back") and _may_roll_back(run, step)):
        back = run.roll_back.past_data(step)
        if back is not None:
            return back, stopping
    _check_numerics(run, step, record.get("optim_numerics"))
    if every.sample_every and step % every.sample_every == 0 and not is_last:
        _sample(run, step)
    is_due = every.checkpoint_every > 0 and step % every.checkpoint_every == 0
    saving = is_last or stopping or is_due or verdict.calls_for("checkpoint")
    if run.step.integrity.is_compared(step, saving):
        run.step.integrity.compare(step)
    if saving:
        run.checkpoints.begin(step)
    verdict.end(step)
    return step, stopping


def _may_roll_back(run: Run, step: int) -> bool:
    """An alert calls for a roll-back: False if there were as many as the config allows."""
    allowed = run.config.guard.spike_max
    if run.state.guard.roll_backs < allowed:
        return True
    run.recorder.tell(
        "no_roll_back", step, f"guard.spike_max: {allowed} roll-backs were done; training goes on"
    )
    return False


def _check_numerics(run: Run, step: int, report: Report | None) -> None:
    """Warn of FP8 moments that go wrong, or end the run before it saves them.

    Raises:
        NumericsError: beyond a limit of optim.numerics.stop; on every rank alike.
    """
    if not report:
        return
    try:
        warnings = check_report(report, run.config.optim.numerics)
    except NumericsError as error:
        run.recorder.event("optim_numerics", step=step, message=str(error), stops=True)
        raise
    for message in warnings:
        run.recorder.event("optim_numerics", step=step, message=message, stops=False)
        run.recorder.say(f"step {step}: warning: {message}")


def _tell_stragglers(run: Run, step: int) -> None:
    """Ranks that have become slow, or are so no more: they slow down all others, and only this says which."""
    for found in run.step.stragglers:
        what = "is slow" if found.is_slow else "is no longer slow"
        message = (
            f"rank {found.rank} {what}: its own work takes {found.ratio:.1f} times as long as its peers'"
        )
        run.recorder.event("straggler", step=step, rank=found.rank, ratio=found.ratio, is_slow=found.is_slow)
        run.recorder.say(f"step {step}: {message}")


def _tell_choice(run: Run) -> None:
    """How the program of the step was chosen, once for each program that a search chose."""
    said, run.runtime.chosen = run.runtime.chosen, None
    if said is not None:
        run.recorder.event("schedule", message=said)
        run.recorder.say(said)


def _tell_fp8(run: Run) -> None:
    """Which FP8 products the first step ran, once in a process."""
    if run.config.precision == "fp8":
        said = which_path(run.runtime.device)
        run.recorder.event("fp8", message=said)
        run.recorder.say(said)


def _trace(run: Run, step: int) -> None:
    """Write the spans of the step just done; the file is for people, so its loss is told and no more."""
    num_microbatches = run.step.plan(step - 1).num_microbatches
    trace = collect_trace(run.runtime, run.state.peers, run.step.program(num_microbatches), step)
    run.runtime.clock.restart()
    if trace is None:
        return
    run.recorder.timeline(trace)
    path = Path(run.config.out_dir) / run.config.name / TRACE_FILE
    try:
        write_trace(trace, path)
    except OSError as error:
        run.recorder.say(f"step {step}: no trace: {path} cannot be written ({error.strerror})")
    else:
        run.recorder.event("trace", step=step, path=str(path))


def _baseline(run: Run) -> dict[str, float]:
    """Bits per byte of the order-1 model of each trained set, on rank 0; the others wait as long as it takes.

    It predicts every byte, so none is told beside a loss over some of the text.
    """
    scores: dict[str, float] = {}

    def score() -> None:
        for name, train in run.data.datasets.items():
            validation = run.data.validation.loaders[name].dataset
            if not validation.is_masked:
                scores[name] = order1_bits_per_byte(train, validation, run.data.tokenizer)

    run.state.peers.first_does(score, (DataError,))
    return scores


def _validate(run: Run) -> Validation:
    run.runtime.clock.progress.enters("evaluate")
    counter = ByteCounter(run.data.tokenizer)
    return validate_sets(run.runtime, run.data.validation, counter, run.config.train.eval_sequences)


def _sample(run: Run, step: int) -> None:
    run.runtime.clock.progress.enters("sample")
    every = run.config.train
    tokenizer = run.data.tokenizer
    prompt = [int(token) for token in tokenizer.encode(every.sample_prompt)] or [tokenizer.eos_id]
    drawn = sample_tokens(run.runtime, prompt, every.sample_tokens, run.config.seed)
    run.recorder.sample(step, every.sample_prompt + tokenizer.decode(drawn))


def _finish(run: Run) -> None:
    """What a finished run says: loss in bits per byte beside a plain baseline, and a sample."""
    result = run.latest or _validate(run)
    run.runtime.clock.progress.enters("end")
    baselines = _baseline(run)
    baseline = baselines.get("")
    own = {"val_bpb": result.bits_per_byte} | ({} if baseline is None else {"order1_bpb": baseline})
    run.recorder.event("finished", step=run.end, **own)
    run.recorder.say(f"validation: {_said(result, baseline)}")
    for name, one in result.sets.items():
        run.recorder.say(f"  {name}: {_said(one, baselines.get(name))}")
    _sample(run, run.end)


def _said(result: Validation, baseline: float | None) -> str:
    """A loss for people; beside it that of the order-1 model, NaN where another rank knows it."""
    said = f"{result.bits_per_byte:.3f} bits per byte, loss {result.loss:.4f}"
    if baseline is None:
        return said
    return f"{said} (order-1 byte model on the same shards: {baseline:.3f} bits per byte)"
