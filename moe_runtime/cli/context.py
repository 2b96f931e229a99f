"""`moe-runtime context`: models beyond the length they were trained at; loss by position, and needles.

`measure` and `table` are the measurement; `plant` makes text that teaches a model what needles ask of it.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.errors import ConfigError

app = typer.Typer(help="Measure models beyond their old context length.", no_args_is_help=True)

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
Models = Annotated[
    list[str],
    typer.Argument(help="LABEL=PATH of run or checkpoint folders; one label for all seeds of a kind"),
]


@app.callback()
def context() -> None:
    """Measure models beyond their old context length."""


@app.command("measure")
def measure(
    models: Models,
    data: Annotated[Path, typer.Option(help="prepared data; windows come from its validation split")],
    lengths: Annotated[
        str, typer.Option(help="of needle questions, tokens; the old length first, that of windows last")
    ],
    needle_data: Annotated[
        Path | None, typer.Option(help="prepared data in which needles are planted; default: --data")
    ] = None,
    windows: Annotated[int, typer.Option(min=2, help="windows of the last length")] = 128,
    questions: Annotated[int, typer.Option(min=1, help="needles of each length and depth")] = 64,
    yarn: Annotated[
        float | None, typer.Option(help="also measure models without YaRN with this factor put on untrained")
    ] = None,
    needles: Annotated[
        str, typer.Option(help="random: letters; taught: those of `context plant`, one key, one letter")
    ] = "random",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of tables")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file, written after each model; what it holds is not measured again"),
    ] = None,
) -> None:
    """Loss by position and needle retrieval of models, side by side on the same text."""
    from moe_runtime.cli.generate import check_device
    from moe_runtime.cli.long_context.measure import measure as measure_all
    from moe_runtime.cli.long_context.measure import subjects
    from moe_runtime.cli.long_context.record import Record, Terms, read_record, write_record
    from moe_runtime.cli.long_context.table import tables
    from moe_runtime.evaluation.needle import FORMS

    if needles not in FORMS:
        raise ConfigError(f"--needles: expected {' or '.join(FORMS)}, got {needles!r}")
    named, wanted = _named(models), _lengths(lengths)
    if yarn is not None and not 1.0 < yarn < math.inf:
        raise ConfigError(f"--yarn: expected a factor above 1, got {yarn:g}")
    check_device(device)
    terms = Terms(str(data), str(needle_data or data), wanted, windows, DEPTHS, questions, FORMS[needles])
    known = read_record(out) if out is not None and out.exists() else None
    if known is not None and known.terms != terms:
        other = [name for name, value in vars(terms).items() if value != getattr(known.terms, name)]
        raise ConfigError(
            f"--out {out}: expected the terms of what it holds, got other {', '.join(other)}; "
            "name another file"
        )
    record, chosen = Record(terms, ()), list(subjects(named, wanted[0], yarn))
    for record in measure_all(chosen, terms, device, known):
        typer.echo(f"{len(record.models)} of {len(chosen)} models measured", err=True)
        if out is not None:
            _write("--out", out, write_record(record))
    typer.echo(write_record(record) if as_json else tables(record), nl=not as_json)


@app.command("table")
def table(
    path: Annotated[Path, typer.Argument(help="file that `context measure --out` wrote")],
    part: Annotated[str | None, typer.Option(help="loss or needles alone; default: both")] = None,
    svg: Annotated[Path | None, typer.Option(help="file to draw loss by position into")] = None,
) -> None:
    """Show a measurement again, as Markdown and perhaps as a drawing."""
    from moe_runtime.cli.long_context.draw import draw
    from moe_runtime.cli.long_context.record import read_record
    from moe_runtime.cli.long_context.table import PARTS, tables

    if part is not None and part not in PARTS:
        raise ConfigError(f"--part: expected {' or '.join(PARTS)}, got {part!r}")
    record = read_record(path)
    if svg is not None:
        _write("--svg", svg, draw(record))
    typer.echo(tables(record, PARTS if part is None else (part,)))


@app.command("plant")
def plant(
    data: Annotated[Path, typer.Option(help="prepared data; its training split is planted")],
    out: Annotated[Path, typer.Option(help="JSONL file to write, for `prepare --source`")],
    every: Annotated[float, typer.Option(help="characters of text to a needle, on average")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="of places and values")] = 0,
) -> None:
    """Write text that teaches needle retrieval: the training split, with needles between its lines."""
    from moe_runtime.data.shards import TokenDataset
    from moe_runtime.evaluation.needle import FORMS
    from moe_runtime.evaluation.planting import planted

    if not every >= 1.0:
        raise ConfigError(f"--every: expected 1 character or more, got {every:g}")
    dataset = TokenDataset.open(data, "train")
    texts = planted(dataset, FORMS["taught"], every, seed)
    _write("--out", out, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    typer.echo(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB; next: moe-runtime prepare --source {out} --out DIR"
    )


def _named(models: list[str]) -> list[tuple[str, Path]]:
    """(label, path) of each argument; a path alone is its own label."""
    named = []
    for one in models:
        label, sign, path = one.partition("=")
        if sign and not (label and path):
            raise ConfigError(f"{one}: expected LABEL=PATH, such as before=runs/short")
        named.append((label, Path(path)) if sign else (one, Path(one)))
    return named


def _lengths(text: str) -> tuple[int, ...]:
    """Whole numbers that rise; the last a multiple of the first, the first one of what slides."""
    from moe_runtime.evaluation.by_position import SLIDES

    try:
        lengths = tuple(int(piece) for piece in text.split(","))
    except ValueError:
        lengths = ()
    if len(lengths) < 2 or any(a >= b for a, b in pairwise(lengths)):
        raise ConfigError(f"--lengths: expected rising numbers, such as 128,256,512, got {text!r}")
    old, last = lengths[0], lengths[-1]
    if old < 1 or old % (2 * SLIDES) or last % old:
        wanted = f"multiples of {2 * SLIDES} for the old length and of that for the last"
        raise ConfigError(f"--lengths: expected {wanted}, got {old} and {last}")
    return lengths


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: cannot be written: {error.strerror}; give another file"
        ) from None
