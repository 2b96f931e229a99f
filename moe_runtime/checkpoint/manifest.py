"""What a checkpoint holds, as one JSON file that proves its own wholeness.

The manifest is written last and read first, and nothing else in the folder is believed without it: it
names every file with its size and SHA-256, every tensor with its shape and dtype, and the run that
made them. Its own first line is the SHA-256 of all the bytes that follow, so a byte flipped in it is
found like one flipped in a tensor:

    {"sha256": "9f0c...",
     "format": 2, "position": {"step": 200, ...}, ...}

A manifest may come from anywhere, so it is parsed as a stranger's: size bounded before it is read, no
key twice, no key unknown, no file name that could leave the folder, no tensor larger than the file
that is said to hold it. A pickle would be shorter to write and would run whatever it likes.
"""

import hashlib
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from moe_runtime.checkpoint.formats import FORMAT, to_newest
from moe_runtime.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
TENSOR_SUFFIX = ".safetensors"
# Files that are read by running what they say. Nothing here reads them, and no manifest may list one.
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".distcp")
_PREFIX = b'{"sha256": "'
_SEAL = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')

# Bytes an element takes, by safetensors' own dtype words; other dtypes are never written.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

Count = Annotated[int, Field(ge=0, lt=2**60)]  # what arithmetic on it cannot take out of 64 bits
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
TensorName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$", max_length=256)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
DtypeWord = Literal[
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"
]
Shape = Annotated[tuple[Count, ...], Field(max_length=8)]
Kind = Literal["weights", "ema", "optimizer", "extra"]


def optimizer_file(rank: int) -> str:
    """The file of a rank's partitions."""
    return f"optimizer-{rank:05d}{TENSOR_SUFFIX}"


