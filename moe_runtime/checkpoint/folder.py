"""The folders of checkpoints on disk: their names, whether one is whole, and which is the newest good one.

    runs/NAME/checkpoints/step_00000200/{manifest.json, *.safetensors, ...}
                          .tmp-step_00000400/    being written, never read
                          .old-step_00000200/    about to be replaced by a checkpoint of the same step

Every rank is assumed to see the same folder (a shared file system, or one machine): rank r checks the
files r, r + world, r + 2 world ... so that hashing a large checkpoint takes 1/world of the time, and
all ranks agree on the verdict. Disks that are local to a node are noticed, since each rank then finds
the others' files missing.
"""

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.checkpoint.formats import NewerFormatError
from moe_runtime.checkpoint.header import header_fault
from moe_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    PICKLE_SUFFIXES,
    FileEntry,
    Manifest,
    read_manifest,
)
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.peers import Peers

CHECKPOINTS_DIR = "checkpoints"
TOKENIZER_FILE = "tokenizer.json"  # the extra file that makes a checkpoint usable without its data
TMP_PREFIX = ".tmp-"
OLD_PREFIX = ".old-"
_STEP_NAME = re.compile(r"step_(\d{8,12})")
MAX_EXTRA_BYTES = 256 << 20  # of an extra file that is read into memory
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest was read; `verify_checkpoint` gives one whose files were checked too."""

    path: Path
    manifest: Manifest

    def extra(self, name: str) -> bytes:
        """The bytes of an extra file, such as `tokenizer.json`.

        Raises:
            CheckpointError: the checkpoint does not carry it, or it is damaged.
        """
        entry = self.manifest.files.get(name)
        if entry is None or entry.kind != "extra":
            raise CheckpointError(f"{self.path}: carries no file {name}")
        if entry.bytes > MAX_EXTRA_BYTES:
            raise CheckpointError(
                f"{self.path}: {name}: expected at most {MAX_EXTRA_BYTES} bytes, got {entry.bytes}"
            )
        fault = file_fault(self.path, name, entry)
        if fault:
            raise CheckpointError(f"{self.path}: {fault}")
        return (self.path / name).read_bytes()


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that cannot be used; `str()` is one line: folder, file, expected, got."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, and which newer ones were passed over.

    Args:
        checkpoint: None if there is no good one.
        skipped: damaged checkpoints, the newest first; the caller says so.
    """

    checkpoint: Checkpoint | None
    skipped: tuple[Damaged, ...] = ()


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a folder name; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def list_steps(checkpoints_dir: Path) -> list[Path]:
    """Folders that look like checkpoints, the newest first; empty if the folder does not exist."""
    if not checkpoints_dir.is_dir():
        return []
    found = [path for path in checkpoints_dir.iterdir() if step_of(path.name) is not None]
    return sorted(found, key=lambda path: step_of(path.name) or 0, reverse=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def file_fault(folder: Path, name: str, entry: FileEntry, with_hash: bool = True) -> str | None:
    """What is wrong with one file of a checkpoint: file, expected, got; None if nothing is."""
    path = folder / name
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name}: expected a regular file, got a link, folder or device"
        if status.st_size != entry.bytes:
            return f"{name}: expected {entry.bytes} bytes, got {status.st_size}"
        got = sha256_of(path) if with_hash else entry.sha256
    except FileNotFoundError:
        return f"{name}: expected {entry.bytes} bytes, got no such file"
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    if got != entry.sha256:
        return f"{name}: expected sha256 {entry.sha256[:12]}, got {got[:12]}"
    return None


def _inspect(folder: Path, rank: int, world_size: int, with_hash: bool) -> Manifest:
    """This rank's share of checking a folder.

    Raises:
        CheckpointError: what is wrong with it.
    """
    if folder.is_symlink():
        raise CheckpointError("expected a folder, got a symbolic link")
    manifest = read_manifest(folder / MANIFEST_NAME)
    named = step_of(folder.name)
    if named is not None and named != manifest.step:
        raise CheckpointError(
            f"{MANIFEST_NAME}: expected step {named} as the folder says, got {manifest.step}"
        )
    for name, entry in sorted(manifest.files.items())[rank::world_size]:
        fault = file_fault(folder, name, entry, with_hash)
        if fault is None and entry.kind != "extra":
            fault = header_fault(folder / name, entry, manifest.step)
        if fault:
            raise CheckpointError(fault)
    return manifest


