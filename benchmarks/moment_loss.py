"""Does training end at the same loss with FP8 moments as with FP32 ones? A small MoE, paired runs.

    python benchmarks/moment_loss.py --out moment_loss.jsonl      # all runs, one after another; resumable
    python benchmarks/moment_loss.py --out moment_loss.jsonl --report

Runs of a pair share seed, initial weights and data: the standard library as bytes. The loss of a run is the
mean of its last 200 steps. The masters are one flat FP32 tensor for each parameter group, as under ZeRO, so
blocks of 128 cut through parameters. Controls: `control` keeps m in FP32 and v, as v, in E4M3 under a
power-of-two scale for each block of 128, rounded to nearest; it must miss the gate that `fp8` keeps.
`perturbed` is FP32 with initial weights changed by one part in 10^6: what it differs by is the chaos of
training, below which no storage can be told from another.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from moe_comm.wire.formats import E4M3, decode, encode_nearest
from torch import Tensor

from moe_runtime.config.schema import DataConfig, ModelConfig, RecipeConfig
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.prepare import ensure_prepared
from moe_runtime.data.shards import TokenDataset
from moe_runtime.model.transformer import Transformer
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.groups import parameter_groups
from moe_runtime.optim.schedule import lr_at

GATE = 0.0025
LAST = 200
SEQ_LEN, BATCH = 64, 64
PEAK_LR = 1.5e-3
STORAGES = ("fp32", "fp8", "control", "perturbed")
MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=64,
    num_layers=3,
    num_dense_layers=1,
    ffn_size=192,
    num_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    num_experts=8,
    top_k=2,
    expert_ffn_size=64,
    mtp_depth=0,
    init_std=0.02,
)


def flat_groups(model: Transformer) -> list[dict]:
    """Parameter groups of one flat FP32 tensor each, of which the model's weights and gradients are views."""
    groups = parameter_groups(model.named_parameters(), 0.1, "experts")
    for group in groups:
        flat = torch.cat([param.detach().reshape(-1) for param in group["params"]])
        flat.grad = torch.zeros_like(flat)
        begin = 0
        for param in group["params"]:
            part = slice(begin, begin + param.numel())
            param.data, param.grad = flat[part].view_as(param), flat.grad[part].view_as(param)
            begin += param.numel()
        group["params"] = [flat]
    return groups


def linear_nearest(square: Tensor) -> Tensor:
    """v after a round trip through E4M3 under a power-of-two scale for each 128, nearest: the control."""
    blocks = torch.nn.functional.pad(square, (0, -square.numel() % 128)).view(-1, 128)
    largest = blocks.amax(1, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3.max_value)))
    return (decode(encode_nearest(blocks / scale, E4M3), E4M3) * scale).view(-1)[: square.numel()]


def train(storage: str, beta2: float, seed: int, steps: int, data: Path) -> list[float]:
    """The loss of every step of one run."""
    model = Transformer(MODEL)
    model.init_weights(seed)
    groups = flat_groups(model)
    if storage == "perturbed":
        draw = torch.Generator().manual_seed(seed)
        for flat in (group["params"][0] for group in groups):
            flat.mul_(1 + 1e-6 * torch.randn(flat.shape, generator=draw))
    kind = storage if storage == "fp8" else "fp32"
    optimizer = AdamW(groups, betas=(0.9, beta2), moments=kind, seed=seed)
    half = steps // 2
    recipe = RecipeConfig(warmup_steps=20, constant_until_tokens=half, cosine_tokens=steps - half)
    loader = BatchLoader(TokenDataset.open(data, "train"), SEQ_LEN, 0, seed, MODEL.vocab_size)
    losses = []
    for step in range(steps):
        found = model.losses(loader.sequences(step * BATCH, BATCH))
        (found.loss + 1e-4 * found.balance).backward()
        flats = [group["params"][0] for group in optimizer.param_groups]
        torch.nn.utils.clip_grad_norm_(flats, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(recipe, PEAK_LR, step, step)
        optimizer.step()
        for flat in flats:
            flat.grad.zero_()
            if storage == "control":
                state = optimizer.state[flat]
                state["exp_avg_sq"] = linear_nearest(state["exp_avg_sq"])
        losses.append(float(found.loss.detach()))
    return losses


def read_runs(path: Path) -> dict[tuple[str, float, int], dict]:
    """Finished runs of a file by (storage, beta2, seed)."""
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(run["storage"], run["beta2"], run["seed"]): run for run in runs}


def differences(runs: dict[tuple[str, float, int], dict], storage: str, beta2: float) -> list[float]:
    """Relative differences from FP32 of every seed that has both runs."""
    pairs = [
        (run["loss"], runs["fp32", beta2, seed]["loss"])
        for (kind, beta, seed), run in sorted(runs.items())
        if (kind, beta) == (storage, beta2) and ("fp32", beta2, seed) in runs
    ]
    return [loss / reference - 1 for loss, reference in pairs]


def report(runs: dict[tuple[str, float, int], dict]) -> None:
    """One line for each storage and beta2: the mean difference, which the gate is for, and each seed's."""
    print(f"gate: |mean over seeds of loss / loss(fp32) - 1| <= {GATE:.2%}")
    for beta2 in sorted({key[1] for key in runs}):
        for storage in STORAGES[1:]:
            found = differences(runs, storage, beta2)
            if found:
                mean, each = statistics.mean(found), " ".join(f"{x:+.3%}" for x in found)
                error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
                verdict = "holds" if abs(mean) <= GATE else "misses"
                print(f"beta2 {beta2:<6} {storage:8} {mean:+.3%} +- {error:.3%} {verdict}; seeds: {each}")


def main() -> None:
    """Do what is not in the file yet, then report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("moment_loss.jsonl"))
    parser.add_argument("--data", default="data/stdlib-byte")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--control-seeds", type=int, default=1, help="it misses by far more than seeds differ"
    )
    parser.add_argument("--beta2", type=float, nargs="+", default=[0.95, 0.999])
    parser.add_argument("--report", action="store_true", help="only report what the file holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = read_runs(args.out)
    if not args.report:
        ensure_prepared(DataConfig(path=args.data, source="builtin:stdlib"), 0)
        places = [(beta2, seed) for seed in range(args.seeds) for beta2 in args.beta2]
        wanted = [(storage, *place) for place in places for storage in STORAGES[:3]]
        wanted += [("perturbed", *place) for place in places]
        for storage, beta2, seed in wanted:
            if (storage, beta2, seed) in runs or (storage == "control" and seed >= args.control_seeds):
                continue
            began = time.perf_counter()
            losses = train(storage, beta2, seed, args.steps, Path(args.data))
            run = {
                "storage": storage,
                "beta2": beta2,
                "seed": seed,
                "steps": args.steps,
                "loss": statistics.mean(losses[-LAST:]),
                "seconds": time.perf_counter() - began,
            }
            runs[storage, beta2, seed] = run
            with args.out.open("a") as file:
                file.write(json.dumps(run) + "\n")
    report(runs)


if __name__ == "__main__":
    main()
