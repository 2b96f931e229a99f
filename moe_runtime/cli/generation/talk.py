"""The interactive mode: a line is a prompt, an empty line goes on with the last text. No roles or templates.

Latents of all text are kept in memory, so that going on with a long one costs its end only.
"""

import sys

import typer

from moe_runtime.cli.generation.answer import Answering, continue_some
from moe_runtime.cli.generation.open import Generator
from moe_runtime.errors import ConfigError

_HELP = "A line is continued; an empty line goes on with the last text; Ctrl-D ends."


def talk(generator: Generator, how: Answering) -> None:
    """Read lines until the end of the input.

    Raises:
        ConfigError: the experts are shared by several processes, of which one has the terminal.
    """
    if generator.peers.world_size > 1:
        raise ConfigError("--interactive: expected --ep 1, got more; one process has the terminal")
    generator.encode("")  # a checkpoint without a tokenizer is refused before anyone types
    typer.echo(_HELP, err=True)
    text, ids, turn = "", [], 0
    while (line := _read_line()) is not None:
        if line:
            text, ids = line, generator.encode(line)
        elif not ids:
            continue
        typer.echo(text, nl=False)
        said, first_s = continue_some(generator, how, [(turn, text, ids)], streams=True)
        typer.echo()
        one = said[0]
        hits, new = one["prompt_cache_hit_tokens"], one["completion_tokens"]
        typer.echo(
            f"[{new} tokens, first after {first_s:.3f} s | {hits} of {len(ids)} from the cache]", err=True
        )
        text, ids, turn = text + one["text"], [*ids, *one["tokens"]], turn + 1


def _read_line() -> str | None:
    """The next line without its end; None at the end of the input."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
