"""Judges every attempt of a run, and makes the next one."""

import time
from dataclasses import replace

from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousTimeoutError,
)

from moe_runtime.cli.rank_output import last_words, log_path
from moe_runtime.cli.supervise.agent import Agent, End
from moe_runtime.cli.supervise.blame import find_blame
from moe_runtime.cli.supervise.job import Job
from moe_runtime.cli.supervise.journal import Journal
from moe_runtime.cli.supervise.meeting_place import Change, MeetingPlace
from moe_runtime.cli.supervise.outcome import Outcome, explain_end, read_statuses
from moe_runtime.cli.supervise.policy import RestartPolicy
from moe_runtime.cli.supervise.signals import Wishes
from moe_runtime.config.secrets import redact
from moe_runtime.train.preempted import leave_marker

_MOST_WORDS = 300  # characters


class Supervisor:
    """Keeps a job alive.

    Args:
        job: what is run.
        agent: runs one attempt at a time.
        meeting: where its attempts begin.
        wishes: what the user or the scheduler asked for.
    """

    def __init__(self, job: Job, agent: Agent, meeting: MeetingPlace, wishes: Wishes) -> None:
        self._job, self._agent, self._meeting, self._wishes = job, agent, meeting, wishes
        self._dp: int | None = None
        self._journal = Journal(job.run_dir)
        limits = job.reliability
        self._policy = RestartPolicy(limits.restarts, limits.back_off_s, self._journal.checkpoint_step())

    def run(self) -> Outcome:
        """Attempt after attempt, until one ends the run."""
        while True:
            try:
                outcome = self._judge(self._agent.attempt(self._begins))
            except (RendezvousClosedError, RendezvousGracefulExitError):
                return self._meeting.told()
            except RendezvousTimeoutError:
                limit_s = self._job.timeout_s
                outcome = Outcome(3, f"not enough machines came within {limit_s:.0f} s", "start the others")
            if outcome is not None:
                self._meeting.tell(outcome)
                return outcome

    def _begins(self) -> None:
        """Tell of a layout that is not the last one's: machines are missing, or came back."""
        shape, config = self._agent.shape, self._job.config
        if shape is None or config is None or shape.dp == (self._dp or config.layout.dp):
            return
        kind = "shrink" if shape.dp < (self._dp or config.layout.dp) else "grow"
        self._dp = shape.dp
        machines, number = self._agent.machines, self._meeting.attempt
        idle = machines * self._job.ranks - shape.world_size
        spare = f"; {idle} processes stand by" if idle else ""
        text = f"dp {shape.dp} of {config.layout.dp} on {machines} machines, the same global batch{spare}"
        self._journal.say(f"attempt {number}: {text}")
        self._journal.event(kind, attempt=number, dp=shape.dp, machines=machines, standing_by=idle)

    def _judge(self, end: End) -> Outcome | None:
        """What an end of all ranks means for the run; None: another attempt."""
        if end.hang is not None:
            outcome = Outcome(3, end.hang.text, rank=end.hang.rank)
        elif end.failed:
            outcome = self._explain(end)
        else:
            return self._leave(end)
        step = self._journal.steps_done()
        if self._wishes.to_stop:
            return outcome
        blame = find_blame(outcome, end.failed, read_statuses(end.status_dir), end.hang, end.status_dir)
        decision = self._policy.judge(outcome, step, self._journal.checkpoint_step())
        cause = blame.tell(outcome.cause.strip())
        codes = {str(rank): code for rank, code in end.failed.items()}
        fault = {"attempt": end.attempt, "step": step, "cause": cause, "exit_codes": codes}
        self._journal.event("fault", **fault, **blame.fields())
        if not decision.restart:
            remedy = "; ".join(filter(None, (decision.reason, outcome.remedy)))
            return Outcome(outcome.code, outcome.cause, remedy, outcome.rank)
        wait = f" in {decision.wait_s:g} s" if decision.wait_s else ""
        self._journal.say(f"attempt {end.attempt} failed after step {step}: {cause}")
        self._journal.say(f"attempt {end.attempt + 1} begins{wait} ({decision.reason})")
        self._journal.event(
            "restart", attempt=end.attempt + 1, wait_s=decision.wait_s, reason=decision.reason
        )
        time.sleep(decision.wait_s)
        return None

    def _explain(self, end: End) -> Outcome:
        """Why ranks failed; of one that could not say it itself, what its log says last."""
        statuses = read_statuses(end.status_dir)
        outcome = explain_end(end.failed, statuses, self._wishes.to_stop)
        rank, run_dir = outcome.rank, self._job.run_dir
        if rank is None or rank in statuses or run_dir is None:
            return outcome
        words = redact(last_words(run_dir, rank))[:_MOST_WORDS]
        if not words:
            return outcome
        said = f"{outcome.cause}; its last words, in {log_path(run_dir, rank)}: {words}"
        return replace(outcome, cause=said)

    def _leave(self, end: End) -> Outcome | None:
        """Ranks ended well, or because of other machines; None: go on with those that are there."""
        if self._wishes.to_stop:
            self._mark(end)
            return Outcome(0)
        if end.stopped:  # this machine was not asked to: another was, or one more came
            change = end.change or self._meeting.changed()
            if change is None:
                return Outcome(0)
        elif end.change in (None, Change.CAME) and self._meeting.all_done():
            return Outcome(0)
        else:
            change = end.change or self._meeting.changed()
        cause = Change.LEFT if change is None else change
        self._journal.say(f"attempt {end.attempt} ended: {cause.value}")
        kind = "machines" if cause is Change.CAME else "fault"
        step = self._journal.steps_done()
        self._journal.event(kind, attempt=end.attempt, step=step, rank=None, cause=cause.value)
        return None

    def _mark(self, end: End) -> None:
        """Leave word for the next start if a scheduler took the machine away."""
        if end.stopped and self._wishes.is_preemption and self._job.run_dir is not None:
            step = self._journal.checkpoint_step()
            leave_marker(self._job.run_dir, step)
            self._journal.event("preempted", attempt=end.attempt, step=step)
