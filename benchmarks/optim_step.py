"""The fused AdamW step with FP8 moments on a GPU: bits first, then time against the copy bandwidth.

    python benchmarks/optim_step.py --device cuda [--elements 268435456 1073741824] [--sweep] [--json]

Needs torch and triton alone (`moe-runtime bench optim` is the same with a command line that needs more, and
has the CPU side). Prints a table, then one JSON object (with --json only that).

Exit codes: 0; 1 where bits differ; 2 without a CUDA device.
"""

import argparse
import json
import sys

import torch

from moe_runtime.cli.bench_optim.cuda import describe, measure


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--elements", type=int, nargs="+", default=[1 << 28, 1 << 30])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="other block sizes and warps, first length")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("optim_step: expected a CUDA device, found none; run it on a machine with one", file=sys.stderr)
        return 2
    result = measure(options.elements, options.rounds, options.sweep)
    if not options.json:
        print(describe(result), flush=True)
    print(json.dumps(result))
    return 1 if result["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
