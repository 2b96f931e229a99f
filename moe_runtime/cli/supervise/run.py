"""Runs a job to its end: attempt after attempt, until it has finished, was stopped, or is not worth another.

The agent is called in this process, not as a program of its own: torchrun's answer to any failed rank, a
mistyped path as much as a crash, is a traceback and exit code 1.
"""

import logging
import os
import tempfile
from pathlib import Path

from moe_runtime.cli.supervise.job import Job
from moe_runtime.cli.supervise.meeting_place import MeetingPlace
from moe_runtime.cli.supervise.outcome import Outcome
from moe_runtime.cli.supervise.signals import listening

_CPP_LOG = "TORCH_CPP_LOG_LEVEL"


def run_ranks(job: Job) -> Outcome:
    """Start the ranks, and again where that helps, and wait for the end.

    Returns:
        Code 0 if all ranks ended well, after Ctrl-C or SIGTERM too; 130 if these came before there was
        anything to save; 2 for a user's mistake; 3 if a rank was lost; 1 for a defect.
    """
    for name, value in job.environment.items():
        os.environ.setdefault(name, value)
    # The launcher says itself, in one line, what torch's C++ would put into a page; ranks may speak.
    for_ranks, os.environ[_CPP_LOG] = os.environ.get(_CPP_LOG, "ERROR"), "FATAL"
    # Imported here: torch takes seconds, and a wrong config should be told at once.
    from moe_runtime.cli.supervise.agent import Agent
    from moe_runtime.cli.supervise.supervisor import Supervisor

    os.environ[_CPP_LOG] = for_ranks
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGUSR2"  # which nobody sends: all are `listening`'s
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="moe_runtime_") as name:
        scratch = Path(name)
        with listening(scratch) as wishes:
            meeting = _meeting_place(job)
            return Supervisor(job, Agent(job, meeting, scratch), meeting, wishes).run()


def _meeting_place(job: Job) -> MeetingPlace:
    from moe_runtime.cli.supervise.many_machines import ManyMachines
    from moe_runtime.cli.supervise.one_machine import OneMachine

    if job.machines is None or job.config is None:
        return OneMachine(job.timeout_s)
    config = job.config.model_dump(mode="json")
    return ManyMachines(job.machines, config, job.timeout_s, job.reliability.rejoin_s)