def verify_checkpoint(folder: Path, peers: Peers | None = None, with_hash: bool = True) -> Checkpoint:
    """Check manifest, sizes and SHA-256 of every file; the same verdict on every rank.

    Args:
        folder: a checkpoint.
        peers: ranks that share the work; None checks alone.
        with_hash: False compares sizes only.

    Raises:
        CheckpointError: something is missing or damaged; says which file, expected and got.
        NewerFormatError: a newer version of this program wrote it.
    """
    peers = peers or Peers()
    manifest, fault, is_newer = None, None, False
    try:
        manifest = _inspect(folder, peers.rank, peers.world_size, with_hash)
    except CheckpointError as error:
        fault, is_newer = str(error).removeprefix(f"{folder}{os.sep}"), isinstance(error, NewerFormatError)
    seen = None if manifest is None else [manifest.step, manifest.total_bytes]
    said = peers.gather_json([fault, is_newer, seen])
    for rank, (text, newer, _) in enumerate(said):
        if text is not None:
            kind = NewerFormatError if newer else CheckpointError
            raise kind(f"{folder}: {text}" + (f" (seen by rank {rank})" if rank else ""))
    if manifest is None or any(other != said[0][-1] for *_, other in said):
        raise CheckpointError(f"{folder}: ranks see different manifests: a shared file system is needed")
    return Checkpoint(folder, manifest)


def find_latest_good(checkpoints_dir: Path, peers: Peers | None = None) -> Found:
    """The newest checkpoint that verifies; the same answer on every rank.

    Args:
        checkpoints_dir: the folder that holds `step_*` folders; may be missing.
        peers: ranks that share the work; None checks alone.

    Raises:
        NewerFormatError: the newest that is not damaged was written by a newer version. It is no damage that
            an older checkpoint could stand in for: the run would go back, and write over what it has done.
    """
    peers = peers or Peers()
    names = peers.first_says([path.name for path in list_steps(checkpoints_dir)])
    skipped: list[Damaged] = []
    for name in names:
        try:
            return Found(verify_checkpoint(checkpoints_dir / name, peers), tuple(skipped))
        except NewerFormatError:
            raise
        except CheckpointError as error:
            skipped.append(Damaged(checkpoints_dir / name, str(error)))
    return Found(None, tuple(skipped))


def open_checkpoint(path: Path | str, peers: Peers | None = None) -> Checkpoint:
    """The checkpoint at `path`: a checkpoint folder, or the last good one of a run folder.

    Args:
        path: folder.
        peers: ranks that share the work of checking it; None checks alone.

    Raises:
        CheckpointError: there is none, or none is whole.
    """
    path = Path(path).expanduser().resolve()
    if (path / MANIFEST_NAME).exists() or step_of(path.name) is not None:
        return verify_checkpoint(path, peers)
    where = checkpoints_dir_of(path)
    found = find_latest_good(where, peers)
    if found.checkpoint is None:
        damaged = "".join(f"; damaged: {line}" for line in found.skipped)
        raise CheckpointError(f"{path}: expected a run or checkpoint folder, got {_instead(path)}{damaged}")
    return found.checkpoint


def _instead(path: Path) -> str:
    """What a folder without a good checkpoint is."""
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return f"a model in Hugging Face's form; `moe-runtime convert import {path} NEW_FOLDER` reads it"
    inside = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    if pickle := next((file.name for file in inside if file.name.endswith(PICKLE_SUFFIXES)), None):
        return f"{pickle}, which can run code when it is loaded and is not read"
    return "no good checkpoint"


def checkpoints_dir_of(path: Path) -> Path:
    """`checkpoints/` of a run folder; a folder that itself holds `step_*` folders is taken as it is."""
    return path if path.name == CHECKPOINTS_DIR or list_steps(path) else path / CHECKPOINTS_DIR
