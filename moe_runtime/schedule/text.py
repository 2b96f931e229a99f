"""Program <-> text: a header line, then one row a rank, in the notation of `action.py`.

    1f1b microbatches=2 placement=0,1
    0: 0F0 0SA0 0F1 0SA1 0RG0 0B0 0RG1 0B1
    1: 1RA0 1F0 1RA1 1B0 1SG0 1F1 1B1 1SG1

`placement` lists the rank of each stage, one list a direction, separated by a slash. Blank lines and
lines that begin with `#` are skipped. What `to_text` writes, `from_text` reads back unchanged; whether
the program makes sense is for `check` to say.
"""

import re

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program

_HEADER = re.compile(r"(?P<name>\S+) microbatches=(?P<microbatches>\d+) placement=(?P<placement>[\d,/]+)")
_ROW = re.compile(r"(?P<rank>\d+):(?P<entries>.*)")
_ACTION = re.compile(r"(?P<stage>\d+)(?P<kind>[A-Z]{1,2})(?P<microbatch>\d+)(?P<primes>'*)")
_HEADER_FORM = "NAME microbatches=M placement=R,R,...[/R,R,...]"


def to_text(program: Program) -> str:
    """The program as text, one row a rank, ending with a newline."""
    placement = "/".join(",".join(map(str, ranks)) for ranks in program.placement)
    header = f"{program.name} microbatches={program.num_microbatches} placement={placement}"
    rows = [f"{rank}: {' '.join(map(str, row))}".rstrip() for rank, row in enumerate(program.rows)]
    return "\n".join([header, *rows, ""])


def from_text(text: str) -> Program:
    """The program written in `text`.

    Raises:
        ScheduleError: malformed header, row or token; names the row and the token.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        got = repr(lines[0]) if lines else "an empty text"
        raise ScheduleError(f"schedule text: expected a header '{_HEADER_FORM}', got {got}")
    return Program(
        name=header["name"],
        rows=tuple(_read_row(rank, line) for rank, line in enumerate(lines[1:])),
        placement=_read_placement(header["placement"]),
        num_microbatches=int(header["microbatches"]),
    )


def _read_placement(text: str) -> tuple[tuple[int, ...], ...]:
    directions = [ranks.split(",") for ranks in text.split("/")]
    if not all(rank.isdecimal() for ranks in directions for rank in ranks):
        raise ScheduleError(f"schedule text: header: expected '{_HEADER_FORM}', got placement={text}")
    return tuple(tuple(map(int, ranks)) for ranks in directions)


def _read_row(rank: int, line: str) -> tuple[Entry, ...]:
    row = _ROW.fullmatch(line)
    if row is None or int(row["rank"]) != rank:
        raise ScheduleError(f"schedule text: row {rank}: expected '{rank}: ENTRY ENTRY ...', got {line!r}")
    return tuple(_read_entry(rank, token) for token in row["entries"].split())


def _read_entry(rank: int, token: str) -> Entry:
    actions = [_read_action(part) for part in token.split("+")]
    match actions:
        case [Action() as action]:
            return action
        case [Action(kind=Kind.FORWARD) as forward, Action(kind=Kind.BACKWARD) as backward]:
            return Overlap(forward, backward)
    expected = "an action such as 3F5, 3B5', 3SA5, or an overlap of F and B such as 3F5+4B1'"
    raise ScheduleError(f"schedule text: row {rank}: expected {expected}, got {token!r}")


def _read_action(text: str) -> Action | None:
    match = _ACTION.fullmatch(text)
    if match is None or match["kind"] not in {kind.value for kind in Kind}:
        return None
    return Action(Kind(match["kind"]), int(match["stage"]), int(match["microbatch"]), len(match["primes"]))
