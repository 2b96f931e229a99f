"""Formats and roundings for FP8 moments, measured against each other on the outlier suites.

    python benchmarks/moment_formats.py            # four tables for docs/benchmarks.md, a minute

One storage round trip. m and v are what AdamW would hold: sqrt(v) of the suite's spread, m 0.23 of it.
Suites are mild (lognormal, sigma 1), lognormal of sigma 3, or have one outlier of 1e3 or 1e5 in each block
of 128. Of sqrt(v) in E4M3, E5M2 and UE5M3, and of v itself in E4M3, each under a power-of-two scale for each
block: the share that becomes zero, the mean relative error of sqrt(v), and the largest update over that of
FP32 with m exact (an element whose v became zero takes m / eps).

Over time. 400 steps at beta2 0.95, or 3,000 at 0.999, after gradients drop tenfold: stored over exact
sqrt(v), median and 5th to 95th percentile, by format and rounding.

m: the error of m in units of sqrt(v), stored as the quotient m / sqrt(v), which the optimizer does, or under
a scale of its own; nearest and stochastic.

Updates. AdamW with FP8 moments beside AdamW with FP32 moments on the same gradients: over all steps and
elements the 99.9th percentile of |update| / |FP32 update| (of elements whose FP32 update is at least a
thousandth of the learning rate), the largest update over that of FP32, and the root mean square of their
difference over that of the update.
"""

from collections.abc import Callable

import torch
from moe_comm.wire.formats import (
    E4M3,
    E5M2,
    UE5M3,
    Float8Format,
    decode,
    encode_nearest,
    encode_stochastic,
)
from torch import Tensor

from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.counter_rng import derive_key, random_bits

BLOCK, BLOCKS = 128, 2048
EPS = 1e-8
ROOT_SIZE = 1e-4
FORMATS = (E4M3, E5M2, UE5M3)
Stored = Callable[[Tensor], Tensor]


