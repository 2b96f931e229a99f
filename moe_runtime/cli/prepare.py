"""`moe-runtime prepare`: text to token shards."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from moe_runtime.data.manifest import Manifest
from moe_runtime.data.prepare import prepare as prepare_data
from moe_runtime.data.survey import Progress as ProgressCallback
from moe_runtime.data.tokenise import Request
from moe_runtime.errors import DataError


def prepare(
    source: Annotated[
        str, typer.Option(help="builtin:stdlib, dir:PATH, or a .txt, .jsonl or .parquet file (key `text`).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    tokenizer: Annotated[
        str, typer.Option(help="byte, bpe:N (trained on the corpus), deepseek, or a tokenizer.json.")
    ] = "byte",
    seed: Annotated[int, typer.Option(min=0, help="Keys which documents are rewritten, and where.")] = 1234,
    fim_rate: Annotated[
        float, typer.Option(help="Share of training documents rewritten prefix-suffix-middle; V3 has 0.1.")
    ] = 0.0,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents kept for validation.")
    ] = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Replace data prepared there before.")] = False,
) -> None:
    """Turn text into memory-mapped token shards, split into training and validation."""
    if not 0.0 <= fim_rate <= 1.0:
        raise DataError(f"--fim-rate: expected 0 to 1, got {fim_rate}")
    if not 0.0 < validation_fraction < 0.5:
        raise DataError(f"--validation-fraction: expected above 0 and below 0.5, got {validation_fraction}")
    request = Request(source, tokenizer, seed, fim_rate, validation_fraction)
    with progress_display() as progress:
        manifest = prepare_data(request, out, overwrite=force, progress=progress)
    for line in summary(manifest, out):
        typer.echo(line)


@contextmanager
def progress_display() -> Iterator[ProgressCallback]:
    """A bar on standard error while data is prepared; nothing where that is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("reading", total=None)
        shown_at = 0.0

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at < 0.05:  # called for every document
                return
            shown_at = time.monotonic()
            bars.update(bar, description=f"{what}: {done / 1e6:.1f} MB", completed=done, total=total)

        yield show


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What was prepared, in a few lines for people."""
    lines = [f"{out}: {manifest.source}, tokenizer {manifest.tokenizer.name} ({manifest.dtype})"]
    for name, split in manifest.splits.items():
        rewritten = f", {split.fim_documents} rewritten for infill" if split.fim_documents else ""
        lines.append(
            f"  {name}: {split.tokens:,} tokens, {split.documents:,} documents{rewritten}, "
            f"{split.bytes / 1e6:.2f} MB of text in {len(split.shards)} shards"
        )
    left_out = {key: count for key, count in manifest.counts.items() if count and key != "documents"}
    if left_out:
        lines.append("  " + ", ".join(f"{key.replace('_', ' ')}: {count}" for key, count in left_out.items()))
    if manifest.licence:
        lines.append(f"  licence: {manifest.licence}")
    return lines
