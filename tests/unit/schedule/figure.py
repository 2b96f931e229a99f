"""Draws a program on the clock, a step of time a column, as the builders' files show it.

`F0` is a rank's first stage, `f0` its second stage of the same direction; a letter for the microbatch
marks direction 1. An entry longer than a step goes on as `---`; dots are the bubble. A long figure is
folded into parts, one below the other.
"""

from moe_runtime.schedule import Action, Entry, Kind, Overlap, Program
from tests.unit.schedule.clock import run_clock

STEPS = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.INPUT_GRAD: 1.0, Kind.WEIGHT_GRAD: 1.0}
OVERLAP_STEPS = 3.0
WIDTH = 3  # characters a step, a space included


def figure(program: Program, parts: int = 1) -> str:
    """One line a rank and part, parts set off by an empty line."""
    spans = run_clock(program, STEPS, OVERLAP_STEPS)
    end = int(max(row[-1][1] for row in spans))
    rows = []
    for rank, row in enumerate(program.rows):
        cells = [".. "] * end
        for entry, (start, stop) in zip(row, spans[rank], strict=True):
            steps = int(stop) - int(start)
            text = cell(program, rank, entry).ljust(WIDTH * steps - 1, "-") + " "
            cells[int(start) : int(stop)] = [text, *[""] * (steps - 1)]
        rows.append("".join(cells))
    width = WIDTH * -(-end // parts)
    blocks = [[row[at : at + width] for row in rows] for at in range(0, WIDTH * end, width)]
    return "\n\n".join(
        "\n".join(f"    rank {rank}  {row}".rstrip() for rank, row in enumerate(block)) for block in blocks
    )


def cell(program: Program, rank: int, entry: Entry) -> str:
    if isinstance(entry, Overlap):
        return f"{letters(program, rank, entry.forward)}&{letters(program, rank, entry.backward)}"
    return letters(program, rank, entry)


def letters(program: Program, rank: int, action: Action) -> str:
    chunks = [stage for direction, stage in program.stages_of(rank) if direction == action.direction]
    kind = action.kind.value if action.stage == chunks[0] else action.kind.value.lower()
    return kind + (chr(ord("a") + action.microbatch) if action.direction else str(action.microbatch))
