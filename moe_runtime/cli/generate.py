"""`moe-runtime generate`: continue a prompt from a checkpoint."""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.data.vocabulary import Tokenizer


def generate(
    path: Annotated[Path, typer.Argument(help="run folder (its last good checkpoint) or checkpoint folder")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_tokens: Annotated[int, typer.Option(min=1, help="at most so many new tokens")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens that hold this share")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="the same seed draws the same text")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ema: Annotated[bool, typer.Option("--ema", help="the average of the weights over steps")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object at the end")] = False,
) -> None:
    """Continue a prompt; the tokenizer comes from the checkpoint."""
    _check(temperature, top_p)
    # Imported here: torch takes seconds, and a wrong option should be told at once.
    import torch

    from moe_runtime.checkpoint.folder import TOKENIZER_FILE, open_checkpoint
    from moe_runtime.checkpoint.load import config_of, model_from
    from moe_runtime.data.tokenizer import tokenizer_from_json
    from moe_runtime.generate.decode import stream

    check_device(device)
    checkpoint = open_checkpoint(path)
    tokenizer = tokenizer_from_json(checkpoint.extra(TOKENIZER_FILE).decode(), str(checkpoint.path))
    model = model_from(checkpoint, device, ema=ema)
    began = time.monotonic()
    ids = stream(
        model,
        [int(token) for token in tokenizer.encode(prompt)] or [tokenizer.eos_id],
        max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids={tokenizer.eos_id},
        generator=torch.Generator(device).manual_seed(seed),
        context_limit=config_of(checkpoint).batch.seq_len,
        device=device,
    )
    if not as_json:
        _print(prompt, tokenizer, ids)
        return
    tokens = list(ids)
    seconds = time.monotonic() - began
    said = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.manifest.step,
        "prompt": prompt,
        "text": tokenizer.decode(tokens),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": len(tokens) / seconds,
    }
    typer.echo(json.dumps(said))


def _check(temperature: float, top_p: float) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature: expected 0 or more, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"--top-p: expected above 0 and at most 1, got {top_p}")


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        ConfigError: says what was expected.
    """
    import torch

    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: expected a CUDA device, got none; use --device cpu")


def _print(prompt: str, tokenizer: "Tokenizer", ids: Iterable[int]) -> None:
    """Print the prompt, then each token as it comes; a terminal gets no control characters."""
    from moe_runtime.generate.text import text_pieces
    from moe_runtime.metrics.console import printable

    show = printable if sys.stdout.isatty() else str
    typer.echo(prompt, nl=False)
    for piece in text_pieces(tokenizer.id_bytes, ids):
        typer.echo(show(piece), nl=False)
    typer.echo()
