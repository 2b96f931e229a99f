"""Small agreements between ranks: verdicts and JSON, never pickles.

Whatever one rank finds out alone (a full disk, a bad checksum, Ctrl-C) must be decided by all, or the
others wait for ever in the next collective.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """All ranks of the run; `group` None with world_size 1 means that no process group exists.

    Args:
        rank: global rank.
        world_size: number of ranks.
        group: a group over CPU tensors (gloo), also on GPU machines.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def over_group_of_their_own(self, timeout_s: float) -> "Peers":
        """The same ranks over a new group, for a thread beside the rank's own; a collective call.

        Two threads may not share a group: their collectives would meet in an order of chance.

        Args:
            timeout_s: a collective that takes longer raises.
        """
        if self.world_size == 1:
            return self
        ranks, timeout = list(range(self.world_size)), timedelta(seconds=timeout_s)
        return Peers(self.rank, self.world_size, dist.new_group(ranks, timeout=timeout, backend="gloo"))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def all_true(self, verdict: bool) -> bool:
        """True on every rank if it is true on every rank."""
        if self.world_size == 1:
            return verdict
        flag = torch.tensor([int(verdict)])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag.item())

    def any_true(self, verdict: bool) -> bool:
        """True on every rank if it is true on one."""
        return not self.all_true(not verdict)

    def any_of(self, verdicts: Sequence[bool]) -> list[bool]:
        """For each verdict, True on every rank if it is true on one; as many on every rank."""
        if self.world_size == 1:
            return list(verdicts)
        flags = torch.tensor(verdicts, dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flags.tolist()]

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = _as_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(rows, padded, group=self.group)
        pairs = zip(rows, sizes, strict=True)
        return [_of_bytes(row[: int(size)]) for row, size in pairs]

    def first_says(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        payload = _as_bytes(value if self.is_first else None)
        if self.world_size > 1:
            size = torch.tensor([payload.numel()])
            dist.broadcast(size, 0, group=self.group)
            payload = payload if self.is_first else torch.zeros(int(size), dtype=torch.uint8)
            dist.broadcast(payload, 0, group=self.group)
        return _of_bytes(payload)

    def first_hears(self, value: Any, speakers: Sequence[int]) -> dict[int, Any]:
        """What some ranks say, by rank, on rank 0; empty elsewhere. A collective call of all ranks.

        Args:
            value: of this rank, if it is one of the speakers.
            speakers: ranks, alike everywhere; one after another, so that rank 0 holds one message a time.
        """
        heard = {}
        for rank in speakers:
            if rank == self.rank == 0:
                heard[rank] = _of_bytes(_as_bytes(value))
            elif rank == self.rank:
                payload = _as_bytes(value)
                dist.send(torch.tensor([payload.numel()]), 0, group=self.group)
                dist.send(payload, 0, group=self.group)
            elif self.is_first:
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, rank, group=self.group)
                payload = torch.zeros(int(size), dtype=torch.uint8)
                dist.recv(payload, rank, group=self.group)
                heard[rank] = _of_bytes(payload)
        return heard

    def first_does(self, action: Callable[[], object], errors: tuple[type[BaseException], ...]) -> None:
        """Rank 0 runs `action`, however long; the others wait, and learn it at once if rank 0 dies.

        Args:
            action: local work that issues no collective; it runs on a thread of its own.
            errors: what may fail; every rank raises it then.
        """
        outcome: list[BaseException | None] = [None]

        def run() -> None:
            try:
                action()
            except BaseException as error:
                outcome[0] = error

        worker = threading.Thread(target=run, daemon=True)
        if self.is_first:
            worker.start()
        while self.any_true(worker.is_alive()):
            worker.join(timeout=0.2) if self.is_first else None

        def result() -> None:
            if outcome[0] is not None:
                raise outcome[0]

        self.alike(result, errors)

    def stand_by(self, worker: threading.Thread, seconds: float) -> None:
        """Wait for a thread that itself waits for other ranks: by its stack, this one then does too."""
        worker.join(seconds)

    def alike(self, action: Callable[[], T], errors: tuple[type[BaseException], ...]) -> T:
        """Run `action` everywhere; if it fails on one rank, every rank raises the first failure.

        Args:
            action: local work that issues no collective.
            errors: what may fail; the type raised is that of this rank's own failure or `errors[0]`.
        """
        outcome: T | None = None
        failure: BaseException | None = None
        try:
            outcome = action()
        except errors as error:
            failure = error
        said = self.gather_json(None if failure is None else str(failure))
        first = next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None), None)
        if first is None:
            return outcome  # type: ignore[return-value]
        if failure is not None and self.world_size == 1:
            raise failure
        raise errors[0](first) from failure


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _of_bytes(payload: Tensor) -> Any:
    return json.loads(bytes(payload.numpy()).decode())
