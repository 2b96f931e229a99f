"""`moe-runtime prepare`: text to token shards."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moe_runtime.config.data import TextForm
from moe_runtime.config.explain import explain
from moe_runtime.data.documents import PLAIN as FORM
from moe_runtime.data.manifest import Manifest
from moe_runtime.data.prepare import prepare as prepare_data
from moe_runtime.data.task import Progress as ProgressCallback
from moe_runtime.data.task import Request
from moe_runtime.data.tokenizer import bpe_size
from moe_runtime.errors import DataError

LINE_S = 5.0  # seconds between lines where there is no terminal


def prepare(
    source: Annotated[
        str,
        typer.Option(
            help="builtin:stdlib, dir:PATH, glob:PATTERN, or a .txt, .jsonl or .parquet file; "
            ".gz, .zst, .bz2 and .xz too."
        ),
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
    fields: Annotated[
        str, typer.Option(help="Keys of JSON lines or Parquet whose text is joined; or messages.")
    ] = "text",
    loss_on: Annotated[
        str | None, typer.Option(help="Of these fields, or roles of messages, those to be predicted.")
    ] = None,
    message_format: Annotated[str, typer.Option(help="A message as text.")] = FORM.message_format,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read and tokenise; as many as processors.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace data prepared there before.")] = False,
) -> None:
    """Turn text into memory-mapped token shards, split into training and validation."""
    if not 0.0 <= fim_rate <= 1.0:
        raise DataError(f"--fim-rate: expected 0 to 1, got {fim_rate}")
    if not 0.0 < validation_fraction < 0.5:
        raise DataError(f"--validation-fraction: expected above 0 and below 0.5, got {validation_fraction}")
    form = _form(fields, loss_on, message_format)
    request = Request(source, tokenizer, seed, fim_rate, validation_fraction, form)
    begun, read = time.monotonic(), 0
    with progress_display() as progress:

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal read
            read = total or 0
            progress(what, done, total)

        manifest = prepare_data(request, out, overwrite=force, progress=show, workers=workers)
    for line in summary(manifest, out):
        typer.echo(line)
    if read:
        seconds = time.monotonic() - begun
        typer.echo(f"  {read / 1e6:,.1f} MB prepared in {seconds:.1f} s, {read / seconds / 1e6:.1f} MB/s")
    else:
        typer.echo("  was there already; --force prepares it anew")


def _form(fields: str, loss_on: str | None, message_format: str) -> TextForm:
    """Options as a section of the config; lists have commas."""
    values = {
        "fields": _words(fields),
        "loss_on": None if loss_on is None else _words(loss_on),
        "message_format": message_format,
    }
    try:
        return TextForm.model_validate(values)
    except ValidationError as error:
        found = explain(error, of_run=False)[0]
        raise DataError(f"--{found.key.split('.')[0].replace('_', '-')}: {found.text}") from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@contextmanager
def progress_display() -> Iterator[ProgressCallback]:
    """How far a preparation is, on standard error: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console).show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("reading", total=None)
        shown, shown_at = "", 0.0

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal shown, shown_at
            if what != shown:  # speed is that of one pass, and what was done before it says nothing
                bars.reset(bar, description=what, completed=done, total=total)
            elif time.monotonic() - shown_at < 0.1 and done != total:  # called for every document
                return
            shown, shown_at = what, time.monotonic()
            bars.update(bar, completed=done, total=total)

        yield show


class _Lines:
    """A plain line every so often, and at the end of what took long enough to be told of."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what, self._first, self._begun, self._told_at = "", 0, 0.0, 0.0
        self._told = ("", -1)

    def show(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._first, self._begun, self._told_at = what, done, now, now
        is_end = done == total and self._told_at > self._begun  # of a pass that had lines before
        if (now - self._told_at >= LINE_S or is_end) and self._told != (what, done):
            self._told, self._told_at = (what, done), now
            self._console.print(progress_line(what, done, total, done - self._first, now - self._begun))


def progress_line(what: str, done: int, total: int | None, own: int, seconds: float) -> str:
    """Megabytes, their rate, and the time left at this rate.

    Args:
        done: bytes so far, those of an earlier process too.
        own: bytes of this process.
        seconds: that it took for them.
    """
    rate = own / max(seconds, 1e-9)
    line = f"{what}: {done / 1e6:,.1f}{'' if total is None else f' of {total / 1e6:,.1f}'} MB"
    line += f", {rate / 1e6:.1f} MB/s"
    if total is None or rate <= 0 or done >= total:
        return line
    left = round((total - done) / rate)
    return f"{line}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What was prepared, in a few lines for people."""
    made = manifest.tokenizer.vocab_size
    lines = [f"{out}: {manifest.source}, tokenizer {manifest.tokenizer.name} ({manifest.dtype})"]
    wanted = bpe_size(manifest.tokenizer.name) or made
    fewer = (
        f", for the text has no more to merge than that; {wanted:,} were asked for" if made < wanted else ""
    )
    lines.append(f"  vocabulary: {made:,} entries{fewer}; model.vocab_size={made} or more")
    for name, split in manifest.splits.items():
        rewritten = f", {split.fim_documents} rewritten for infill" if split.fim_documents else ""
        masked = "" if split.targets is None else f", {split.targets:,} of them targets"
        lines.append(
            f"  {name}: {split.tokens:,} tokens{masked}, {split.documents:,} documents{rewritten}, "
            f"{split.bytes / 1e6:.2f} MB of text in {len(split.shards)} shards"
        )
    left_out = {key: count for key, count in manifest.counts.items() if count and key != "documents"}
    if left_out:
        lines.append("  " + ", ".join(f"{key.replace('_', ' ')}: {count}" for key, count in left_out.items()))
    if manifest.licence:
        lines.append(f"  licence: {manifest.licence}")
    return lines
