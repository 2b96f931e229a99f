"""Does training end at the same loss in FP8 as in BF16? A small MoE on real text, paired runs.

    python benchmarks/fp8_loss.py --out fp8_loss.jsonl                        # all runs that are missing
    python benchmarks/fp8_loss.py --out fp8_loss.jsonl --variants bf16 fp8    # these alone
    python benchmarks/fp8_loss.py --out fp8_loss.jsonl --warm 300             # all begin from trained weights
    python benchmarks/fp8_loss.py --out fp8_loss.jsonl --report

Runs with one seed share initial weights, data and order: the standard library as bytes. The loss of a run is
the mean of its last 200 steps; the figure is the relative difference to `bf16`. Weights and activations are
BF16 and masters FP32 in all variants:

    bf16           every product in BF16
    perturbed      the same from weights changed by one part in a thousand: its difference to `bf16` is the
                   chaos of training, below which nothing can be told
    fp8            the policy of `fp8/policy.py`, rows of experts dispatched as FP8 tiles
    bf16-wgrad     the same with weight gradients multiplied in BF16
    block-grads    the same with gradients in 128 x 128 blocks
    fixed-scales   E4M3 under one scale for each kind of tensor, fixed at the first cast: must miss the gate
    unscaled       E4M3 without any scale: must miss the gate

A run is one line of the file, written when it ends; what is in the file is not run again.

Chaos is made in the first few hundred steps, when experts part ways: two BF16 runs whose initial weights
differ by a thousandth end 0.2 to 0.8% apart, whatever comes later. With `--warm N` the first N steps are
BF16 in all variants; weights, masters and moments after them are those that a seed's runs have in common
(`perturbed` changes those weights), and the arithmetics part there, with all their steps before them.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from moe_comm.local import LocalDispatcher
from torch import Tensor

from benchmarks.fp8_controls import BlockGradients, FixedScales
from moe_runtime.config.fp8 import Fp8Config
from moe_runtime.config.schema import DataConfig, ModelConfig, RecipeConfig
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.prepare import ensure_prepared
from moe_runtime.data.shards import TokenDataset
from moe_runtime.fp8 import cast
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.router import update_bias
from moe_runtime.model.transformer import Transformer
from moe_runtime.optim.schedule import lr_at

GATE = 0.0025
LAST = 200
SEQ_LEN = 128
CLIP, GAMMA, ALPHA = 1.0, 1e-3, 1e-4
VARIANTS = ("bf16", "perturbed", "fp8", "bf16-wgrad", "block-grads", "fixed-scales", "unscaled")
MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=256,
    num_layers=3,
    num_dense_layers=1,
    ffn_size=512,
    num_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    num_experts=8,
    top_k=2,
    expert_ffn_size=256,
    num_groups=4,
    num_groups_kept=2,
    mtp_depth=0,
    init_std=0.02,
)


@dataclass(frozen=True)
class Setting:
    """What runs that are compared have in common.

    Args:
        steps: of the variant, without `warm`.
        batch: sequences a step.
        lr: peak learning rate.
        warm: BF16 steps before those.
    """

    steps: int
    batch: int
    lr: float
    device: str
    warm: int = 0

    def recipe(self) -> RecipeConfig:
        """Warm-up, constant to the middle, cosine to a tenth."""
        half = (self.warm + self.steps) * self.batch * SEQ_LEN // 2
        return RecipeConfig(warmup_steps=50, constant_until_tokens=half, cosine_tokens=half, min_lr_ratio=0.1)


def build_plain(seed: int, device: str, keep_tiles: bool) -> Transformer:
    """The model in BF16; its rows may be dispatched as FP8 tiles."""
    dispatcher = LocalDispatcher(MODEL.num_experts, keep_tiles=keep_tiles)
    model = Transformer(MODEL, dtype=torch.bfloat16, device=device, dispatcher=dispatcher)
    model.init_weights(seed)
    return model


def build(variant: str, seed: int, device: str) -> tuple[Transformer, WeightCasts | None]:
    """A model of one variant; the casts of its weights, where it has some."""
    model = build_plain(seed, device, keep_tiles=variant in ("fp8", "bf16-wgrad"))
    if variant in ("bf16", "perturbed"):
        return model, None
    policy = Policy(Fp8Config(wgrad="bf16") if variant == "bf16-wgrad" else Fp8Config())
    if variant in ("fixed-scales", "unscaled"):
        fixed = FixedScales(None if variant == "fixed-scales" else 1.0)
        weights = WeightCasts(fixed.weight)
        use_fp8(model, policy, weights, fixed)
    else:
        weights = WeightCasts()
        use_fp8(model, policy, weights, BlockGradients() if variant == "block-grads" else cast)
    return model, weights


@torch.no_grad()
def perturb(masters: list[Tensor]) -> None:
    """Change weights by a thousandth, which turns the BF16 rounding of some of them."""
    draw = torch.Generator().manual_seed(0)
    for master in masters:
        master.mul_(1 + 1e-3 * torch.randn(master.shape, generator=draw).to(master.device))


class Masters:
    """FP32 masters and gradients of BF16 weights, and AdamW over them."""

    def __init__(self, model: Transformer) -> None:
        self._params = list(model.parameters())
        self.masters = [param.detach().float() for param in self._params]
        for param, master in zip(self._params, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            param.grad_sink = self._sink_into(master.grad)  # type: ignore[attr-defined]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": 0.1},
            {"params": [m for m in self.masters if m.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def _sink_into(self, buffer: Tensor) -> Any:
        def sink(weight: Tensor, accumulate: Any, deferrable: bool) -> None:
            with torch.no_grad():
                accumulate(buffer)

        return sink

    def gather(self) -> list[Tensor]:
        """Gradients since they were zeroed, FP32."""
        gradients = []
        for param, master in zip(self._params, self.masters, strict=True):
            assert master.grad is not None, "a master without its gradient"
            if param.grad is not None:  # norm gains, the router
                master.grad.add_(param.grad)
                param.grad = None
            gradients.append(master.grad)
        return gradients

    def step(self, lr: float) -> None:
        """Clip, update the masters, round them into the weights, zero the gradients."""
        self.gather()
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.into_weights()
        self._optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def into_weights(self) -> None:
        """Round the masters into the weights."""
        for param, master in zip(self._params, self.masters, strict=True):
            param.copy_(master)

    def take(self, other: "Masters") -> None:
        """Go on from another's masters and moments."""
        for master, source in zip(self.masters, other.masters, strict=True):
            master.copy_(source)
        self._optimizer.load_state_dict(copy.deepcopy(other._optimizer.state_dict()))
        self.into_weights()


