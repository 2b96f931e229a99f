"""A run that trains, saves and loads in any layout: what a rank of the resharding tests runs.

The state is read from the live optimizer by its own pieces, not by the code that reads checkpoints, so
that it can judge that code.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.build import build_optimizer
from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.store import CheckpointStore, Saved
from moe_runtime.checkpoint.weights import name_of_expert, split_experts, weights_to_save
from moe_runtime.config.derive import tokens_before
from moe_runtime.data.vocabulary import ByteTokenizer
from moe_runtime.optim.schedule import lr_at
from moe_runtime.parallel.expert_load import move_biases
from moe_runtime.parallel.peers import Peers
from moe_runtime.train.guard.state import GuardState
from moe_runtime.train.saving import TrainingState, capture, describe, load_state, with_ema
from tests.dist.layout_case import Case, _sum_tied, batch, build, run_lane

# (kind, canonical name) -> values: `weight` as it is stored, `master`, `exp_avg`, `exp_avg_sq` in FP32.
Live = dict[tuple[str, str], np.ndarray]


def open_state(case: Case, rank: int, ema_decay: float | None = None) -> TrainingState:
    """One rank before its first step."""
    runtime = build(case, rank)
    optimizer = build_optimizer(runtime)
    peers = Peers(rank, dist.get_world_size(), runtime.groups.control)
    return with_ema(TrainingState(runtime, optimizer, peers, ByteTokenizer(), GuardState(8)), ema_decay)


def advance(state: TrainingState, first: int, steps: int) -> list[float]:
    """Train steps `first` ...; gives the mean loss over the global batch of each, alike on every rank."""
    runtime, losses = state.runtime, []
    for step in range(first, first + steps):
        tokens = batch(runtime.config, step)
        recipe, peak = runtime.config.recipe, runtime.config.optim.peak_lr
        state.optimizer.zero_grad()
        scalars = run_lane(runtime, tokens, state.optimizer.end_microbatch)
        _sum_tied(runtime)
        total = runtime.load.take_total(runtime.groups.data)
        if state.ema is not None:
            state.ema.join()
        assert not state.optimizer.step(lr_at(recipe, peak, step, step * tokens.numel())).skipped
        move_biases(runtime.chunks, runtime.load, total, recipe.bias_gamma)
        if state.ema is not None:
            state.ema.start()
        said = state.peers.gather_json(scalars.totals.get("loss", 0.0))
        losses.append(sum(said) / tokens.shape[0])
    return losses


def save(state: TrainingState, folder: str, step: int) -> None:
    """Write a checkpoint of `step` into a run folder."""
    store = CheckpointStore(folder, state.peers, 3)
    config, layout = state.runtime.config, state.runtime.layout
    owned = weights_to_save(state.weights(), state.first_expert, state.peers)
    meta = describe(state, step, tokens_before(config, layout, step))
    assert isinstance(store.save(step, capture(state, owned), meta), Saved)


def load(state: TrainingState, folder: str) -> int:
    """Take the newest checkpoint of a run folder."""
    return load_state(state, open_checkpoint(Path(folder), state.peers))


def live(state: TrainingState) -> Live:
    """What this rank holds: of flat tensors its own elements, NaN elsewhere."""
    found: Live = {
        ("weight", name): as_array(tensor)
        for name, tensor in split_experts(state.weights(), state.first_expert).items()
    }
    for partition in state.optimizer.partitions():
        moments = state.optimizer.client.logical_state(partition.master)
        kinds = {"master": partition.master.detach(), **moments}
        shapes = {entry.name: entry.shape for entry in partition.layout}
        first = state.first_expert if partition.is_expert else None
        for piece in partition.pieces():
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                flat = np.full(int(np.prod(shapes[piece.name])), np.nan, dtype=np.float32)
                values = kinds[kind].narrow(0, piece.local, piece.numel).numpy()
                flat[piece.begin : piece.end] = values
                found |= _named(kind, piece.name, flat.reshape(shapes[piece.name]), first)
    return found


def _named(kind: str, name: str, values: np.ndarray, first_expert: int | None) -> Live:
    if first_expert is None:
        return {(kind, name): values}
    return {(kind, name_of_expert(name, first_expert + i)): expert for i, expert in enumerate(values)}


def join(parts: list[Live]) -> Live:
    """The whole state out of what the ranks hold; copies must be the same bits."""
    whole: Live = {}
    for part in parts:
        for key, values in part.items():
            if key not in whole:
                whole[key] = values.copy()
            elif key[0] == "weight":
                assert whole[key].tobytes() == values.tobytes(), f"copies of {key[1]} differ"
            else:
                missing = np.isnan(whole[key])
                whole[key][missing] = values[missing]
    assert not any(np.isnan(values).any() for key, values in whole.items() if key[0] != "weight")
    return whole


def as_array(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor; BF16 as int16, for NumPy does not know it."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def digests(state: Live) -> dict[str, str]:
    """`kind name` -> the beginning of the SHA-256 of the values."""
    return {
        f"{kind} {name}": hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
        for (kind, name), values in sorted(state.items())
    }


def with_layout(case: Case, layout: dict, microbatches: int, **changes: object) -> Case:
    """The same run in another layout."""
    return replace(case, layout=layout, microbatches=microbatches, **changes)
