"""A fault to be made on purpose, as a user writes it: `KIND:rankR:stepS:PHASE[:VALUE]`.

    sigkill:rank1:step5:dispatch      rank 1 is killed as it begins to dispatch in step 5
    sigstop:rank0:init                no step: before there is one
    sleep:rank1:step5:data:30         rank 1 reads its tokens for 30 s longer
    slow:rank2:step10:1.5             from step 10 on, rank 2 takes 1.5 times as long for its own work
    nan:rank1:step7:grad:3            a gradient of rank 1 is NaN in three steps
    flip:rank1:step7:optimizer        one bit of rank 1's optimizer state turns over
    dead_expert:rank1:step7           no token chooses the first expert of rank 1 any more
    bias_runaway:rank0:step7:30       the bias of rank 0's first expert rises by 0.1 in thirty steps

The phase may be left out where a kind has one of its own. `@FILE` names a file with a fault on each line,
read again whenever a step begins, so that faults can be ordered while a run goes on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.errors import ConfigError

# Where a fault can strike; the first two of saving are on the thread that writes.
PHASES = (
    "init",
    "data",
    "forward",
    "dispatch",
    "combine",
    "backward",
    "optimizer",
    "save",
    "save_write",
    "save_rename",
    "evaluate",
    "sample",
    "end",
)
# These come in some steps only: the fault waits for the first one from its step on.
RARE_PHASES = ("save", "save_write", "save_rename", "evaluate", "sample", "end")
TARGETS = ("param", "grad", "optimizer")
# A target, and where it is struck.
_WHEN = {
    "param": "data",
    "grad": "optimizer",
    "optimizer": "data",
    "bias": "data",
    "casts": "data",
    "tokens": "data",
}


@dataclass(frozen=True)
class Kind:
    """What a kind of fault takes.

    Args:
        deed: what happens, for people.
        value: what its number means; empty if it has none.
        default: of the number.
        least: that it may be.
        places: phases or targets; the first one if none is given.
    """

    deed: str
    value: str = ""
    default: float = 0.0
    places: tuple[str, ...] = PHASES
    least: float = 0.0


KINDS = {
    "sigkill": Kind("the process is killed"),
    "sigterm": Kind("the process is asked to end, as by a scheduler"),
    "sigstop": Kind("the process is stopped"),
    "segfault": Kind("the process reads address 0"),
    "exit": Kind("the process ends without a word", "exit code", 1),
    "raise": Kind("an exception is raised"),
    "gil": Kind("the interpreter's lock is held for ever"),
    "sleep": Kind("the thread sleeps", "seconds", 3600),
    "slow": Kind("own work takes longer from this step on", "factor", 2, ("forward",), least=1),
    "diskfull": Kind("the disk is full", places=("save_write",)),
    "oom": Kind("memory ends", "MiB that are left", 16),
    "nan": Kind("a gradient is NaN", "steps", 1, ("grad",), least=1),
    "inf": Kind("a gradient is infinite", "steps", 1, ("grad",), least=1),
    "flip": Kind("one bit turns over", "steps", 1, TARGETS, least=1),
    "dead_expert": Kind("no token chooses the rank's first expert", default=1, places=("bias",)),
    "overload": Kind("every token chooses the rank's first expert", default=1, places=("bias",)),
    "bias_runaway": Kind("the bias of the rank's first expert runs away", "steps", 20, ("bias",), least=1),
    "saturate": Kind("weights are cast with scales that are too small", default=1, places=("casts",)),
    "noise": Kind("random tokens are read", "steps", 1, ("tokens",), least=1),
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        text: as written.
        nth: how many equal ones were written before it.
        kind: one of `KINDS`.
        rank: global rank that it strikes.
        step: from 1; 0 before the first.
        phase: one of `PHASES`.
        target: what of a run is struck, a key of `_WHEN`, or empty.
        value: what `Kind.value` says.
    """

    text: str
    nth: int
    kind: str
    rank: int
    step: int
    phase: str
    target: str
    value: float

    @property
    def times(self) -> int:
        """How often it strikes."""
        return int(self.value) if self.target else 1

    @property
    def is_of_all(self) -> bool:
        """True if all ranks take part: what is struck is alike on several of them."""
        return self.target == "bias"


def read_faults(texts: Sequence[str], world_size: int | None = None) -> list[Fault]:
    """The faults as they were written.

    Args:
        world_size: ranks of the run, if known.

    Raises:
        ConfigError: one cannot be understood, or strikes a rank that does not exist.
    """
    faults = [_read(text, texts[:index].count(text)) for index, text in enumerate(texts)]
    for fault in faults:
        if world_size is not None and fault.rank >= world_size:
            raise ConfigError(f"--inject {fault.text}: expected a rank below {world_size}, got {fault.rank}")
    return faults


def split_orders(texts: Sequence[str]) -> tuple[list[str], Path | None]:
    """Faults that stand on the command line, and the file of `@FILE`, if there is one.

    Raises:
        ConfigError: more than one file, or one that cannot be read.
    """
    files = [Path(text[1:]) for text in texts if text.startswith("@")]
    if len(files) > 1:
        raise ConfigError(f"--inject: expected one @FILE, got {len(files)}")
    if files and not files[0].is_file():
        raise ConfigError(
            f"--inject @{files[0]}: expected a file with a fault on each line, got no such file"
        )
    return [text for text in texts if not text.startswith("@")], files[0] if files else None


def _read(text: str, nth: int) -> Fault:
    name, *words = text.split(":")
    kind = KINDS.get(name)
    if kind is None:
        raise ConfigError(f"--inject {text}: expected one of {', '.join(KINDS)}, got {name!r}")
    rank, words = _number("rank", words, text)
    step, words = (0, words) if words[:1] == ["init"] else _number("step", words, text)
    place, words = _place(kind, step, words, text)
    value = _value(kind, words, text)
    target = place if set(kind.places) <= _WHEN.keys() else ""
    return Fault(text, nth, name, rank, step, _WHEN[target] if target else place, target, value)


def _place(kind: Kind, step: int, words: list[str], text: str) -> tuple[str, list[str]]:
    """Where it strikes, and the words after it."""
    possible = [place for place in kind.places if (place == "init") == (step == 0)]
    if words and words[0] in possible:
        return words[0], words[1:]
    if len(possible) == 1 and not (words and words[0] in (*PHASES, *_WHEN)):
        return possible[0], words
    got = words[0] if words else "nothing"
    wanted = ", ".join(possible) or "a step from 1"
    raise ConfigError(f"--inject {text}: expected after step{step} one of {wanted}, got {got}")


def _number(name: str, words: list[str], text: str) -> tuple[int, list[str]]:
    """The number of a word such as `rank1` at the head of `words`, and the words after it."""
    found = re.fullmatch(name + r"(\d{1,9})", words[0]) if words else None
    if found is None:
        got = words[0] if words else "nothing"
        raise ConfigError(f"--inject {text}: expected {name} and its number, such as {name}1, got {got}")
    return int(found[1]), words[1:]


def _value(kind: Kind, words: list[str], text: str) -> float:
    if not words:
        return kind.default
    try:
        value = float(words[0]) if kind.value and len(words) == 1 else -1.0
    except ValueError:
        value = -1.0
    if not kind.least <= value < 1e9:
        wanted = f"{kind.value}, a number from {kind.least:g}" if kind.value else "no more words"
        raise ConfigError(f"--inject {text}: expected {wanted}, got {':'.join(words)}")
    return value
