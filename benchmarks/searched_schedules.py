"""Searched schedules against the built-in ones, on a published grid; a Markdown table.

    python benchmarks/searched_schedules.py            # the whole grid, one core
    python benchmarks/searched_schedules.py --quick    # a part of it

The model costs the same in every line, cut into as many stages as each schedule has; costs are those of
one P-th of it. Built-ins are all of `BUILDERS`, dualpipe with its second copy of the parameters too, and
interleaved with 2 and with 4 stages a rank. The cap is the most live memory on a rank, in activations of
one microbatch in one P-th of the model; 1F1B needs P. `bound` is proved: no program of any shape that was
searched is shorter within the cap.
"""

import argparse
import itertools
import sys
import time

from moe_runtime.planner.costs import StageCosts
from moe_runtime.planner.search import Found, search

COSTS = {
    "F=I=W": StageCosts(1.0, 1.0, 1.0),
    "1, 1.2, .8": StageCosts(1.0, 1.2, 0.8),
    "1, 1, .5": StageCosts(1.0, 1.0, 0.5),
    "1, 2, 1 (recompute)": StageCosts(1.0, 2.0, 1.0),
    "1, 1, 1; exchange 1, 1": StageCosts(1.0, 1.0, 1.0, 1.0, 1.0),
    "1, 1, 1; exchange .5, .5": StageCosts(1.0, 1.0, 1.0, 0.5, 0.5),
}
RANKS, QUICK_RANKS = (2, 4, 8), (2, 4)
PER_RANK, QUICK_PER_RANK = (1, 2, 4), (2,)
CAPS = {"none": None, "P": 1.0, "3P/4": 0.75, "P/2": 0.5}
_REAL = 1e-9  # relative; a lesser difference is rounding


def main() -> None:
    """Search the grid and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 and 4 ranks, 2 microbatches a rank")
    parser.add_argument("--ranks", type=int, nargs="+", help="instead of the grid's own")
    parser.add_argument("--effort", type=float, default=1.0, help="of each search")
    arguments = parser.parse_args()
    all_ranks = arguments.ranks or (QUICK_RANKS if arguments.quick else RANKS)
    per_rank = QUICK_PER_RANK if arguments.quick else PER_RANK
    print("| P | M | F, I, W | cap | built-in | its step | searched | shape | ratio | bound | gap | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    results = []
    for ranks, times, costs, cap in itertools.product(all_ranks, per_rank, COSTS, CAPS):
        limit = CAPS[cap] and max(1.0, CAPS[cap] * ranks)
        start = time.perf_counter()
        found = search(ranks, ranks * times, COSTS[costs], cap=limit, effort=arguments.effort)
        results.append(found)
        print(_line(found, costs, cap, time.perf_counter() - start), flush=True)
    print(_summary(results))


def _line(found: Found, costs: str, cap: str, seconds: float) -> str:
    program, rival = found.program, found.rival
    name, step, ratio = "none fits", "", ""
    if rival is not None:
        name, step, ratio = rival.name, f"{rival.makespan:.3f}", f"{found.makespan / rival.makespan:.3f}"
    cells = (
        *(str(program.num_ranks), str(program.num_microbatches), costs, cap, name, step),
        *(f"{found.makespan:.3f}", found.shape, ratio, f"{found.bound:.3f}"),
        *(f"{found.gap:.1%}", f"{seconds:.1f}"),
    )
    return f"| {' | '.join(cells)} |"


def _summary(results: list[Found]) -> str:
    matched = [(found.makespan, found.rival.makespan) for found in results if found.rival is not None]
    shorter = sum(own < other * (1 - _REAL) for own, other in matched)
    longer = sum(own > other * (1 + _REAL) for own, other in matched)
    best = sum(found.gap <= _REAL for found in results)
    return (
        f"\n{len(results)} lines. Where a built-in fits ({len(matched)}): searched is strictly shorter in "
        f"{shorter}, equal in {len(matched) - shorter - longer}, longer in {longer}. Where none fits "
        f"({len(results) - len(matched)}): searched has a program in all. Proved best: {best}."
    )


if __name__ == "__main__":
    sys.exit(main())
