"""`moe-runtime checkpoint`: list, verify, show, compare and prune what a run has saved."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from moe_runtime.checkpoint.manifest import Manifest

# torch takes seconds to import and `--help` should not: the room is imported by each command.

app = typer.Typer(no_args_is_help=True, help="List, verify, show, compare and prune checkpoints.")

Run = Annotated[Path, typer.Argument(help="run folder")]
RunOrCheckpoint = Annotated[Path, typer.Argument(help="run folder or checkpoint folder")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]


@app.command()
def ls(run: Run, as_json: AsJson = False) -> None:
    """List checkpoints, the newest first; checks manifests and sizes, not contents."""
    rows = [_summary(path, with_hash=False) for path in _checkpoints_of(run)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        if row["fault"] is None:
            size = f"{row['bytes'] / 1e6:,.1f} MB"
            typer.echo(f"{row['name']}  step {row['step']}  {row['tokens']:,} tokens  {size}")
        else:
            typer.echo(f"{row['name']}  damaged: {row['fault']}")


@app.command()
def verify(path: RunOrCheckpoint) -> None:
    """Check every file of every checkpoint against its size and SHA-256; exit 2 if one is damaged."""
    folders = _checkpoints_of(path)
    rows = [_summary(folder, with_hash=True) for folder in folders]
    for row in rows:
        typer.echo(f"{row['name']}: {'good' if row['fault'] is None else 'damaged'}")
    faults = [str(row["fault"]) for row in rows if row["fault"] is not None]
    if faults:
        raise CheckpointError("\n".join(faults))


@app.command()
def show(path: RunOrCheckpoint, as_json: AsJson = False) -> None:
    """Say what a checkpoint holds: run, layout, files, tensors; of a run, its newest one."""
    from moe_runtime.checkpoint.manifest import MANIFEST_NAME, read_manifest

    folder = _checkpoints_of(path)[0]
    manifest = read_manifest(folder / MANIFEST_NAME)
    if as_json:
        typer.echo(manifest.model_dump_json())
        return
    for line in _description(folder, manifest):
        typer.echo(line)
    fault = _summary(folder, with_hash=False)["fault"]
    if fault is not None:
        typer.echo(f"damaged: {fault}")


@app.command()
def prune(run: Run, keep: Annotated[int, typer.Option(min=1, help="how many good ones stay")] = 2) -> None:
    """Remove all but the newest good checkpoints; good means that every SHA-256 is right."""
    from moe_runtime.checkpoint.folder import checkpoints_dir_of
    from moe_runtime.checkpoint.retain import prune as remove_old

    _checkpoints_of(run)
    try:
        removed = remove_old(checkpoints_dir_of(run), keep, with_hash=True)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be removed: {error.strerror}") from None
    for path in removed:
        typer.echo(f"removed {path}")


@app.command()
def diff(
    first: RunOrCheckpoint,
    second: RunOrCheckpoint,
    limit: Annotated[int, typer.Option(min=0, help="how many differing tensors to list")] = 20,
    as_json: AsJson = False,
) -> None:
    """Say how two checkpoints of any layouts differ; of a run, its newest. Exit 1 if a tensor does.

    Weights, averages, master weights and moments are compared element by element, by canonical name.
    """
    from moe_runtime.checkpoint.difference import compare_checkpoints
    from moe_runtime.checkpoint.folder import verify_checkpoint
    from moe_runtime.cli.checkpoint_diff import as_dict, as_lines

    old, new = (verify_checkpoint(_checkpoints_of(path)[0]) for path in (first, second))
    found = compare_checkpoints(old, new)
    if as_json:
        typer.echo(json.dumps(as_dict(old, new, found)))
    else:
        typer.echo("\n".join(as_lines(old, new, found, limit)))
    if found.differing:
        raise typer.Exit(1)


def _checkpoints_of(path: Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first, or the checkpoint folder itself.

    Raises:
        CheckpointError: there are none.
    """
    from moe_runtime.checkpoint.folder import checkpoints_dir_of, list_steps, step_of
    from moe_runtime.checkpoint.manifest import MANIFEST_NAME

    if step_of(path.name) is not None or (path / MANIFEST_NAME).exists():
        if path.is_dir():
            return [path]
    elif found := list_steps(checkpoints_dir_of(path)):
        return found
    raise CheckpointError(f"{path}: expected a run or checkpoint folder, got no checkpoint there")


def _summary(path: Path, with_hash: bool) -> dict:
    from moe_runtime.checkpoint.folder import verify_checkpoint

    row: dict = {"name": path.name, "path": str(path), "fault": None}
    try:
        manifest = verify_checkpoint(path, with_hash=with_hash).manifest
    except CheckpointError as error:
        return row | {"fault": str(error)}
    return row | {"step": manifest.step, "tokens": manifest.tokens, "bytes": manifest.total_bytes}


def _description(path: Path, manifest: "Manifest") -> list[str]:
    weights = [entry for _, _, entry in manifest.weights()]
    layout = ", ".join(f"{key} {value}" for key, value in manifest.layout.items())
    position = manifest.position
    schedules = ", ".join(f"{key} {value:.6g}" for key, value in manifest.schedules.items())
    lines = [
        str(path),
        f"format {manifest.format}, step {position.step}, {position.tokens:,} tokens, "
        f"{position.sequences:,} sequences, saved with {layout}",
        *(f"passes over {count:,} sequences from {first:,} on" for first, count in position.skipped),
        *([f"next step: {schedules}"] if schedules else []),
        *([f"random numbers: {_rng_text(manifest.rng)}"] if manifest.rng else []),
        f"{len(weights)} weights, {sum(entry.num_bytes for entry in weights) / 1e6:,.1f} MB",
        f"{len(manifest.partitions)} optimizer partitions",
    ]
    for name, entry in manifest.files.items():
        tensors = f", {len(entry.tensors)} tensors" if entry.tensors else ""
        lines.append(f"  {name}  {entry.bytes:,} bytes{tensors}  sha256 {entry.sha256[:16]}")
    return lines


def _rng_text(rng: dict[str, int | str]) -> str:
    """`seed 7; data_order by epoch and position; ...`."""
    return "; ".join(f"{key} {value}" if key == "seed" else f"{key} by {value}" for key, value in rng.items())
