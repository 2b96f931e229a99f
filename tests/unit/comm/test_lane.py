"""A lane carries out its tasks in order, and tells whoever waits."""

import gc
import threading
import time
import weakref

import pytest
import torch
from moe_comm.errors import CommError, TransportError
from moe_comm.lane import Breaker, Lane

CPU = torch.device("cpu")


def _threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_tasks_run_in_the_order_given_while_the_caller_goes_on():
    lane, gate, done = Lane("order"), threading.Event(), []
    jobs = [lane.submit(lambda: gate.wait(10), CPU)]
    jobs += [lane.submit(lambda i=i: done.append(i) or i, CPU) for i in range(50)]
    assert done == []
    gate.set()
    assert [job.wait() for job in reversed(jobs[1:])] == list(range(49, -1, -1))
    assert done == list(range(50))


def test_the_result_is_there_for_any_thread_any_number_of_times():
    job = Lane("results").submit(lambda: torch.ones(3), CPU)
    got = []
    threads = [threading.Thread(target=lambda: got.append(job.wait())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3 and all(value is job.wait() for value in got)


def test_what_a_task_raises_is_raised_by_the_wait_and_the_next_task_runs():
    lane = Lane("errors")

    def fail() -> None:
        raise CommError("planted")

    failed, fine = lane.submit(fail, CPU), lane.submit(lambda: 7, CPU)
    for _ in range(2):
        with pytest.raises(CommError, match="planted"):
            failed.wait()
    assert fine.wait() == 7


class _Closable:
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_failure_that_is_not_agreed_on_gives_the_group_up():
    transport = _Closable()
    breaker = Breaker([transport])
    lane, other = Lane("broken", breaker), Lane("beside it", breaker)

    def fail(error: Exception) -> None:
        raise error

    lane.submit(lambda: fail(CommError("agreed")), CPU)
    assert lane.submit(lambda: 3, CPU).wait() == 3 and not transport.closed
    failed = lane.submit(lambda: fail(MemoryError("planted")), CPU)
    with pytest.raises(MemoryError, match="planted"):
        failed.wait()
    for after in (lane, other):
        with pytest.raises(TransportError, match=r"given up .* \(MemoryError: planted\)"):
            after.submit(lambda: 3, CPU).wait()
    assert transport.closed == 1


def test_tasks_of_one_lane_may_wait_for_those_of_another():
    near, far = Lane("near"), Lane("far")
    first = far.submit(lambda: time.sleep(0.01) or 1, CPU)
    second = near.submit(lambda: first.wait() + 1, CPU)
    third = far.submit(lambda: second.wait() + 1, CPU)
    assert third.wait() == 3


def test_tasks_run_without_gradients():
    weight = torch.ones(2, requires_grad=True)
    assert not Lane("gradients").submit(lambda: weight * 2, CPU).wait().requires_grad


def test_a_finished_task_lets_go_of_its_buffers():
    lane, buffer = Lane("buffers"), torch.ones(1000)
    gone = weakref.ref(buffer)
    job = lane.submit(lambda kept=buffer: float(kept.sum()), CPU)
    assert job.wait() == 1000.0
    del buffer
    lane.submit(int, CPU).wait()  # by then the thread has let go of the one before
    gc.collect()
    assert gone() is None


def test_buffers_are_free_before_the_end_of_their_task_is_told():
    buffer = torch.zeros(10)
    freed = weakref.ref(buffer)
    found = []
    may_run = threading.Event()

    def task(buffer=buffer):
        may_run.wait()
        return buffer.numel()

    lane = Lane("test")
    job = lane.submit(task, CPU)
    job._done.add_done_callback(lambda _: found.append(freed()))  # called as the end is told
    del buffer, task
    may_run.set()
    assert job.wait() == 10
    while not found:
        time.sleep(1e-3)
    assert found == [None]


def test_the_thread_ends_with_its_lane_and_starts_with_its_first_task():
    lane = Lane("short life")
    assert not _threads_named("short life")
    lane.submit(int, CPU).wait()
    (thread,) = _threads_named("short life")
    assert thread.daemon
    del lane
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()
