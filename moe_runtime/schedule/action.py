"""The vocabulary of a pipeline program: plain values, no tensors, no clocks.

A program is one tuple of entries per pipeline rank. An entry is an `Action` or an `Overlap` of a
forward with a backward. `direction` is absolute (0 or 1), never relative to a rank: direction 0
feeds stage 0 on rank 0, direction 1 (bidirectional schedules only) feeds stage 0 on the last rank.
Microbatches are numbered from 0 within each direction.

    F        forward of a stage                       3F5   stage 3, microbatch 5
    B        full backward: input and weight gradient 3B5
    I        backward, input gradient only            3I5
    W        the weight gradient left by an I         3W5
    SA RA    send / receive an activation             3SA5  what stage 3 puts out / takes in
    SG RG    send / receive a gradient                3RG5  of stage 3's output / by its input

A prime marks direction 1 (`3F5'`), a plus an overlap (`3F5+4B1'`).
"""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moe_runtime.schedule.check import Report


class Kind(Enum):
    """What an action does.

    What there is to ask about a kind are plain attributes, set once, and a kind is hashed by identity:
    a program of half a million actions is checked by asking.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    SEND_ACT = "SA"
    RECV_ACT = "RA"
    SEND_GRAD = "SG"
    RECV_GRAD = "RG"

    def __init__(self, letters: str) -> None:
        self.letters = letters
        self.bit = 1 << len(type(self).__members__)  # so that a set of kinds is a sum
        self.is_transfer = len(letters) == 2  # moves a tensor between pipeline ranks
        self.is_send = letters[0] == "S"
        self.of_gradient = letters in ("SG", "RG")
        self.makes_activation = letters == "F"
        self.makes_gradient = letters in ("B", "I")  # of the stage's input

    __hash__ = object.__hash__


class Action(NamedTuple):
    """One thing that one pipeline rank does.

    For a transfer, `stage` is the stage of *this* rank that puts the tensor out or takes it in:
    stage s sends its activation as `sSAm` and the peer takes it in as `(s+1)RAm`; stage s sends the
    gradient of its input as `sSGm` and the peer takes it in as `(s-1)RGm`.
    """

    kind: Kind
    stage: int
    microbatch: int
    direction: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.letters}{self.microbatch}{chr(39) * self.direction}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a full backward whose phases are interleaved."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}+{self.backward}"


Entry = Action | Overlap


def actions_of(entry: Entry) -> tuple[Action, ...]:
    """The actions of an entry: itself, or the forward and the backward of an overlap."""
    return (entry.forward, entry.backward) if isinstance(entry, Overlap) else (entry,)


def is_transfer(entry: Entry) -> bool:
    """True for an entry that only moves a tensor; an overlap computes."""
    return isinstance(entry, Action) and entry.kind.is_transfer


def where(rank: int, position: int, entry: Entry) -> str:
    """How every message names a place in a program."""
    return f"rank {rank}, entry {position} ({entry})"


@dataclass(frozen=True, slots=True)
class Program:
    """What every pipeline rank does in one step.

    Args:
        name: the builder's name.
        rows: `rows[rank]` is the ordered tuple of entries of that pipeline rank.
        placement: `placement[direction][stage]` is the pipeline rank that holds the stage.
        num_microbatches: M, over all directions together.
    """

    name: str
    rows: tuple[tuple[Entry, ...], ...]
    placement: tuple[tuple[int, ...], ...]
    num_microbatches: int

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        return len(self.placement[0])

    @property
    def num_directions(self) -> int:
        return len(self.placement)

    @property
    def microbatches_per_direction(self) -> int:
        return self.num_microbatches // self.num_directions

    def stages_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The (direction, stage) pairs that `rank` runs, ordered by direction, then stage."""
        return tuple(
            (direction, stage)
            for direction, ranks in enumerate(self.placement)
            for stage, holder in enumerate(ranks)
            if holder == rank
        )

    @property
    def has_transfers(self) -> bool:
        """True once sends and receives have been added, which is what an executor runs."""
        return any(is_transfer(entry) for row in self.rows for entry in row)

    def peer_of(self, transfer: Action) -> int:
        """The pipeline rank at the other end of a send or a receive.

        Args:
            transfer: an action of kind SA, RA, SG or RG.
        """
        towards_last = transfer.kind in (Kind.SEND_ACT, Kind.RECV_GRAD)
        return self.placement[transfer.direction][transfer.stage + (1 if towards_last else -1)]

    # The two readers below stand above this file, so they are imported where they are called.

    def check(self, max_unmatched: int | None = None) -> "Report":
        """Prove the program complete, ordered and free of deadlock; see `schedule.check`.

        Args:
            max_unmatched: sends of one pair of ranks that may be without their receive before the next
                one blocks its rank; None for no limit.

        Raises:
            ScheduleError: it is not; names rank, entry and action.
        """
        from moe_runtime.schedule.check import check

        return check(self, max_unmatched)

    def to_text(self) -> str:
        """The program in the notation of this file, one row a rank; see `schedule.text`."""
        from moe_runtime.schedule.text import to_text

        return to_text(self)

    @classmethod
    def from_text(cls, text: str) -> "Program":
        """The program that `to_text` wrote.

        Raises:
            ScheduleError: the text is malformed; names row and token.
        """
        from moe_runtime.schedule.text import from_text

        return from_text(text)
