"""Parameters between the modules of any layout and the files of a checkpoint.

In memory the experts of a layer are one tensor per rank, `layers.3.moe.experts.gate_up` of shape
[local_experts, 2 x ffn, hidden]; which experts it holds depends on the layout. On disk every expert is
a tensor of its own, `layers.3.moe.experts.5.gate_up`, so that a file says nothing about the layout that
wrote it and any other can read it. One file per layer with all experts stacked was rejected: its
writers would have to send each other their slices first.

A parameter that several ranks hold (data-parallel lanes, mirrored rows, the copy of the embedding on
the last stage) is written by the first rank that holds it.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.peers import Peers

# Of a model section where it is left out.
_UNSAID = {"attention": "mla"}
_EXPERT_SLICE = re.compile(r"(.*\bmoe\.experts)\.(gate_up|down)")


def is_expert_slice(name: str) -> bool:
    """True for the stacked weight of a rank's experts."""
    return _EXPERT_SLICE.fullmatch(name) is not None


def name_of_expert(name: str, expert: int) -> str:
    """`layers.3.moe.experts.gate_up`, 5 -> `layers.3.moe.experts.5.gate_up`."""
    match = _EXPERT_SLICE.fullmatch(name)
    assert match is not None, f"{name} is no expert weight"
    return f"{match.group(1)}.{expert}.{match.group(2)}"


def split_experts(state: Mapping[str, Tensor], first_expert: int = 0) -> dict[str, Tensor]:
    """One tensor per expert, by the names that checkpoints use; no copies.

    Args:
        state: parameters and saved buffers of a module, as `state_dict()` names them.
        first_expert: global number of the first expert of every slice.

    Returns:
        Views into the tensors of `state`.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_expert_slice(name):
            for slot, expert in enumerate(tensor.unbind(0)):
                split[name_of_expert(name, first_expert + slot)] = expert
        else:
            split[name] = tensor
    return split


def weights_to_save(state: Mapping[str, Tensor], first_expert: int, peers: Peers) -> dict[str, Tensor]:
    """What this rank writes: of everything it holds, what no earlier rank holds.

    Args:
        state: all parameters and saved buffers of this rank's chunks.
        first_expert: global number of its first local expert.
        peers: all ranks; a collective.

    Returns:
        Canonical name -> tensor.
    """
    held = split_experts(state, first_expert)
    earlier = peers.gather_json(sorted(held))[: peers.rank]
    taken = {name for names in earlier for name in names}
    return {name: tensor for name, tensor in held.items() if name not in taken}


def load_weights(
    module: nn.Module | Mapping[str, Tensor],
    checkpoint: Checkpoint,
    first_expert: int = 0,
    kind: str = "weights",
) -> None:
    """Fill a module, whole or any slice of the model, from a checkpoint.

    Values are cast to the dtype and device of the module; equal dtypes are copied bit for bit.

    Args:
        module: a module with canonical names, or its `state_dict()`.
        checkpoint: a verified checkpoint.
        first_expert: global number of the module's first local expert.
        kind: `weights`, or `ema` for their averages over steps.

    Raises:
        CheckpointError: a parameter is missing there or has another shape; nothing has been changed then.
    """
    state = module.state_dict() if isinstance(module, nn.Module) else module
    targets = split_experts(state, first_expert)
    _check_shapes(targets, checkpoint, kind)
    with torch.no_grad():
        for name, tensor in read_tensors(checkpoint, targets, kind):
            targets[name].copy_(tensor)


def _check_shapes(targets: Mapping[str, Tensor], checkpoint: Checkpoint, kind: str) -> None:
    saved = {name: entry.shape for name, _, entry in checkpoint.manifest.weights(kind)}
    if kind == "ema" and not saved:
        raise CheckpointError(
            f"{checkpoint.path}: expected averaged weights, got none; train with train.ema_decay set"
        )
    for name, tensor in targets.items():
        if name in saved and saved[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.path}: {name}: expected shape {list(tensor.shape)}, got {list(saved[name])}"
            )
    _check_present(targets, saved, checkpoint)


def _check_present(targets: Iterable[str], saved: Mapping[str, object], checkpoint: Checkpoint) -> None:
    missing = [name for name in targets if name not in saved]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path}: expected parameter {missing[0]}{more}, got none of that name"
        )


def check_same_model(
    checkpoint: Checkpoint,
    model: ModelConfig,
    free: Collection[str] = (),
    remedy: str = "use another run name, or --fresh to start over",
) -> None:
    """Refuse a checkpoint of another model.

    Args:
        checkpoint: a verified checkpoint.
        model: what it should be of.
        free: keys that may differ.
        remedy: what the user can do.

    Raises:
        CheckpointError: names every key of the model section that differs, with both values.
    """
    expected = _UNSAID | model.model_dump(mode="json")
    got = checkpoint.manifest.config.get("model")
    if not isinstance(got, dict):
        raise CheckpointError(f"{checkpoint.path}: expected a model section in its config, got none")
    got = _UNSAID | got
    keys = [key for key in (*expected, *(key for key in got if key not in expected)) if key not in free]
    differing = [
        f"model.{key}: expected {expected.get(key)}, got {got.get(key)}"
        for key in keys
        if expected.get(key) != got.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: a checkpoint of another model: {'; '.join(differing)}; {remedy}"
        )
