"""A program on a clock, with messages that take no time: just enough to measure a bubble."""

from moe_runtime.schedule import Kind, Overlap, Program
from moe_runtime.schedule.action import actions_of
from moe_runtime.schedule.products import Product, made_by, needed_by

Spans = list[list[tuple[float, float]]]


def run_clock(program: Program, costs: dict[Kind, float], overlap: float) -> Spans:
    """Start and end of every entry, `spans[rank][position]`; each starts as soon as it can."""
    spans: Spans = [[] for _ in program.rows]
    made_at: dict[Product, float] = {}
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(program.rows):
            while len(spans[rank]) < len(row):
                entry = row[len(spans[rank])]
                needs = [need for a in actions_of(entry) if (need := needed_by(a, program.num_stages))]
                if any(need not in made_at for need in needs):
                    break
                start = max([made_at[need] for need in needs] + [end for _, end in spans[rank][-1:]] + [0.0])
                end = start + (overlap if isinstance(entry, Overlap) else costs[entry.kind])
                spans[rank].append((start, end))
                made_at.update({product: end for a in actions_of(entry) if (product := made_by(a))})
                moved = True
    return spans


def bubbles(spans: Spans) -> list[float]:
    """Idle time of every rank until the last one ends."""
    makespan = max(row[-1][1] for row in spans)
    return [makespan - sum(end - start for start, end in row) for row in spans]
