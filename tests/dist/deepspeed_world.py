"""A small model of somebody else's under plain `deepspeed.initialize`, with our AdamW as its client.

`KINDS` are DeepSpeed's wrappers. Two parameter groups with and without decay; sizes that no 128 divides; at
stage 3 several sub-groups. Data are a function of the step and of the place in the global batch, so that
another number of ranks trains on the same.
"""

import argparse
import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_runtime.optim import AdamW

GLOBAL_BATCH = 8
# wrapper -> (stage, bf16, gradients accumulated in FP32)
KINDS = {
    "stage1": (1, False, False),
    "stage2": (2, True, False),
    "stage3": (3, False, False),
    "bf16_optimizer": (1, True, True),
    "stage3_bf16": (3, True, False),
}


def quiet() -> None:
    """DeepSpeed's own kernels are not compiled, and it says less."""
    from moe_runtime.parallel.zero_engine import join_process_group

    join_process_group()
    logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")


def somebodys_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 100), nn.Tanh(), nn.Linear(100, 37), nn.Tanh(), nn.Linear(37, 1))


def open_engine(kind: str, moments: str = "fp8", seed: int = 0, universal: bool = False) -> Any:
    """An engine over a fresh model; `universal` loads universal checkpoints."""
    import deepspeed

    stage, bf16, fp32_gradients = KINDS[kind]
    model = somebodys_model(seed)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": bf16},
        "checkpoint": {"load_universal": universal},
    }
    if stage == 3:
        config["zero_optimization"]["sub_group_size"] = 3000
    if fp32_gradients:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    with contextlib.redirect_stdout(io.StringIO()):
        return deepspeed.initialize(
            model=model,
            optimizer=lambda _: AdamW(groups, lr=1e-2, moments=moments, seed=3),
            config=config,
        )[0]


def train(engine: Any, steps: range) -> float:
    """Loss of the global batch at the last step."""
    loss = torch.zeros(())
    for step in steps:
        inputs = torch.randn(GLOBAL_BATCH, 24, generator=torch.Generator().manual_seed(step))
        targets = inputs.sum(1, keepdim=True)
        rows = slice(dist.get_rank() * engine.train_micro_batch_size_per_gpu(), None)
        mine, wanted = (t[rows][: engine.train_micro_batch_size_per_gpu()] for t in (inputs, targets))
        dtype = next(engine.module.parameters()).dtype
        loss = (engine(mine.to(dtype)).float() - wanted).square().mean()
        engine.backward(loss)
        engine.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def partitions(engine: Any) -> list[Tensor]:
    """This rank's flat FP32 masters, the client's parameters."""
    wrapper = engine.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(wrapper, name):
            return list(getattr(wrapper, name))
    return list(wrapper.fp32_groups_flat_partition)


def bits(engine: Any) -> list[dict[str, Tensor]]:
    """Copies of every master and of its state as stored; padding, which stage 3 never sets, left out."""
    client = engine.optimizer.optimizer
    found = []
    for flat in partitions(engine):
        is_stepped = client.logical_state(flat)["exp_avg_sq"] > 0
        master = flat.detach().where(is_stepped, torch.zeros(()))
        found.append({"master": master} | {key: t.clone() for key, t in client.state[flat].items()})
    return found


def logical(engine: Any) -> list[dict[str, Tensor]]:
    """Copies of every partition's state as numbers."""
    client = engine.optimizer.optimizer
    return [client.logical_state(flat) for flat in partitions(engine)]


def same(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def convert(folder: Path, tag: str) -> str:
    """Make `tag` universal on rank 0; gives the new tag."""
    from deepspeed.checkpoint import ds_to_universal

    made = f"{tag}_universal"
    if dist.get_rank() == 0:
        arguments = argparse.Namespace(
            input_folder=str(folder / tag),
            output_folder=str(folder / made),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    dist.barrier()
    return made


def save(engine: Any, folder: Path, tag: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        engine.save_checkpoint(str(folder), tag=tag)


def load(engine: Any, folder: Path, tag: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        engine.load_checkpoint(str(folder), tag=tag)


def exported(folder: Path, tag: str) -> dict[str, dict[str, Tensor]]:
    """Parameter -> fp32, exp_avg, exp_avg_sq of a universal checkpoint, flat."""
    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted((folder / tag / "zero").glob("*/*.pt")):
        value = torch.load(path, weights_only=True)
        value = value["param"] if isinstance(value, dict) else value
        found.setdefault(path.parent.name, {})[path.stem] = torch.as_tensor(value).flatten()
    return found
