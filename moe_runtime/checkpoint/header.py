"""Whether the header of a safetensors file says what the manifest says of the file.

The manifest's SHA-256 proves that a file is the one its writer meant. It proves nothing against whoever
writes the manifest too, by hand or by malice: then the header is a stranger's. It is read here before any
library maps the file, with its length bounded by what the manifest's tensors need, no key twice, and every
tensor where, of what type and as large as it must be, without a gap and without an overlap. So a pickle, an
archive or a text in the place of a shard is refused unread.

Files that this version writes also say their own name and step: one that lies in another's place, under a
manifest that was made to fit, is still known.
"""

import json
from pathlib import Path
from typing import Any

from moe_runtime.checkpoint.manifest import FileEntry, no_key_twice
from moe_runtime.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
FILE_KEY, STEP_KEY = "file", "step"
# Of JSON around the tensors, and for each tensor: a name of 256 bytes, 8 sizes, 2 offsets, words between.
_BASE_BYTES, _TENSOR_BYTES = 4096, 1024


def about_file(name: str, step: int) -> dict[str, str]:
    """What a file of a checkpoint says of itself."""
    return {FILE_KEY: name, STEP_KEY: str(step)}


def read_header(path: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The header of a safetensors file: `__metadata__` and the tensors by name.

    The library takes the last of two entries of one name, other readers the first.

    Args:
        path: of the file.
        limit: bytes that the header may have; nothing longer is read.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is too long, no JSON object, or has a key twice; begins with the file's name.
    """
    with path.open("rb") as file:
        said = int.from_bytes(file.read(8), "little")
        if said > limit:
            raise CheckpointError(
                f"{path.name}: expected a safetensors header of at most {limit} bytes, got {said}"
            )
        text = file.read(said)
    try:
        fields = json.loads(text, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not a safetensors header: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path.name}: expected a safetensors header, got a {type(fields).__name__}")
    return fields


def header_fault(path: Path, entry: FileEntry, step: int) -> str | None:
    """What is wrong with the header of one file: file, expected, got; None if nothing is.

    Args:
        path: of a file of which size and hash are right.
        entry: what the manifest says of it.
        step: the manifest's.
    """
    name = path.name
    data_bytes = sum(tensor.num_bytes for tensor in entry.tensors.values())
    header_bytes = entry.bytes - 8 - data_bytes  # the data fills the rest, to the last byte
    limit = min(header_bytes, _BASE_BYTES + _TENSOR_BYTES * len(entry.tensors))
    try:
        with path.open("rb") as file:
            said = int.from_bytes(file.read(8), "little")
        if said != header_bytes:
            return f"{name}: expected a safetensors header of {header_bytes} bytes, got {said}"
        fields = read_header(path, limit)
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    about = fields.pop("__metadata__", {})
    return _place_fault(name, about, step) or _tensors_fault(name, fields, entry)


def _place_fault(name: str, about: Any, step: int) -> str | None:
    """Whether the file says that it is another's or of another step."""
    if not isinstance(about, dict):
        return f"{name}: __metadata__: expected an object, got a {type(about).__name__}"
    for key, expected in about_file(name, step).items():
        if about.get(key, expected) != expected:
            return f"{name}: expected {key} {expected}, got {about[key]!r:.80}: it was moved here"
    return None


def _tensors_fault(name: str, fields: dict[str, Any], entry: FileEntry) -> str | None:
    """Whether the tensors are other than the manifest's, or do not fill the file exactly."""
    if fields.keys() != entry.tensors.keys():
        odd = min(fields.keys() ^ entry.tensors.keys())
        where = "the manifest alone" if odd in entry.tensors else "the file alone"
        return f"{name}: tensor {odd:.80} is in {where}"
    spans = []
    for tensor, wanted in entry.tensors.items():
        got = fields[tensor]
        offsets = got.get("data_offsets") if isinstance(got, dict) else None
        if not isinstance(offsets, list) or [type(value) for value in offsets] != [int, int]:
            return f"{name}: {tensor}: no tensor of a safetensors file"
        if (got.get("dtype"), got.get("shape")) != (wanted.dtype, list(wanted.shape)):
            found = f"{got.get('dtype')} {got.get('shape')}"
            return f"{name}: {tensor}: expected {wanted.dtype} {list(wanted.shape)}, got {found:.80}"
        if offsets[1] - offsets[0] != wanted.num_bytes:
            return f"{name}: {tensor}: expected {wanted.num_bytes} bytes, got {offsets[1] - offsets[0]}"
        spans.append((offsets[0], offsets[1]))
    place = 0
    for start, end in sorted(spans):
        if start != place:
            return f"{name}: expected a tensor at byte {place} of the data, got one at {start}"
        place = end
    return None