class Run:
    """A model of a variant in training."""

    def __init__(self, variant: str, seed: int, setting: Setting, data: Path) -> None:
        self.setting = setting
        self.model, self._weights = build(variant, seed, setting.device)
        self.masters = Masters(self.model)
        self._loader = BatchLoader(TokenDataset.open(data, "train"), SEQ_LEN, 0, seed, MODEL.vocab_size)
        self._recipe = setting.recipe()

    def steps(self, first: int, last: int) -> list[float]:
        """Train these steps: their losses."""
        setting, losses = self.setting, []
        for step in range(first, last):
            batch = self._loader.sequences(step * setting.batch, setting.batch).to(setting.device)
            found = self.model.losses(batch)
            (found.loss + ALPHA * found.balance).backward()
            self.masters.step(lr_at(self._recipe, setting.lr, step, step * setting.batch * SEQ_LEN))
            if self._weights is not None:
                self._weights.drop()
            for (_, moe), counts in zip(self.model.moe_layers(), found.counts, strict=True):
                update_bias(moe.router.bias, counts, GAMMA)
            losses.append(found.loss.detach())  # no wait of the host for a device
        return [float(loss) for loss in losses]

    def go_on_from(self, other: "Run") -> None:
        """Take over what another has trained."""
        self.masters.take(other.masters)
        for (_, moe), (_, source) in zip(self.model.moe_layers(), other.model.moe_layers(), strict=True):
            moe.router.bias.copy_(source.router.bias)


