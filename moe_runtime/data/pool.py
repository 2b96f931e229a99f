"""Chunks of a pass shared out to processes of their own.

Each process is started as a command and fed lines of JSON: what the job is, then one chunk at a time. It
answers with how far it is, that it is done, or what went wrong. Rejected: `multiprocessing`, for a rank of a
training run may be the one that prepares: it has threads and sockets that a fork must not copy, and where it
was itself started as a daemon it may have no children; and a worker that dies breaks a process pool without
saying how.

A worker ends when its parent does, whatever the parent died of: within a batch it finds itself adopted,
between chunks its input ends.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moe_runtime.data.job import Job, job_from
from moe_runtime.data.readers import FilePart
from moe_runtime.data.sources import Chunk
from moe_runtime.errors import DataError

_TICK_S = 0.1
Done = Callable[[int], None]


class WorkerDied(DataError):
    """The source is not to blame: what is done is worth keeping."""


def run_chunks(job: Job, what: str, chunks: list[tuple[int, Chunk]], workers: int, tell: Done) -> None:
    """Do chunks of one pass, in this process or in several.

    Args:
        chunks: number and parts of each.
        workers: processes; one works here.
        tell: called with bytes of the source that are done since the last call.

    Raises:
        DataError: the source is not usable.
        WorkerDied: a process did, as one does that takes too much memory.
        OSError: the disk is full.
    """
    if workers == 1 or len(chunks) < 2:
        for index, chunk in chunks:
            meter = _Meter(chunk, tell)
            job.do(what, index, chunk, meter.at)
            meter.ends()
        return
    with _workers(job, min(workers, len(chunks))) as hired:
        _share_out(hired, what, chunks, tell)


class _Meter:
    """Turns bytes read of a chunk into bytes read since the last time."""

    def __init__(self, chunk: Chunk, tell: Done) -> None:
        self._size, self._tell, self._last = sum(part.num_bytes for part in chunk), tell, 0

    def at(self, done: int) -> None:
        """So many bytes of the chunk are read."""
        done = min(done, self._size)
        self._tell(done - self._last)
        self._last = done

    def ends(self) -> None:
        """All of it is."""
        self.at(self._size)


class _Worker:
    """A process and what it has to do."""

    def __init__(self, job: Job) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moe_runtime.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # an interrupt from the keyboard is for the one that prepares
        )
        self.meter: _Meter | None = None
        self._rest = b""
        self.send(job.to_json() | {"parent": os.getpid()})

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.death() from None

    def receive(self) -> list[dict[str, Any]]:
        """Messages that have come.

        Raises:
            WorkerDied: it did.
        """
        assert self.process.stdout is not None
        raw = os.read(self.process.stdout.fileno(), 65536)
        if not raw:
            raise self.death()
        *lines, self._rest = (self._rest + raw).split(b"\n")
        return [json.loads(line) for line in lines]

    def death(self) -> "WorkerDied":
        """How the worker ended, for people."""
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return WorkerDied(
            f"preparing data: a worker {how}; the same command goes on where it stopped, and needs less "
            "memory with fewer --workers"
        )


@contextmanager
def _workers(job: Job, count: int) -> Iterator[list[_Worker]]:
    hired: list[_Worker] = []
    try:
        hired.extend(_Worker(job) for _ in range(count))
        yield hired
    finally:
        for worker in hired:
            worker.process.kill()
            worker.process.communicate()


def _share_out(hired: list[_Worker], what: str, chunks: list[tuple[int, Chunk]], tell: Done) -> None:
    waiting = chunks[::-1]
    with selectors.DefaultSelector() as selector:
        for worker in hired:
            assert worker.process.stdout is not None
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            _give(worker, what, waiting, tell)
        while any(worker.meter is not None for worker in hired):
            for key, _ in selector.select():
                for message in key.data.receive():
                    _take(key.data, message)
                    if "done" in message:
                        _give(key.data, what, waiting, tell)


def _give(worker: _Worker, what: str, waiting: list[tuple[int, Chunk]], tell: Done) -> None:
    worker.meter = None
    if waiting:
        index, chunk = waiting.pop()
        worker.meter = _Meter(chunk, tell)
        worker.send({"what": what, "index": index, "chunk": chunk})


def _take(worker: _Worker, message: dict[str, Any]) -> None:
    assert worker.meter is not None
    if "at" in message:
        worker.meter.at(message["at"])
    elif "done" in message:
        worker.meter.ends()
    elif "errno" in message:
        raise OSError(message["errno"], message["error"], message["file"])
    else:
        raise DataError(message["error"])


def serve() -> None:
    """The life of a worker: a job, then chunks, until its input ends."""
    first = json.loads(sys.stdin.readline())
    job = job_from(first)

    def say(message: dict[str, Any]) -> None:
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            os._exit(1)  # nobody listens any more

    for line in sys.stdin:
        task = json.loads(line)
        chunk = tuple(FilePart(*part) for part in task["chunk"])
        try:
            job.do(task["what"], task["index"], chunk, _ticker(say, first["parent"]))
            said: dict[str, Any] = {"done": task["index"]}
        except DataError as error:
            said = {"error": str(error)}
        except OSError as error:
            said = {"errno": error.errno, "error": error.strerror, "file": error.filename}
        say(said)


def _ticker(say: Callable[[dict[str, Any]], None], parent: int) -> Callable[[int], None]:
    told_at = time.monotonic()

    def tick(done: int) -> None:
        nonlocal told_at
        if os.getppid() != parent:
            raise SystemExit(1)  # nobody waits for it any more
        if time.monotonic() - told_at > _TICK_S:
            told_at = time.monotonic()
            say({"at": done})

    return tick
