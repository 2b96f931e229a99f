"""Small agreements between ranks: verdicts and JSON, never pickles.

Whatever one rank finds out alone (a full disk, a bad checksum, Ctrl-C) must be decided by all, or the
others wait for ever in the next collective.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

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

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(rows, padded, group=self.group)
        pairs = zip(rows, sizes, strict=True)
        return [json.loads(bytes(row[: int(size)].numpy()).decode()) for row, size in pairs]

    def first_says(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather_json(value if self.is_first else None)[0]

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