def warmed(seed: int, setting: Setting, data: Path) -> Run:
    """What the runs of a seed go on from."""
    run = Run("bf16", seed, setting, data)
    run.steps(0, setting.warm)
    return run


def train(variant: str, seed: int, setting: Setting, data: Path, start: Run) -> dict[str, Any]:
    """One run: its line."""
    began = time.perf_counter()
    run = Run(variant, seed, setting, data)
    run.go_on_from(start)
    if variant == "perturbed":
        perturb(run.masters.masters)
        run.masters.into_weights()
    losses = run.steps(setting.warm, setting.warm + setting.steps)
    return {
        "variant": variant,
        "seed": seed,
        **asdict(setting),
        "loss": statistics.fmean(losses[-LAST:]),
        "validation": _validate(run.model, data, setting.device),
        "step_s": (time.perf_counter() - began) / setting.steps,
        "every_20": [round(statistics.fmean(losses[i : i + 20]), 5) for i in range(0, setting.steps, 20)],
    }


@torch.no_grad()
def _validate(model: Transformer, data: Path, device: str) -> float:
    loader = BatchLoader(TokenDataset.open(data, "validation"), SEQ_LEN, 0, 0, MODEL.vocab_size)
    batches = loader.validation_batches(128, 16)
    return statistics.fmean(float(model.losses(rows.to(device)).loss) for rows in batches)


Runs = dict[tuple[str, int], dict[str, Any]]


def read(path: Path, setting: Setting) -> Runs:
    """Runs of a setting that are done, by variant and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [json.loads(line) for line in lines if line.endswith("}")]
    wanted = asdict(setting)
    runs = [{"warm": 0} | run for run in runs]
    return {(run["variant"], run["seed"]): run for run in runs if wanted.items() <= run.items()}


def report(runs: Runs) -> None:
    """A line for each variant: relative difference of the loss to BF16, seed by seed, and of their means."""
    print(f"loss: mean of the last {LAST} steps; difference to bf16 in % +- standard error, gate {GATE:.2%}")
    for variant in VARIANTS:
        pairs = [
            (run, runs["bf16", seed])
            for (name, seed), run in sorted(runs.items())
            if name == variant and ("bf16", seed) in runs
        ]
        if not pairs:
            continue
        losses = [run["loss"] for run, _ in pairs]
        apart = [100 * (run["loss"] / base["loss"] - 1) for run, base in pairs]
        held = [100 * (run["validation"] / base["validation"] - 1) for run, base in pairs]
        mean, error = statistics.fmean(apart), _standard_error(apart)
        verdict = "holds" if abs(mean) < 100 * GATE else "MISSES"
        each = " ".join(f"{number:+.3f}" for number in apart)
        found = f"mean {mean:+.3f} +- {error:.3f}: {verdict}"
        checked = f"validation {statistics.fmean(held):+.3f} +- {_standard_error(held):.3f}"
        print(f"{variant:13} loss {statistics.fmean(losses):.4f}  by seed {each}  {found}  {checked}")


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="lines of runs, added to")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="sequences of 128 tokens a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warm", type=int, default=0, help="BF16 steps before those, the same for all")
    parser.add_argument("--data", type=Path, default=Path("data/stdlib-byte"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(args.steps, args.batch, args.lr, args.device, args.warm)
    if not args.report:
        config = DataConfig(path=str(args.data), source="builtin:stdlib", tokenizer="byte")
        ensure_prepared(config, seed=0)
        for seed in args.seeds:
            missing = [variant for variant in args.variants if (variant, seed) not in read(args.out, setting)]
            if missing:
                start = warmed(seed, setting, args.data)
                for variant in missing:
                    line = train(variant, seed, setting, args.data, start)
                    with args.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    figures = f"{line['loss']:.4f}, {line['step_s']:.3f} s a step"
                    print(f"{variant} seed {seed}: {figures}", flush=True)
    report(read(args.out, setting))


if __name__ == "__main__":
    main()
