"""Optimizer state of every kind of moments resumes bit for bit from a checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.optimizer import capture_partition
from moe_runtime.checkpoint.reshard import plan_cuts, restore_cut
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved
from moe_runtime.errors import CheckpointError
from moe_runtime.optim.adamw import AdamW
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.zero_partition import FlatEntry, Partition
from tests.unit.checkpoint.samples import META

SIZE = 300  # not a multiple of the 128 elements of a block


def make(seed: int, moments: str) -> tuple[AdamW, Partition]:
    master = torch.nn.Parameter(torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)))
    group = {"params": [master], "weight_decay": 0.1, "name": "decay"}
    optimizer = AdamW([group], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, moments=moments, seed=3)
    layout = (FlatEntry("layers.1.moe.experts.down", (2, 10, 15), 0, SIZE),)
    return optimizer, Partition("experts", True, layout, 0, SIZE, 0, 1, master)


def step(optimizer: AdamW, partition: Partition, number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    partition.master.grad = torch.randn(SIZE, generator=generator)
    optimizer.step()


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {key: value.reshape(-1).view(torch.uint8).numpy().tobytes() for key, value in state.items()}


@pytest.mark.parametrize("moments", ["fp32", "bf16", "fp8"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path, moments: str) -> None:
    optimizer, partition = make(1, moments)
    for number in range(3):
        step(optimizer, partition, number)
    state = capture_partition(partition, optimizer.native_state(partition.master), first_expert=4)
    outcome = CheckpointStore(tmp_path, Peers(), 1).save(3, Contribution(partitions=[state]), META)
    assert isinstance(outcome, Saved)

    resumed, other = make(2, moments)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.manifest.layouts[0][0].first_expert == 4
    (cut,) = plan_cuts(checkpoint, [other], moments, first_expert=4)
    assert cut.equal is not None
    with SliceReader(checkpoint) as reader:
        restore_cut(reader, cut, resumed)
    for number in range(3, 6):
        step(optimizer, partition, number)
        step(resumed, other, number)
    assert torch.equal(partition.master, other.master)
    assert bits(optimizer.native_state(partition.master)) == bits(resumed.native_state(other.master))


def test_state_that_is_neither_tensor_nor_number_is_refused() -> None:
    _, partition = make(1, "fp32")
    with pytest.raises(CheckpointError, match="optimizer state m of experts: got list"):
        capture_partition(partition, {"m": [1, 2]})
