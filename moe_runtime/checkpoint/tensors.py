"""Torch dtypes by safetensors' words, and one tensor at a time out of many files."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.manifest import TensorEntry
from moe_runtime.errors import CheckpointError

DTYPE_WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """What the manifest says of each tensor.

    Raises:
        CheckpointError: a dtype that checkpoints do not hold.
    """
    described = {}
    for name, tensor in tensors.items():
        word = DTYPE_WORDS.get(tensor.dtype)
        if word is None:
            raise CheckpointError(f"{name}: checkpoints hold no {tensor.dtype}")
        described[name] = TensorEntry.model_validate({"shape": tuple(tensor.shape), "dtype": word})
    return described


def read_file(folder: Path, file: str, wanted: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file, one after the other; the file is mapped, not read whole.

    Args:
        folder: the checkpoint.
        file: a file of it.
        wanted: name -> what the manifest says of it.

    Raises:
        CheckpointError: the file does not hold what the manifest says.
    """
    try:
        with safe_open(folder / file, framework="pt") as opened:
            present = set(opened.keys())
            for name, entry in wanted.items():
                if name not in present:
                    raise CheckpointError(f"{folder / file}: expected tensor {name}, got none of that name")
                view = opened.get_slice(name)
                got = (tuple(view.get_shape()), view.get_dtype())
                if got != (entry.shape, entry.dtype):
                    raise CheckpointError(
                        f"{folder / file}: {name}: expected {entry.dtype} {list(entry.shape)}, "
                        f"got {got[1]} {list(got[0])}"
                    )
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / file}: cannot be read: {error}") from None


def read_tensors(
    checkpoint: Checkpoint, names: Iterable[str], kind: str = "weights"
) -> Iterator[tuple[str, Tensor]]:
    """Parameters by canonical name, file by file, one in memory at a time.

    Args:
        checkpoint: a verified checkpoint.
        names: canonical names as the checkpoint has them: one tensor per expert, such as
            `layers.3.moe.experts.5.gate_up`. The order of the result is that of the files.
        kind: `weights`, or `ema` for their averages.

    Raises:
        CheckpointError: a name is not in the checkpoint, or a file is damaged.
    """
    index = {name: (file, entry) for name, file, entry in checkpoint.manifest.weights(kind)}
    by_file: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    missing = []
    for name in names:
        if name in index:
            file, entry = index[name]
            by_file[file][name] = entry
        else:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path}: expected parameter {missing[0]}{more}, got none of that name"
        )
    for file, wanted in by_file.items():
        yield from read_file(checkpoint.path, file, wanted)
