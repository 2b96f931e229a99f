"""What placing experts anew gains and moves, for the tables of comm/README.md.

    python benchmarks/rebalance.py

Loads of 58 layers are log-normal (sigma 1, seeds 0 to 4; the median of the seeds counts). Prints, for each
shape, the heaviest rank over the mean rank (mean of the layers), in order and re-placed, the lower bound,
and the seconds; then the experts of a layer that a placement for loads drifted by 5% moves: a fresh one, one
as balanced with few moves, and ones with 0.5% and 2% of slack.
"""

import statistics
import time

import torch
from moe_comm.rebalance import rebalance, split_load

SEEDS = range(5)
# Slots, nodes, ranks of a node, routing groups (1: experts go anywhere).
SHAPES = ((288, 4, 8, 8), (288, 4, 8, 1), (256, 1, 8, 1), (320, 20, 8, 1))


def loads_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads [58, 256], and the same after a drift of 5%."""
    draw = torch.Generator().manual_seed(seed)
    loads = torch.randn(58, 256, generator=draw).exp()
    return loads, loads * (0.05 * torch.randn(58, 256, generator=draw)).exp()


def measure(seed: int, slots: int, nodes: int, ranks: int, groups: int) -> list[float]:
    """Before, after, bound, seconds; moved fresh, with none, 0.5% and 2% of slack."""
    loads, later = loads_of(seed)
    shape = {"num_nodes": nodes, "ranks_per_node": ranks, "num_groups": groups}
    began = time.perf_counter()
    layout = rebalance(loads, slots, **shape)
    seconds = time.perf_counter() - began
    before = split_load(loads, layout).before
    in_order = (before.max(1).values / before.mean(1)).mean()
    fresh = rebalance(later, slots, **shape)
    moved = [float((fresh.slot_experts != layout.slot_experts).sum(1).double().mean())]
    for slack in (0.0, 0.005, 0.02):
        again = rebalance(later, slots, **shape, previous=layout.slot_experts, slack=slack)
        moved.append(float(again.moved.double().mean()))
    figures = (in_order, layout.max_over_mean.mean(), layout.bound.mean())
    return [*map(float, figures), seconds, *moved]


def main() -> None:
    """Print a line for each shape."""
    torch.set_num_threads(1)
    print("slots ranks groups   before    after    bound      s | moved: fresh  slack 0  0.5%    2%")
    for slots, nodes, ranks, groups in SHAPES:
        seeds = zip(*(measure(seed, slots, nodes, ranks, groups) for seed in SEEDS), strict=True)
        before, after, bound, seconds, *moved = map(statistics.median, seeds)
        counts = " ".join(f"{number:8.1f}" for number in moved)
        shape = f"{slots:5} {nodes * ranks:5} {groups:6}"
        print(f"{shape} {before:8.2f} {after:8.4f} {bound:8.4f} {seconds:6.2f} | {counts}")


if __name__ == "__main__":
    main()
