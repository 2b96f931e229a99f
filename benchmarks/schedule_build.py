"""How long a schedule takes to build, check and lower: seconds of one core, the best of a few tries.

    python benchmarks/schedule_build.py                  # dualpipe, 64 ranks, 1024 microbatches
    python benchmarks/schedule_build.py zbv 16 256
    python benchmarks/schedule_build.py --all            # every schedule that admits the sizes

`lower` checks the program, adds the transfers and checks again, which is what a run does at its start.
Processor time is shown beside wall time, for a machine that is busy with other things too.
"""

import argparse
import time

from moe_runtime import schedule


def timed(name: str, num_ranks: int, num_microbatches: int) -> tuple[float, float, float, int]:
    """Seconds of `build`, seconds and processor seconds of both steps together, entries of the result."""
    wall, processor = time.perf_counter(), time.process_time()
    program = schedule.build(name, num_ranks, num_microbatches)
    built = time.perf_counter() - wall
    lowered = schedule.lower(program)
    entries = sum(map(len, lowered.rows))
    return built, time.perf_counter() - wall, time.process_time() - processor, entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="dualpipe", choices=list(schedule.BUILDERS))
    parser.add_argument("ranks", nargs="?", type=int, default=64)
    parser.add_argument("microbatches", nargs="?", type=int, default=1024)
    parser.add_argument("--all", action="store_true", help="every schedule that admits the sizes")
    parser.add_argument("--tries", type=int, default=3)
    args = parser.parse_args()
    print("schedule      ranks  microbatches   entries   build   build+lower   processor")
    for name in schedule.BUILDERS if args.all else [args.name]:
        if args.all and schedule.admissible(name, args.ranks, args.microbatches) is not None:
            continue
        tries = [timed(name, args.ranks, args.microbatches) for _ in range(args.tries)]
        built, total, processor, entries = min(tries, key=lambda each: each[2])
        sizes = f"{name:12}  {args.ranks:5}  {args.microbatches:12}  {entries:8}"
        print(f"{sizes}  {built:5.2f}s  {total:10.2f}s  {processor:9.2f}s")


if __name__ == "__main__":
    main()
