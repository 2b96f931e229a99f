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

FILE_KEY, STEP_KEY = "file", "step"
# Of JSON around the tensors, and for each tensor: a name of 256 bytes, 8 sizes, 2 offsets, words between.
_BASE_BYTES, _TENSOR_BYTES = 4096, 1024


def about_file(name: str, step: int) -> dict[str, str]:
    """What a file of a checkpoint says of itself."""
    return {FILE_KEY: name, STEP_KEY: str(step)}


def header_fault(path: Path, entry: FileEntry, step: int) -> str | None:
    """What is wrong with the header of one file: file, expected, got; None if nothing is.

    Args:
        path: of a file of which size and hash are right.
        entry: what the manifest says of it.
        step: the manifest's.
    """
    name = path.name
    data_bytes = sum(tensor.num_bytes for tensor in entry.tensors.values())
    expected = entry.bytes - 8 - data_bytes
    try:
        with path.open("rb") as file:
            said = int.from_bytes(file.read(8), "little")
            if said != expected:
                return f"{name}: expected a safetensors header of {expected} bytes, got {said}"
            if said > _BASE_BYTES + _TENSOR_BYTES * len(entry.tensors):
                return f"{name}: a header of {said} bytes for {len(entry.tensors)} tensors"
            fields = json.loads(file.read(said), object_pairs_hook=no_key_twice)
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return f"{name}: not a safetensors header: {error}"
    if not isinstance(fields, dict):
        return f"{name}: expected a safetensors header, got a {type(fields).__name__}"
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
