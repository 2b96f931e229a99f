"""Ways to damage a checkpoint of two ranks: by accident, by a hand that mends the seal, by malice.

Each takes the folder, a folder of the step before and a random generator, and gives the names of which one
must be in the message.
"""

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

Damage = Callable[[Path, Path, Random], tuple[str, ...]]
MANIFEST = "manifest.json"
KINDS = ("weights", "optimizer", "ema")


def shards(kind: str) -> tuple[str, str]:
    """The files of both ranks."""
    return f"{kind}-00000.safetensors", f"{kind}-00001.safetensors"


def any_shard(chance: Random) -> str:
    return chance.choice(shards(chance.choice(KINDS)))


def any_file(folder: Path, chance: Random) -> str:
    return chance.choice(sorted(path.name for path in folder.iterdir()))


def reseal(folder: Path, fields: dict) -> None:
    """Write a manifest with a right seal over whatever it says."""
    body = json.dumps(fields, indent=1).encode().removeprefix(b"{\n") + b"\n"
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / MANIFEST).write_bytes(b'{"sha256": "' + digest + b'",\n' + body)


def fields_of(folder: Path) -> dict:
    fields: dict = json.loads((folder / MANIFEST).read_bytes())
    del fields["sha256"]
    return fields


def own_up(folder: Path, name: str) -> None:
    """Let the manifest say the size and hash that a file now has."""
    fields, data = fields_of(folder), (folder / name).read_bytes()
    fields["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(folder, fields)


def flip(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    name = any_file(folder, chance)
    data = bytearray((folder / name).read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    (folder / name).write_bytes(data)
    return (name,)


def cut(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    name = any_file(folder, chance)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: chance.randrange(len(data))])
    return (name,)


def insert(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    name = any_file(folder, chance)
    data = bytearray((folder / name).read_bytes())
    data.insert(chance.randrange(len(data)), chance.randrange(256))
    (folder / name).write_bytes(data)
    return (name,)


def delete(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    name = any_file(folder, chance)
    (folder / name).unlink()
    return (name,)


def empty(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    name = any_file(folder, chance)
    (folder / name).write_bytes(b"")
    return (name,)


def link(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    name = any_file(folder, chance)
    (folder / name).rename(folder.parent / f"aside-{name}")
    (folder / name).symlink_to(folder.parent / f"aside-{name}")
    return (name,)


def swap(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """The shards of two ranks change places."""
    one, other = shards(chance.choice(KINDS))
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)
    return one, other


def swap_and_mend(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """The same, and the manifest is made to fit."""
    one, other = shards("optimizer")
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)
    own_up(folder, one)
    own_up(folder, other)
    return one, other


def stale(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """A shard of the step before, under its own name."""
    name = any_shard(chance)
    shutil.copy(before / name, folder / name)
    return (name,)


def stale_and_mend(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    name = stale(folder, before, chance)[0]
    own_up(folder, name)
    return (name,)


def stale_folder(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """The whole checkpoint of the step before, under the name of this one."""
    for file in before.iterdir():
        shutil.copy(file, folder / file.name)
    return (MANIFEST,)


def edit_and_mend(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """The manifest says something else than the files, under a right seal."""
    fields = fields_of(folder)
    name = any_shard(chance)
    entry = fields["files"][name]
    tensor = chance.choice(sorted(entry["tensors"]))
    edits: dict[str, Callable[[], object]] = {
        "hash": lambda: entry.update(sha256="0" * 64),
        "size": lambda: entry.update(bytes=entry["bytes"] + chance.choice((-1, 1, 8))),
        "shape": lambda: entry["tensors"][tensor].update(shape=entry["tensors"][tensor]["shape"][::-1] + [1]),
        "wider": lambda: entry["tensors"][tensor].update(dtype="F64"),
        "other type": lambda: entry["tensors"][tensor].update(dtype="I32"),
        "fewer": lambda: entry["tensors"].pop(tensor),
        "renamed": lambda: entry["tensors"].update(renamed=entry["tensors"].pop(tensor)),
        "moved": lambda: fields["files"].update({f"../{name}": fields["files"].pop(name)}),
        "pickle": lambda: fields["files"].update({"model.pt": fields["files"].pop(name)}),
        "range": lambda: fields["partitions"][1].update(start=11, end=23),
        "shorter": lambda: fields["partitions"][1].update(end=23),
        "other rank's": lambda: _exchange(fields["partitions"], "file"),
        "no layout": lambda: fields["partitions"][0].update(layout=7),
        "no such key": lambda: fields["partitions"][0]["keys"].append("exp_avg_sq"),
        "step": lambda: fields.update(step=fields["step"] + 1),
        "format": lambda: fields.update(format=chance.choice((0, -1, "2", None))),
        "unknown": lambda: fields.update(hook="os.system"),
    }
    edits[chance.choice(sorted(edits))]()
    reseal(folder, fields)
    return MANIFEST, name


def _exchange(parts: list[dict], key: str) -> None:
    parts[0][key], parts[1][key] = parts[1][key], parts[0][key]


def header_and_mend(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """The header of a shard lies, and the manifest is made to fit."""
    name = any_shard(chance)
    data = (folder / name).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size].decode(), data[8 + size :]
    fields = json.loads(header)
    tensor = next(key for key in fields if key != "__metadata__")
    start, end = fields[tensor]["data_offsets"]
    lies = {
        "key twice": header.rstrip()[:-1] + f',"{tensor}":{json.dumps(fields[tensor])}}}',
        "overlap": header.replace(f"[{start},{end}]", f"[{start + 4},{end + 4}]", 1),
        "backwards": header.replace(f"[{start},{end}]", f"[{end},{start}]", 1),
        "outside": header.replace(f"[{start},{end}]", f"[{start},{end + (1 << 40)}]", 1),
        "no JSON": "\x80" + header,
        "deep": "[" * 3000,
        "long": header + " " * 200_000,
        "list": "[]",
    }
    text = lies[chance.choice(sorted(lies))].encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + rest)
    own_up(folder, name)
    return (name,)


def huge_header(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """A header that would be the largest number of bytes there is."""
    name = any_shard(chance)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(b"\xff" * 8 + data[8:])
    own_up(folder, name)
    return (name,)


def gadget_in_place(folder: Path, before: Path, chance: Random) -> tuple[str, ...]:
    """A pickle that runs code lies where a shard was; half of the time the manifest fits it."""
    name = any_shard(chance)
    (folder / name).write_bytes(chance.choice(list(gadgets(folder.parent / "canary").values())))
    if chance.random() < 0.5:
        fields = fields_of(folder)
        fields["files"][name]["tensors"] = {}
        fields["partitions"] = []
        reseal(folder, fields)
        own_up(folder, name)
    return (name,)


DAMAGES: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        flip, cut, insert, delete, empty, link, swap, swap_and_mend, stale, stale_and_mend, stale_folder,
        edit_and_mend, header_and_mend, huge_header, gadget_in_place,
    )
}  # fmt: skip


class _Runs:
    """Unpickles to the result of a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def gadgets(canary: Path) -> dict[str, bytes]:
    """Ten pickles that make a file when they are loaded, in the forms in which weights are found."""
    import os

    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w').close()"
    shell = pickle.dumps(_Runs(os.system, touch))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", shell)
        file.writestr("archive/version", "3\n")
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    array = header + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n" + shell
    return {
        "os.system": shell,
        "os.mkdir": pickle.dumps(_Runs(os.mkdir, str(canary)), protocol=4),
        "subprocess": pickle.dumps(_Runs(subprocess.call, ["touch", str(canary)])),
        "exec": pickle.dumps(_Runs(exec, write)),
        "eval": pickle.dumps(_Runs(eval, write), protocol=2),
        "open": pickle.dumps(_Runs(open, str(canary), "w")),
        "text form": f"cposix\nsystem\n(S'{touch}'\ntR.".encode(),
        "nested": pickle.dumps({"state_dict": [{"weight": _Runs(os.system, touch)}]}, protocol=5),
        "zip of torch": archive.getvalue(),
        "array of numpy": array,
    }