class Entry(BaseModel):
    """A frozen part of a manifest; every key is known and every type exact."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TensorEntry(Entry):
    """One tensor of a file."""

    shape: Shape
    dtype: DtypeWord

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class FileEntry(Entry):
    """One file of the folder.

    `weights` files hold canonical parameters, each in one file only, and `ema` files their averages over
    steps, likewise; `optimizer` files hold the partitions of one rank; `extra` files are bytes that the
    checkpoint only carries.
    """

    kind: Kind
    bytes: Count
    sha256: Digest
    tensors: dict[TensorName, TensorEntry] = {}

    @model_validator(mode="after")
    def _tensors_fit(self) -> Self:
        claimed = sum(tensor.num_bytes for tensor in self.tensors.values())
        if claimed > self.bytes:
            raise ValueError(f"tensors of {claimed} bytes cannot lie in a file of {self.bytes} bytes")
        return self


class Slot(Entry):
    """Where a parameter lies in a flat group.

    Args:
        param: canonical name; an expert weight is the local slice that begins at `first_expert`.
        shape: local shape.
        offset: index of its first element in the whole flat group.
        first_expert: global number of the slice's first expert; None for other parameters.
    """

    param: TensorName
    shape: Shape
    offset: Count
    first_expert: Count | None = None

    @model_validator(mode="after")
    def _experts_are_stacked(self) -> Self:
        if self.first_expert is not None and not self.shape:
            raise ValueError(f"{self.param}: a stack of experts has an axis")
        return self


class PartitionEntry(Entry):
    """The share of one flat optimizer group that one rank owns.

    Args:
        rank: global rank.
        group: name of the parameter group.
        start, end: half-open element range of the whole flat group, padding included.
        layout: index into `Manifest.layouts`.
        file: file that holds its tensors, named `{group}.master` and `{group}.{key}`.
        keys: the keys, `master` among them.
        scalars: numbers that belong to the partition, such as the optimizer's own step.
    """

    rank: Count
    group: TensorName
    start: Count
    end: Count
    layout: Count
    file: FileName
    keys: tuple[TensorName, ...]
    scalars: dict[str, int | float | bool] = {}


class Position(Entry):
    """How far a run has come, whatever the layout.

    Args:
        step: optimizer steps done.
        tokens: tokens trained on.
        sequences: sequences trained on, those of skipped ranges not among them.
        skipped: ranges of sequences that training passes over: (first, how many), ascending.
    """

    step: Count
    tokens: Count
    sequences: Count = 0
    skipped: tuple[tuple[Count, Count], ...] = ()


class Manifest(Entry):
    """All that a checkpoint says about itself.

    Args:
        position: steps, tokens and sequences done.
        schedules: what the next step runs with, by name (lr, bias_gamma, mtp_lambda); for people, since
            they follow from config and position.
        rng: the seed, and what each use of randomness is counted by; no generator has a state.
        config: the whole resolved run configuration.
        layout: pp, dp, ep, world_size and schedule of the run that saved.
        state: counters and other JSON that the loop wants back.
        layouts: parameter layouts of flat optimizer groups, each stored once.
    """

    format: Literal[2] = FORMAT
    position: Position
    schedules: dict[str, float] = {}
    rng: dict[str, int | str] = {}
    config: dict[str, Any]
    layout: dict[str, int | str]
    state: dict[str, Any] = {}
    files: dict[FileName, FileEntry]
    layouts: tuple[tuple[Slot, ...], ...] = ()
    partitions: tuple[PartitionEntry, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if MANIFEST_NAME in self.files:
            raise ValueError(f"{MANIFEST_NAME} cannot list itself")
        for name, entry in self.files.items():
            if entry.kind != "extra" and not name.endswith(TENSOR_SUFFIX):
                raise ValueError(f"{name}: expected a {TENSOR_SUFFIX} file of {entry.kind}")
            if name.lower().endswith(PICKLE_SUFFIXES):
                raise ValueError(f"{name}: such files can run code when they are loaded, and are refused")
        for kind in ("weights", "ema"):
            seen: set[str] = set()
            for name, _, _ in self.weights(kind):
                if name in seen:
                    raise ValueError(f"{name} lies in two files")
                seen.add(name)
        for part in self.partitions:
            if part.layout >= len(self.layouts) or part.start > part.end or not self._holds(part):
                raise ValueError(f"the partition of rank {part.rank}, group {part.group} is inconsistent")
        self._check_tiling()
        return self

    def _holds(self, part: PartitionEntry) -> bool:
        """Whether a partition lies in the file of its rank, with as many masters as it has elements."""
        file = self.files.get(part.file)
        if file is None or part.file != optimizer_file(part.rank):
            return False
        if not all(f"{part.group}.{key}" in file.tensors for key in part.keys):
            return False
        master = file.tensors.get(f"{part.group}.master")
        return master is None or math.prod(master.shape) == part.end - part.start

    def _check_tiling(self) -> None:
        """The partitions of one flat group lie side by side from its first element to one end.

        A group of what first and last stage both hold is there once for each of them.
        """
        groups: dict[tuple[str, int], list[PartitionEntry]] = {}
        for part in self.partitions:
            groups.setdefault((part.group, part.layout), []).append(part)
        for (group, _), parts in groups.items():
            starts, ends = Counter(part.start for part in parts), Counter(part.end for part in parts)
            loose = (starts - ends).keys() - {0}
            if loose or len(ends - starts) > 1:
                found = ", ".join(f"{part.start}..{part.end} of rank {part.rank}" for part in parts)
                raise ValueError(f"group {group}: expected partitions side by side from 0 on, got {found}")

    def weights(self, kind: str = "weights") -> Iterator[tuple[str, str, TensorEntry]]:
        """(canonical name, file, entry) of every parameter and saved buffer, or (`ema`) of its average."""
        for file, entry in self.files.items():
            if entry.kind == kind:
                for name, tensor in entry.tensors.items():
                    yield name, file, tensor

    @property
    def step(self) -> int:
        return self.position.step

    @property
    def tokens(self) -> int:
        return self.position.tokens

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """The sealed file."""
        body = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False).encode()
        body = body.removeprefix(b"{\n") + b"\n"
        return _PREFIX + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body


def parse_manifest(text: bytes, where: Path) -> Manifest:
    """Read a sealed manifest.

    Args:
        text: the file's bytes.
        where: its path, for messages.

    Raises:
        CheckpointError: it is damaged, of a format that this version does not read, or says what cannot be.
    """
    seal = _SEAL.match(text)
    if seal is None:
        raise CheckpointError(f"{where}: damaged: expected a sealed manifest, got {_glimpse(text)}")
    got = hashlib.sha256(text[seal.end() :]).hexdigest()
    if got != seal.group(1).decode():
        raise CheckpointError(
            f"{where}: damaged: expected sha256 {seal.group(1).decode()[:12]}, got {got[:12]}"
        )
    try:
        fields = json.loads(text, object_pairs_hook=no_key_twice)
        fields.pop("sha256")
        return Manifest.model_validate_json(json.dumps(to_newest(fields, where), allow_nan=False))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where}: not a manifest: {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a manifest: {error}") from None


def read_manifest(path: Path) -> Manifest:
    """Read and parse a manifest file.

    Raises:
        CheckpointError: missing, not a regular file, too large, or damaged.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise CheckpointError(f"{path}: expected a regular file, got a link, folder or device")
        if status.st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got {status.st_size}"
            )
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_manifest(text, path)


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook of `json.loads` for an object.

    Raises:
        ValueError: a key occurs twice: readers would differ in which one they take.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _glimpse(text: bytes) -> str:
    return f"{len(text)} bytes beginning {text[:16]!r}" if text else "an empty file"
