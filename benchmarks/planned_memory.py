"""Memory that the planner reckons against what runs hold, kind by kind.

    python benchmarks/planned_memory.py            # a table, all cases of tests/dist/memory_case.py
    python benchmarks/planned_memory.py NAME ...   # some of them
    python benchmarks/planned_memory.py --json

Each case trains two steps in real processes, through the real ZeRO optimizer and dispatcher; the second step
is measured. Nothing is fitted: the reckoning reads the config alone, and how many rows the experts got.
"""

import argparse
import json
from dataclasses import asdict

from tests.dist.memory_case import CASES, Compared, compare
from tests.ranks import run_ranks

KINDS = (
    "weights",
    "gradients",
    "masters",
    "moments",
    "weight_casts",
    "activations",
    "exchanges",
    "received",
    "running",
    "at_update",
)


def main() -> None:
    """Run the cases and print them as they end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CASES], metavar="NAME")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found: dict[str, list[Compared]] = {}
    if not args.json:
        print("| case | rank | " + " | ".join(KINDS) + " |")
        print("|---" * (len(KINDS) + 2) + "|")
    for name in args.names or CASES:
        case = CASES[name]
        found[name] = run_ranks(compare, case.world_size, case, timeout_s=600)
        for rank, ours in enumerate(found[name] if not args.json else ()):
            cells = " | ".join(_cell(ours, kind) for kind in KINDS)
            print(f"| {name} | {rank} | {cells} |", flush=True)
    if args.json:
        print(json.dumps({name: [asdict(ours) for ours in ranks] for name, ranks in found.items()}))


def _cell(ours: Compared, kind: str) -> str:
    """Kilobytes measured, and how far off the reckoning is."""
    error = ours.errors().get(kind)
    return "" if error is None else f"{ours.measured[kind] / 1e3:.0f} {error:+.1%}"


if __name__ == "__main__":
    main()
