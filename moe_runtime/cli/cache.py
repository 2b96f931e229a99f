"""`moe-runtime cache`: show and empty a folder of the prefix cache."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.generate.prefix_folder import PrefixFolder

app = typer.Typer(no_args_is_help=True, help="Show or empty a folder of the prefix cache.")

CacheDir = Annotated[Path, typer.Argument(help="what was given as --cache-dir")]


@app.command()
def show(
    cache_dir: CacheDir,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Say how much the folder holds, and when the oldest of it was last used."""
    from moe_runtime.generate.prefix_blocks import BLOCK_TOKENS

    files = list(_open(cache_dir).files())
    blocks = [file for file in files if file.is_block]
    said = {
        "blocks": len(blocks),
        "tokens": BLOCK_TOKENS * len(blocks),
        "bytes": sum(file.num_bytes for file in files),
        "oldest_use_s": max((time.time() - file.used_ns / 1e9 for file in blocks), default=0.0),
    }
    if as_json:
        typer.echo(json.dumps(said))
        return
    size, age = f"{said['bytes'] / 1e6:,.1f} MB", f"{said['oldest_use_s']:,.0f} s"
    typer.echo(f"{said['blocks']:,} blocks of {BLOCK_TOKENS} tokens, {size}, used {age} ago at the longest")


@app.command()
def clear(cache_dir: CacheDir) -> None:
    """Remove all blocks, of all models; other files stay."""
    folder = _open(cache_dir)
    removed = [folder.remove(file.name) for file in folder.files()]
    typer.echo(f"removed {sum(removed):,} files")
    if not all(removed):
        raise ConfigError(f"{folder.path}: {removed.count(False):,} files could not be removed")


def _open(cache_dir: Path) -> "PrefixFolder":
    from moe_runtime.generate.prefix_folder import PrefixFolder

    try:
        return PrefixFolder(cache_dir, create=False)
    except OSError as error:
        raise ConfigError(f"{cache_dir}: expected a folder of the prefix cache: {error.strerror}") from None
