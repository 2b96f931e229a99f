"""Checkpoints of two ranks whose files have the same shapes, so that one could pass for the other's."""

from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.checkpoint.background import BackgroundSaver
from moe_runtime.checkpoint.manifest import Slot
from moe_runtime.checkpoint.optimizer import PartitionState
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveMeta
from moe_runtime.parallel.peers import Peers

META = SaveMeta(tokens=640, config={"model": {"hidden_size": 4}}, layout={"pp": 1, "dp": 2}, state={})
LAYOUT = (Slot(param="dense.weight", shape=(6, 4), offset=0),)


def values(step: int, rank: int) -> dict[str, Tensor]:
    """The one expert of a rank, and its half of the optimizer."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    master = torch.randn(12, generator=generator)
    return {
        f"layers.0.moe.experts.{rank}.down": torch.randn(4, 3, generator=generator),
        "master": master,
        "exp_avg": master.to(torch.bfloat16),
    }


def contribution(step: int, rank: int) -> Contribution:
    """What a rank writes: weights, their average, optimizer; rank 0 also the tokenizer."""
    found = values(step, rank)
    name = f"layers.0.moe.experts.{rank}.down"
    state = {key: found[key] for key in ("master", "exp_avg")}
    part = PartitionState("dense", 12 * rank, 12 * rank + 12, LAYOUT, state, {"step": step})
    extras = {"tokenizer.json": b'{"type": "byte"}'} if rank == 0 else {}
    return Contribution({name: found[name]}, [part], extras, {name: found[name] / 2})


def save_steps(rank: int, world_size: int, run_dir: str, steps: tuple[int, ...]) -> None:
    """Save some steps, each on its thread over a group of its own."""
    peers = Peers(rank, world_size, None).over_group_of_their_own(60.0)
    saver = BackgroundSaver(CheckpointStore(Path(run_dir), peers, len(steps)))
    for step in steps:
        saver.start(step, contribution(step, rank), META)
        report = saver.wait()
        assert report is not None and isinstance(report.outcome, Saved), report