def suites() -> dict[str, Tensor]:
    """sqrt(v) [BLOCKS, BLOCK] of each suite."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(BLOCKS, BLOCK, generator=draw)
    flat = torch.exp(0.5 * normal)
    made = {"mild": torch.exp(normal), "sigma 3": torch.exp(3 * normal)}
    for size in (1e3, 1e5):
        made[f"one {size:.0e}".replace("+0", "")] = flat.clone()
        made[f"one {size:.0e}".replace("+0", "")][:, 17] *= size
    return {name: values * ROOT_SIZE for name, values in made.items()}


def blockwise(values: Tensor, fmt: Float8Format, stochastic: bool, step: int = 0) -> Tensor:
    """A round trip of [blocks, BLOCK] under a power-of-two scale for each block."""
    largest = values.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(largest / fmt.max_value)))
    if stochastic:
        bits = random_bits(derive_key(1, step, 0), 0, values.numel()).view_as(values)
        return decode(encode_stochastic(values / scale, fmt, bits), fmt) * scale
    return decode(encode_nearest(values / scale, fmt), fmt) * scale


def root_storages() -> dict[str, Stored]:
    """Ways to keep sqrt(v), each a round trip."""
    made: dict[str, Stored] = {
        "v, E4M3, nearest": lambda root: blockwise(root.square(), E4M3, False).sqrt(),
        "v, E4M3, stochastic": lambda root: blockwise(root.square(), E4M3, True).sqrt(),
    }
    for fmt in FORMATS:
        made[f"sqrt(v), {fmt.name.upper()}, stochastic"] = lambda root, fmt=fmt: blockwise(root, fmt, True)
    return made


def one_round_trip() -> None:
    """The table of storage errors."""
    print("| v stored as | " + " | ".join(f"{name}: zero, error, largest update" for name in suites()) + " |")
    print("|---" * (len(suites()) + 1) + "|")
    for name, stored in root_storages().items():
        cells = []
        for root in suites().values():
            mean = 0.23 * root * torch.randn(root.shape, generator=torch.Generator().manual_seed(1))
            got = stored(root)
            largest = (mean / (got + EPS)).abs().max() / (mean / (root + EPS)).abs().max()
            zeros, error = (got == 0).double().mean(), ((got - root).abs() / root).mean()
            cells.append(f"{zeros:.2%}, {error:.1%}, {largest:.3g}x")
        print(f"| {name} | " + " | ".join(cells) + " |")


def after_drop(fmt: Float8Format, stochastic: bool, linear: bool, beta2: float, steps: int) -> Tensor:
    """Stored / exact sqrt(v), `steps` after gradients dropped tenfold; 200 steps at full size before."""
    draw = torch.Generator().manual_seed(0)
    kept, exact = torch.zeros(32, BLOCK), torch.zeros(32, BLOCK)
    for step in range(200 + steps):
        squared = torch.randn(kept.shape, generator=draw).square() * (1.0 if step < 200 else 0.01)
        exact = beta2 * exact + (1 - beta2) * squared
        new = beta2 * kept + (1 - beta2) * squared
        kept = (
            blockwise(new, fmt, stochastic, step)
            if linear
            else (blockwise(new.sqrt(), fmt, stochastic, step).square())
        )
    return (kept / exact).sqrt()


def over_time() -> None:
    """The table of averages that follow or freeze."""
    print("| stored | rounding | beta2 0.95, 400 steps: median (p5 to p95) | beta2 0.999, 3,000 steps |")
    print("|---|---|---|---|")
    for linear, formats in ((True, (E4M3,)), (False, FORMATS)):
        for fmt in formats:
            for stochastic in (False, True):
                cells = []
                for beta2, steps in ((0.95, 400), (0.999, 3000)):
                    ratio = after_drop(fmt, stochastic, linear, beta2, steps).flatten()
                    low, middle, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
                    cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
                what = f"{'v' if linear else 'sqrt(v)'} in {fmt.name.upper()}"
                print(f"| {what} | {'stochastic' if stochastic else 'nearest'} | {cells[0]} | {cells[1]} |")


def means() -> None:
    """The table of errors of m, in units of sqrt(v)."""
    print(
        "| m stored as | rounding | " + " | ".join(f"{name}: rms error / sqrt(v)" for name in suites()) + " |"
    )
    print("|---" * (len(suites()) + 2) + "|")
    for own_scale in (True, False):
        for stochastic in (False, True):
            cells = []
            for root in suites().values():
                ratio = 0.23 * torch.randn(root.shape, generator=torch.Generator().manual_seed(1))
                if own_scale:
                    got = blockwise(ratio * root, E4M3, stochastic) / root
                elif stochastic:
                    bits = random_bits(derive_key(2, 0, 0), 0, ratio.numel()).view_as(ratio)
                    got = decode(encode_stochastic(ratio * 16, E4M3, bits), E4M3) / 16
                else:
                    got = decode(encode_nearest(ratio * 16, E4M3), E4M3) / 16
                cells.append(f"{(got - ratio).square().mean().sqrt():.2%}")
            name = "m, block scale" if own_scale else "m / sqrt(v)"
            print(f"| {name} | {'stochastic' if stochastic else 'nearest'} | " + " | ".join(cells) + " |")


def updates() -> None:
    """The table of updates over time."""
    print("| betas | suite | p99.9 of ratio | largest | rms difference |")
    print("|---|---|---|---|---|")
    for betas in ((0.9, 0.95), (0.9, 0.999)):
        for name, spread in suites().items():
            ratios, largest, differences, sizes = [], [0.0, 0.0], [], []
            settings = {"lr": 1.0, "betas": betas, "eps": 1e-12, "weight_decay": 0.0}
            params = [torch.zeros(64 * BLOCK) for _ in range(2)]
            pair = [
                AdamW([p], moments=kind, **settings) for p, kind in zip(params, ("fp32", "fp8"), strict=True)
            ]
            draw = torch.Generator().manual_seed(2)
            for _ in range(300):
                grad = torch.randn(64 * BLOCK, generator=draw) * spread[:64].flatten()
                before = [p.clone() for p in params]
                for param, optimizer in zip(params, pair, strict=True):
                    param.grad = grad
                    optimizer.step()
                exact, ours = (p - was for p, was in zip(params, before, strict=True))
                counted = exact.abs() > 1e-3
                ratios.append((ours[counted] / exact[counted]).abs())
                largest = [max(a, float(u.abs().max())) for a, u in zip(largest, (exact, ours), strict=True)]
                differences.append(float((ours - exact).square().mean()))
                sizes.append(float(exact.square().mean()))
            p999 = torch.cat(ratios)[:: len(ratios) // 8].quantile(0.999)
            rms = (sum(differences) / sum(sizes)) ** 0.5
            print(f"| {betas} | {name} | {p999:.2f} | {largest[1] / largest[0]:.3f}x | {rms:.1%} |")


def main() -> None:
    """Print the four tables."""
    torch.set_num_threads(1)
    for table in (one_round_trip, over_time, means, updates):
        table()
        print()


if __name__ == "__main__":
    main()
