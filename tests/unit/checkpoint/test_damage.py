"""Whatever is damaged is found, named, and passed over for the checkpoint before it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_runtime.checkpoint.folder import Found, find_latest_good
from moe_runtime.checkpoint.manifest import MAX_MANIFEST_BYTES, parse_manifest, read_manifest
from moe_runtime.errors import CheckpointError
from tests.unit.checkpoint.samples import save

WEIGHTS, OPTIMIZER = "weights-00000.safetensors", "optimizer-00000.safetensors"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints at steps 10 and 20."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_00000020"


def search(run_dir: Path) -> Found:
    return find_latest_good(run_dir / "checkpoints")


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-7])


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 0x10
    (folder / WEIGHTS).write_bytes(data)


def swap(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "aside")
    (folder / OPTIMIZER).rename(folder / WEIGHTS)
    (folder / "aside").rename(folder / OPTIMIZER)


def empty(folder: Path) -> None:
    (folder / OPTIMIZER).write_bytes(b"")


def take_from_other_step(folder: Path) -> None:
    shutil.copy(folder.parent / "step_00000010" / WEIGHTS, folder / WEIGHTS)


def take_manifest_of_other_step(folder: Path) -> None:
    for file in (folder.parent / "step_00000010").iterdir():
        shutil.copy(file, folder / file.name)


def link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere")
    (folder / "manifest.json").symlink_to(folder.parent / "elsewhere")


def pipe_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def link_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated file": (truncate, f"{WEIGHTS}: expected 360 bytes, got 353"),
    "flipped byte": (flip, f"{WEIGHTS}: expected sha256"),
    "missing file": (
        lambda folder: (folder / WEIGHTS).unlink(),
        f"{WEIGHTS}: expected 360 bytes, got no such",
    ),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing"),
    "swapped files": (swap, "safetensors: expected"),
    "empty file": (empty, f"{OPTIMIZER}: expected"),
    "file of another step": (take_from_other_step, f"{WEIGHTS}: expected sha256"),
    "manifest of another step": (take_manifest_of_other_step, "expected step 20 as the folder says, got 10"),
    "link": (link, f"{WEIGHTS}: expected a regular file"),
    "linked manifest": (link_manifest, "got a link"),
    "piped manifest": (pipe_manifest, "got a link, folder or device"),
    "linked folder": (link_folder, "got a symbolic link"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_bytes(b""), "got an empty file"),
    "garbage manifest": (
        lambda folder: (folder / "manifest.json").write_bytes(b"\x80\x04garbage"),
        "damaged",
    ),
    "unsealed manifest": (
        lambda folder: (folder / "manifest.json").write_text("{}"),
        "expected a sealed manifest",
    ),
    "folder in place of a file": (
        lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()],
        f"{WEIGHTS}: expected a regular file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_it_is_found(run_dir: Path, kind: str) -> None:
    damage, said = DAMAGES[kind]
    damage(newest(run_dir))
    found = search(run_dir)
    assert found.checkpoint is not None and found.checkpoint.manifest.step == 10
    (skipped,) = found.skipped
    assert skipped.path == newest(run_dir)
    assert str(newest(run_dir)) in str(skipped) and said in str(skipped) and "\n" not in str(skipped)


def test_nothing_is_found_when_every_checkpoint_is_damaged(run_dir: Path) -> None:
    for folder in (run_dir / "checkpoints").iterdir():
        flip(folder)
    found = search(run_dir)
    assert found.checkpoint is None and len(found.skipped) == 2


def reseal(folder: Path, **changes: object) -> bytes:
    """A manifest with a right seal and wrong contents, as an attacker would make it."""
    manifest = read_manifest(folder / "manifest.json")
    return manifest.model_copy(update=changes).to_bytes()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".hidden", "..", "", "a\\b", "x" * 200])
def test_a_file_name_that_leaves_the_folder_is_refused(run_dir: Path, name: str) -> None:
    manifest = read_manifest(newest(run_dir) / "manifest.json")
    entry = manifest.files[WEIGHTS]
    text = reseal(newest(run_dir), files={**manifest.files, name: entry.model_copy(update={"tensors": {}})})
    with pytest.raises(CheckpointError, match="not a manifest"):
        parse_manifest(text, Path("manifest.json"))


def test_a_tensor_larger_than_its_file_is_refused_before_anything_is_allocated(run_dir: Path) -> None:
    manifest = read_manifest(newest(run_dir) / "manifest.json")
    entry = manifest.files[WEIGHTS]
    huge = entry.tensors["embed.weight"].model_copy(update={"shape": (1 << 40, 4)})
    lying = entry.model_copy(update={"tensors": {**entry.tensors, "embed.weight": huge}})
    with pytest.raises(CheckpointError, match="cannot lie in a file of"):
        parse_manifest(reseal(newest(run_dir), files={**manifest.files, WEIGHTS: lying}), Path("m"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"step": 20', '"step": -1', "step"),
        ('"step": 20', '"step": 20.0', "step"),
        ('"step": 20', '"step": "20"', "step"),
        ('"step": 20', '"step": NaN', "not a manifest"),
        ('"step": 20', '"step": 20, "step": 21', "a key occurs twice"),
        ('"step": 20', '"step": 20, "extra": 1', "extra"),
        ('"format": 2', '"format": 3', "format 3: written by a newer version; this one reads formats 1 to 2"),
        ('"format": 2', '"format": 0', "expected format 1 to 2, got 0"),
        ('"format": 2', '"format": true', "expected format 1 to 2, got True"),
        ('"F32"', '"C64"', "dtype"),
    ],
)
def test_strict_parsing_refuses_what_it_does_not_know(run_dir: Path, old: str, new: str, said: str) -> None:
    import hashlib

    body = (newest(run_dir) / "manifest.json").read_text().split("\n", 1)[1]
    assert old in body
    changed = body.replace(old, new, 1).encode()
    text = b'{"sha256": "' + hashlib.sha256(changed).hexdigest().encode() + b'",\n' + changed
    with pytest.raises(CheckpointError, match=said):
        parse_manifest(text, Path("manifest.json"))


def test_a_manifest_is_json_that_any_tool_reads(run_dir: Path) -> None:
    fields = json.loads((newest(run_dir) / "manifest.json").read_text())
    assert fields["position"]["step"] == 20 and set(fields["files"]) == {WEIGHTS, OPTIMIZER, "tokenizer.json"}


def test_a_huge_manifest_is_refused_unread(run_dir: Path) -> None:
    with (newest(run_dir) / "manifest.json").open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="expected at most"):
        read_manifest(newest(run_dir) / "manifest.json")


def test_deep_nesting_is_refused_without_a_crash(tmp_path: Path) -> None:
    import hashlib

    body = b'"format": 2, "state": ' + b"[" * 100_000 + b"\n"
    text = b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body
    with pytest.raises(CheckpointError, match="not a manifest"):
        parse_manifest(text, tmp_path)
