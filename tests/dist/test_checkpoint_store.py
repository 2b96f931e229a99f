"""Checkpoints of several ranks: written together, refused together, read by any other layout."""

from pathlib import Path
from typing import Any

import torch

from moe_runtime.checkpoint.folder import find_latest_good, open_checkpoint
from moe_runtime.checkpoint.manifest import Slot
from moe_runtime.checkpoint.optimizer import PartitionState
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveMeta
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.checkpoint.weights import weights_to_save
from moe_runtime.parallel.peers import Peers
from tests.ranks import run_ranks

META = SaveMeta(tokens=1, config={"model": {}}, layout={"dp": 2, "ep": 2})
SHARED = torch.arange(12.0).view(3, 4)
EXPERTS = torch.arange(48.0).view(4, 4, 3)


def _peers(rank: int, world_size: int) -> Peers:
    return Peers(rank, world_size, None)


def _state(rank: int) -> dict[str, torch.Tensor]:
    """Everyone holds the norm; two experts a rank."""
    return {
        "norm.weight": SHARED,
        "layers.1.moe.experts.down": EXPERTS[2 * rank : 2 * rank + 2],
    }


def _partition(rank: int) -> PartitionState:
    layout = (Slot(param="norm.weight", shape=(3, 4), offset=0),)
    start, end = min(6 * rank, 12), min(6 * rank + 6, 12)
    master = SHARED.flatten()[start:end].clone()
    tensors = {"master": master, "m": master.to(torch.bfloat16)}
    return PartitionState("dense", start, end, layout, tensors, {"step": 3})


def _contribution(rank: int, peers: Peers) -> Contribution:
    extras = {"tokenizer.json": b"{}"} if rank == 0 else {}
    return Contribution(weights_to_save(_state(rank), 2 * rank, peers), [_partition(rank)], extras)


def _save(rank: int, world_size: int, folder: str) -> str:
    peers = _peers(rank, world_size)
    outcome = CheckpointStore(folder, peers, 2).save(5, _contribution(rank, peers), META)
    return type(outcome).__name__


def test_two_ranks_write_each_weight_once_and_one_process_reads_it_whole(tmp_path: Path) -> None:
    assert run_ranks(_save, 2, str(tmp_path)) == ["Saved", "Saved"]
    checkpoint = open_checkpoint(tmp_path)
    names = {name: file for name, file, _ in checkpoint.manifest.weights()}
    assert names["norm.weight"] == "weights-00000.safetensors"
    assert names["layers.1.moe.experts.3.down"] == "weights-00001.safetensors"
    read = dict(read_tensors(checkpoint, names))
    assert torch.equal(read["norm.weight"], SHARED)
    for expert in range(4):
        assert torch.equal(read[f"layers.1.moe.experts.{expert}.down"], EXPERTS[expert])
    assert len(checkpoint.manifest.layouts) == 1, "equal layouts are stored once"


def _save_where_one_rank_fails(rank: int, world_size: int, folder: str) -> Any:
    peers = _peers(rank, world_size)
    store = CheckpointStore(folder, peers, 2)
    first = store.save(5, _contribution(rank, peers), META)
    own = _contribution(rank, peers)
    if rank == 1:
        own = Contribution({"norm.weight": torch.zeros(2, dtype=torch.complex64)}, own.partitions)
    second = store.save(6, own, META)
    names = sorted(path.name for path in store.dir.iterdir())
    third = store.save(7, _contribution(rank, peers), META)
    return [isinstance(first, Saved), getattr(second, "message", None), names, isinstance(third, Saved)]


def test_a_failure_on_one_rank_is_the_same_failure_on_all_and_saving_goes_on(tmp_path: Path) -> None:
    results = run_ranks(_save_where_one_rank_fails, 2, str(tmp_path))
    assert results[0] == results[1]
    first, message, names, third = results[0]
    assert first and third and names == ["step_00000005"]
    assert "rank 1" in message and "complex64" in message


def _search_after_damage(rank: int, world_size: int, folder: str) -> Any:
    peers = _peers(rank, world_size)
    store = CheckpointStore(folder, peers, 3)
    for step in (5, 6):
        store.save(step, _contribution(rank, peers), META)
    damaged = store.dir / "step_00000006" / "weights-00001.safetensors"
    if rank == 0:
        damaged.write_bytes(damaged.read_bytes()[:-1])
    peers.barrier()
    found = store.latest_good()
    assert found.checkpoint is not None
    return [found.checkpoint.manifest.step, [str(line) for line in found.skipped]]


def test_all_ranks_pass_over_the_same_damaged_checkpoint(tmp_path: Path) -> None:
    results = run_ranks(_search_after_damage, 3, str(tmp_path))
    assert results[0] == results[1] == results[2]
    step, (said,) = results[0]
    assert step == 5 and "weights-00001.safetensors: expected" in said


def _search_on_own_disk(rank: int, world_size: int, folder: str) -> Any:
    peers = _peers(rank, world_size)
    CheckpointStore(folder, peers, 3).save(5, _contribution(rank, peers), META)
    own = Path(folder) if rank == 0 else Path(folder) / "another disk"
    return [str(line) for line in find_latest_good(own / "checkpoints", peers).skipped]


def test_a_disk_that_only_some_ranks_see_is_noticed_and_does_not_hang(tmp_path: Path) -> None:
    results = run_ranks(_search_on_own_disk, 2, str(tmp_path))
    assert len(results[0]) == 1 and "seen by rank 1" in results[0][0]
