"""Tiny checkpoints for the tests of this room."""

from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.checkpoint.manifest import Slot
from moe_runtime.checkpoint.optimizer import PartitionState
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveFailed, SaveMeta
from moe_runtime.parallel.peers import Peers

META = SaveMeta(tokens=640, config={"model": {"hidden_size": 8}}, layout={"pp": 1, "dp": 1}, state={"a": [1]})


def weights(step: int) -> dict[str, Tensor]:
    """Two tensors that differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "embed.weight": torch.randn(6, 4, generator=generator),
        "layers.0.moe.experts.1.down": torch.randn(4, 3, generator=generator).to(torch.bfloat16),
    }


def partition(step: int) -> PartitionState:
    """A partition with FP8 codes, a BF16 moment and a counter."""
    generator = torch.Generator().manual_seed(1000 + step)
    values = torch.randn(12, generator=generator)
    layout = (
        Slot(param="embed.weight", shape=(6, 4), offset=0),
        Slot(param="layers.0.moe.experts.down", shape=(1, 4, 3), offset=24, first_expert=1),
    )
    tensors = {
        "master": values,
        "m": values.to(torch.float8_e4m3fn),
        "m_scale": values[:1].clone(),
        "v": values.square().to(torch.bfloat16),
    }
    return PartitionState("dense_decay", 0, 12, layout, tensors, {"step": step, "rate": 0.1})


def contribution(step: int) -> Contribution:
    """What the one rank of these tests brings."""
    return Contribution(weights(step), [partition(step)], {"tokenizer.json": b'{"type": "byte"}'})


def open_store(run_dir: Path, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(run_dir, Peers(), keep)


def save(run_dir: Path, step: int, keep: int = 3) -> Saved | SaveFailed:
    return open_store(run_dir, keep).save(step, contribution(step), META)
