"""What the agent asks of a rendezvous beyond torch's interface."""

from enum import Enum
from typing import Protocol

from moe_runtime.cli.supervise.outcome import Outcome


class Change(Enum):
    """What happened to the machines of a round that had begun."""

    CAME = "another machine came"
    LEFT = "a machine left"
    CLOSED = "another machine ended the run"
    LOST = "machine 0 does not answer"


class MeetingPlace(Protocol):
    """Where the launchers of a run meet, round after round.

    Attributes:
        attempt: number of the present round, from 1; alike on all machines.
        token: of the run, for its ranks.
    """

    attempt: int
    token: str

    def changed(self) -> Change | None:
        """Whether the round that this machine takes part in is still what it was."""

    def all_done(self) -> bool:
        """Wait until the ranks of every machine ended well; False if that will not be."""

    def tell(self, outcome: Outcome) -> None:
        """End the run for all machines, and say how it ended."""

    def told(self) -> Outcome:
        """How another machine said that the run ended."""
