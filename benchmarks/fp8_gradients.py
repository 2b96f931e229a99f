"""How far are FP8's gradients from BF16's at the same weights, and does the error have a sign?

    python benchmarks/fp8_gradients.py --steps 300 --batches 8
    python benchmarks/fp8_gradients.py --steps 900 --batches 16 --by-kind

The model of `fp8_loss.py` is trained in BF16 for some steps. Then the same batches, of data that comes later,
go through it in each arithmetic:

    fp8        all products
    fprop      those of the forward alone; dgrad, wgrad: one kind of the backward alone
    noise N    BF16 with 2.6% noise in the weights of FP8 modules, the size of E4M3's error; N: which draw

Rows are dispatched as FP8 tiles in all but the last. Error: norm of the difference over norm of BF16's
gradient. Slope: of FP8's gradient against BF16's; below one, updates would be too small. Both for the
gradients of single batches and for their mean over batches, in which what has no sign averages out. Weights
are the same in all batches, so their error does not; `noise` tells how large that is by itself.
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fp8_loss import ALPHA, MODEL, SEQ_LEN, Masters, Run, Setting, build_plain
from moe_runtime.config.fp8 import Fp8Config
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.shards import TokenDataset
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8

NOISE = 0.026
CONFIGS = {
    "fp8": Fp8Config(),
    "fprop": Fp8Config(dgrad="bf16", wgrad="bf16"),
    "dgrad": Fp8Config(fprop="bf16", wgrad="bf16"),
    "wgrad": Fp8Config(fprop="bf16", dgrad="bf16"),
}
VARIANTS = ("bf16", *CONFIGS, "noise 1", "noise 2", "noise 3")
SKIP_STEPS = 1000  # batches of steps that no training here has reached


class Probe:
    """The trained weights in one arithmetic."""

    def __init__(self, variant: str, trained: Run) -> None:
        self.model = build_plain(0, "cpu", keep_tiles=variant in CONFIGS)
        self.masters = Masters(self.model)
        self.masters.take(trained.masters)
        for (_, moe), (_, source) in zip(self.model.moe_layers(), trained.model.moe_layers(), strict=True):
            moe.router.bias.copy_(source.router.bias)
        if variant in CONFIGS:
            use_fp8(self.model, Policy(CONFIGS[variant]), WeightCasts())
        if variant.startswith("noise"):
            self._add_noise(int(variant.split()[1]))

    @torch.no_grad()
    def _add_noise(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for name, param in self.model.named_parameters():
            if param.ndim > 1 and kind_of(name) not in ("embed", "head", "moe.router"):
                param.mul_(1 + NOISE * torch.randn(param.shape, generator=draw))

    def gradients(self, batch: Tensor) -> tuple[float, list[Tensor]]:
        """The loss of a batch and the gradients of all weights."""
        for master in self.masters.masters:
            assert master.grad is not None, "a master without its gradient"
            master.grad.zero_()
        found = self.model.losses(batch)
        (found.loss + ALPHA * found.balance).backward()
        return float(found.loss.detach()), [gradient.clone() for gradient in self.masters.gather()]


def kind_of(name: str) -> str:
    """A parameter's name without its layer."""
    return re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight")


class Sums:
    """Squares of a difference and of what it is a difference to, and their product, by kind of weight."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds, self._sums = kinds, {kind: torch.zeros(3) for kind in kinds}

    def add(self, ours: list[Tensor], exact: list[Tensor]) -> None:
        for kind, a, b in zip(self.kinds, ours, exact, strict=True):
            self._sums[kind] += torch.stack([(a - b).square().sum(), b.square().sum(), (a * b).sum()])

    def told(self, kind: str | None = None) -> str:
        apart, exact, along = sum(self._sums.values()) if kind is None else self._sums[kind]
        return f"error {float((apart / exact).sqrt()):.1%} slope {float(along / exact):.3f}"


def measure(trained: Run, data: Path, batches: int, by_kind: bool) -> None:
    """Print a line for each arithmetic, and for each kind of weight if asked."""
    loader = BatchLoader(TokenDataset.open(data, "train"), SEQ_LEN, 0, 0, MODEL.vocab_size)
    size = trained.setting.batch
    sequences = [loader.sequences((SKIP_STEPS + n) * size, size) for n in range(batches)]
    exact = [Probe("bf16", trained).gradients(batch) for batch in sequences]
    kinds = [kind_of(name) for name, _ in trained.model.named_parameters()]
    for variant in VARIANTS[1:]:
        probe, each, whole = Probe(variant, trained), Sums(kinds), Sums(kinds)
        ours = [probe.gradients(batch) for batch in sequences]
        for (_, got), (_, wanted) in zip(ours, exact, strict=True):
            each.add(got, wanted)
        means = (
            [sum(g) / batches for g in zip(*(found[1] for found in runs), strict=True)]
            for runs in (ours, exact)
        )
        whole.add(*means)
        losses = torch.tensor([[found[0] for found in runs] for runs in (ours, exact)])
        apart = 100 * (losses[0] - losses[1]) / losses[1].mean()
        loss = f"loss {float(apart.mean()):+.3f} +- {float(apart.std()) / batches**0.5:.3f}%"
        print(f"{variant:8} {loss}; a batch: {each.told()}; mean of {batches}: {whole.told()}", flush=True)
        for kind in dict.fromkeys(kinds) if by_kind else ():
            print(f"    {kind:20} a batch: {each.told(kind)}; mean: {whole.told(kind)}")


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="BF16 steps before the measurement")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--by-kind", action="store_true", help="each kind of weight apart")
    parser.add_argument("--data", type=Path, default=Path("data/stdlib-byte"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained = Run("bf16", 0, Setting(1000, 8, 5e-4, "cpu"), args.data)
    trained.steps(0, args.steps)
    measure(trained, args.data, args.batches, args.by_kind)


if __name__ == "__main__":
    main()
