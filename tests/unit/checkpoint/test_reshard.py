"""Optimizer state of one cut in another: exact where it can be, within the bound elsewhere, or refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_runtime.checkpoint.flat_index import spans_of
from moe_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from moe_runtime.checkpoint.manifest import Manifest, PartitionEntry, Slot
from moe_runtime.checkpoint.optimizer import capture_partition
from moe_runtime.checkpoint.reshard import MOVED_BLOCK_BOUND, plan_cuts, restore_cut
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved
from moe_runtime.errors import CheckpointError
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.moments import BLOCK
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.zero_partition import FlatEntry, Partition
from tests.unit.checkpoint.samples import META

# Stacks of two experts, and what is no expert.
EXPERTS = FlatEntry("layers.1.moe.experts.down", (2, 15, 20), 0, 600)
OTHER = FlatEntry("layers.2.moe.experts.down", (2, 10, 25), 0, 500)
MATRIX = FlatEntry("head.weight", (25, 20), 0, 500)
TOTAL = 500


def _owner(moments: str, entries: Sequence[FlatEntry], start: int, end: int) -> tuple[AdamW, Partition]:
    """An optimizer over one partition of a flat group, its master zero."""
    laid, offset = [], 0
    for entry in entries:
        laid.append(FlatEntry(entry.name, entry.shape, offset, entry.numel))
        offset += entry.numel
    master = torch.nn.Parameter(torch.zeros(end - start))
    optimizer = AdamW([{"params": [master], "offset": start}], lr=1e-2, moments=moments, seed=3)
    is_expert = ".experts." in entries[0].name
    return optimizer, Partition("group", is_expert, tuple(laid), start, end, 0, 1, master)


def _train(optimizer: AdamW, partition: Partition, spread: float = 0.0, steps: int = 3) -> None:
    """A few steps; gradients of odd blocks are smaller by so many octaves."""
    generator = torch.Generator().manual_seed(11)
    size = partition.master.numel()
    scale = torch.exp2(-spread * (torch.arange(size) // BLOCK % 2))
    for _ in range(steps):
        partition.master.grad = torch.randn(size, generator=generator) * scale
        optimizer.step()


def _save(folder: Path, owner: tuple[AdamW, Partition], first_expert: int = 0) -> Checkpoint:
    """A partition as the whole of a checkpoint."""
    optimizer, partition = owner
    state = capture_partition(partition, optimizer.native_state(partition.master), first_expert)
    outcome = CheckpointStore(folder, Peers(), 1).save(3, Contribution(partitions=[state]), META)
    assert isinstance(outcome, Saved)
    return open_checkpoint(folder)


def _restore(checkpoint: Checkpoint, owner: tuple[AdamW, Partition], moments: str, first: int = 0) -> int:
    """Fill an owner; gives the bytes read."""
    optimizer, partition = owner
    cuts = plan_cuts(checkpoint, [partition], moments, first)
    with SliceReader(checkpoint) as reader:
        for cut in cuts:
            restore_cut(reader, cut, optimizer)
    return reader.bytes_read


def _logical(owner: tuple[AdamW, Partition]) -> dict[str, Tensor]:
    optimizer, partition = owner
    return {"master": partition.master.detach(), **optimizer.logical_state(partition.master)}


@pytest.mark.parametrize(
    ("before", "after"),
    [("fp32", "fp32"), ("bf16", "bf16"), ("fp8", "fp8"), ("fp8", "bf16"), ("fp8", "fp32"), ("bf16", "fp32")],
)
def test_one_expert_of_two_comes_out_of_the_middle_of_a_partition(
    tmp_path: Path, before: str, after: str
) -> None:
    source = _owner(before, [EXPERTS, OTHER], 0, 1104)
    _train(*source)
    checkpoint = _save(tmp_path, source, first_expert=4)
    # Expert 5 alone, the second half of it: elements 150 to 300 of 600 + 300.
    one = FlatEntry(EXPERTS.name, (1, 15, 20), 0, 300)
    target = _owner(after, [one], 150, 300)
    _restore(checkpoint, target, after, first=5)
    was, now = _logical(source), _logical(target)
    for key in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(now[key], was[key][450:600]), key
    assert float(now["step"]) == 3


def test_padding_is_zero_and_a_partition_of_padding_alone_has_steps(tmp_path: Path) -> None:
    source = _owner("fp8", [MATRIX], 0, 504)
    _train(*source)
    checkpoint = _save(tmp_path, source)
    target = _owner("fp8", [MATRIX], 504, 756)
    _restore(checkpoint, target, "fp8")
    now = _logical(target)
    assert float(now["step"]) == 3
    assert not any(now[key].any() for key in ("master", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("moments", ["fp32", "fp8"])
def test_no_more_is_read_than_what_is_asked_for(tmp_path: Path, moments: str) -> None:
    source = _owner(moments, [MATRIX], 0, 504)
    _train(*source)
    checkpoint = _save(tmp_path, source)
    target = _owner(moments, [MATRIX], 200, 300)
    read = _restore(checkpoint, target, moments)
    blocks = 2 * (2 * BLOCK + 1)  # elements 128 to 384: two of codes and one scale for each block
    assert read == 4 + 100 * 4 + (blocks if moments == "fp8" else 100 * 8)


@pytest.mark.parametrize("spread", [0.0, 16.0, 31.0, 60.0])
@pytest.mark.parametrize("shift", [1, 64, 127, BLOCK])
def test_fp8_moments_stay_within_the_bound_where_blocks_move(
    tmp_path: Path, shift: int, spread: float
) -> None:
    source = _owner("fp8", [MATRIX], 0, TOTAL)
    _train(*source, spread=spread)
    checkpoint = _save(tmp_path, source)
    target = _owner("fp8", [MATRIX], shift, TOTAL)
    _restore(checkpoint, target, "fp8")
    was, now = _logical(source), _logical(target)
    roots = [state["exp_avg_sq"].double().sqrt() for state in (was, now)]
    means = [state["exp_avg"].double() for state in (was, now)]
    before = [roots[0][shift:], means[0][shift:]]
    if shift == BLOCK or spread <= 16:  # borders stay, or no block spreads over 2^29: nothing changes
        assert torch.equal(before[0], roots[1]) and torch.equal(before[1], means[1])
        return
    blocks = torch.arange(TOTAL - shift) // BLOCK
    largest = torch.zeros(int(blocks.max()) + 1, dtype=torch.float64)
    largest = largest.scatter_reduce(0, blocks, before[0], "amax")[blocks]
    bound = largest * MOVED_BLOCK_BOUND
    assert bool((before[0] != roots[1]).any()), "the case must move something"
    assert bool(((before[0] - roots[1]).abs() <= bound).all())
    assert bool(((before[1] - means[1]).abs() <= 28 * bound).all())


def test_state_from_before_the_first_step_is_no_state(tmp_path: Path) -> None:
    source = _owner("fp8", [MATRIX], 0, 504)
    with torch.no_grad():
        source[1].master.add_(1.5)
    checkpoint = _save(tmp_path, source)
    target = _owner("fp8", [MATRIX], 100, 300)
    _train(*target)
    _restore(checkpoint, target, "fp8")
    assert target[0].native_state(target[1].master) == {}
    assert bool((target[1].master == 1.5).all())


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    source = _owner("fp32", [EXPERTS], 0, 600)
    _train(*source)
    checkpoint = _save(tmp_path, source, first_expert=2)
    absent = _owner("fp32", [EXPERTS], 0, 600)[1]
    with pytest.raises(CheckpointError, match=r"expert 4: expected elements 0 to 300, got none"):
        plan_cuts(checkpoint, [absent], "fp32", first_expert=3)
    other_shape = _owner("fp32", [FlatEntry(EXPERTS.name, (2, 20, 15), 0, 600)], 0, 600)[1]
    with pytest.raises(CheckpointError, match=r"expert 2: expected shape \[20, 15\], got \[15, 20\]"):
        plan_cuts(checkpoint, [other_shape], "fp32", first_expert=2)
    stranger = _owner("fp32", [MATRIX], 0, 500)[1]
    with pytest.raises(CheckpointError, match=r"head.weight: expected elements 0 to 500, got none from 0 on"):
        plan_cuts(checkpoint, [stranger], "fp32")


def _with(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    fields = json.loads(checkpoint.manifest.model_dump_json()) | changes
    return Checkpoint(checkpoint.path, Manifest.model_validate_json(json.dumps(fields)))


def test_weights_without_optimizer_state_are_no_place_to_resume(tmp_path: Path) -> None:
    source = _owner("fp32", [MATRIX], 0, 500)
    _train(*source)
    bare = _with(_save(tmp_path, source), partitions=[])
    with pytest.raises(CheckpointError, match="expected optimizer state, got weights alone"):
        plan_cuts(bare, [source[1]], "fp32")


def test_moments_of_no_known_form_are_refused(tmp_path: Path) -> None:
    source = _owner("bf16", [MATRIX], 0, 500)
    _train(*source)
    checkpoint = _save(tmp_path, source)
    part: PartitionEntry = checkpoint.manifest.partitions[0]
    fewer = part.model_dump(mode="json") | {"keys": ["master", "step", "exp_avg"]}
    with pytest.raises(CheckpointError, match="expected master and moments of 500 elements as fp32, bf16 or"):
        plan_cuts(_with(checkpoint, partitions=[fewer]), [source[1]], "bf16")


def test_a_claim_of_very_many_experts_costs_no_time() -> None:
    slot = Slot(param=EXPERTS.name, shape=(10**15, 3), offset=0, first_expert=0)
    (span,) = spans_of([slot], 3 * 10**14 + 1, 3 * 10**14 + 3)
    assert (span.expert, span.begin, span.end, span.at) == (10**14, 1, 3, 0)
