"""One thing that was looked at: how it is, and the one command that mends it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "note", "warn", "fail"]
EXIT_CODES: dict[State, int] = {"ok": 0, "note": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Finding:
    """What was found.

    Args:
        name: what was looked at, such as /dev/shm.
        state: ok; note: something more is to be had; warn: runs work, but not all of them or not well;
            fail: a run of several processes would not work.
        said: what was found, in one line.
        mend: the command that mends it, or gets more; none where all is well.
    """

    name: str
    state: State
    said: str
    mend: str | None = None

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (self.mend is None), f"{self.name}: {self.state} with {self.mend}"

    def fields(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def ok(name: str, said: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", said)


def exit_code(findings: list[Finding]) -> int:
    """0: nothing to mend; 1: warnings; 2: failures."""
    return max((EXIT_CODES[one.state] for one in findings), default=0)
