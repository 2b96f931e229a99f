"""Which failures are worth another attempt, and after what wait."""

from moe_runtime.cli.supervise.outcome import Outcome
from moe_runtime.cli.supervise.policy import RestartPolicy

_LOST = Outcome(3, "rank 1 was ended by SIGKILL")


def test_waits_double_after_the_first_restart_and_end_at_a_minute() -> None:
    policy = RestartPolicy(restarts=10, back_off_s=1.0, checkpoint_step=0)
    waits = [policy.judge(_LOST, step, 0).wait_s for step in range(10)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert not policy.judge(_LOST, 10, 0).restart


def test_a_new_checkpoint_refills_the_restarts() -> None:
    policy = RestartPolicy(restarts=1, back_off_s=1.0, checkpoint_step=4)
    assert policy.judge(_LOST, 5, 4).restart
    assert policy.judge(_LOST, 7, 6) == policy.judge(_LOST, 9, 8)  # each the first in a row
    assert not policy.judge(_LOST, 9, 8).restart


def test_a_users_mistake_ends_the_run() -> None:
    assert not RestartPolicy(3, 1.0, 0).judge(Outcome(2, "seed: wrong"), 0, 0).restart


def test_a_defect_is_tried_again_unless_it_repeats_at_the_same_step() -> None:
    defect = Outcome(1, "rank 0: Traceback\nValueError: x")
    policy = RestartPolicy(5, 1.0, 0)
    assert policy.judge(defect, 3, 0).restart
    assert policy.judge(defect, 4, 0).restart
    assert policy.judge(Outcome(1, "rank 1: Traceback\nValueError: y"), 4, 0).restart
    assert policy.judge(Outcome(1, "rank 1: Traceback\nValueError: x"), 4, 0).restart
    assert not policy.judge(defect, 4, 0).restart  # another rank, the same words


def test_a_killed_rank_may_be_killed_again_at_the_same_step() -> None:
    policy = RestartPolicy(5, 1.0, 0)
    assert policy.judge(_LOST, 3, 0).restart
    assert policy.judge(_LOST, 3, 0).restart
