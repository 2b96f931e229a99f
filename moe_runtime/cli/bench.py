"""`moe-runtime bench`: measurements against a peer, side by side in one run."""

import json as json_text
from typing import Annotated

import typer

app = typer.Typer(help="Measure a part of the runtime against its peer.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure a part of the runtime against its peer, in turn, in one run."""


@app.command("train")
def train(
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="pairs of steps measured for each precision")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Training tokens/s of the plain model against transformers' DeepseekV3ForCausalLM, on the CPU."""
    from moe_runtime.cli.bench_train import describe, measure  # needs the `test` extra

    results = [measure(precision, rounds, threads) for precision in ("fp32", "bf16")]
    if json:
        typer.echo(json_text.dumps(results))
    else:
        typer.echo(describe(results))
