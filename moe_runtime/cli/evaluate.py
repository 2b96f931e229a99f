"""`moe-runtime eval`: loss, perplexity and bits per byte of a checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.cli.generate import check_device
from moe_runtime.errors import DataError

if TYPE_CHECKING:
    from moe_runtime.checkpoint.folder import Checkpoint
    from moe_runtime.data.shards import TokenDataset

BATCH_SEQUENCES = 4


def evaluate(
    path: Annotated[Path, typer.Argument(help="run folder (its last good checkpoint) or checkpoint folder")],
    data: Annotated[Path, typer.Option(help="folder of prepared data; its validation split is read")],
    sequences: Annotated[int, typer.Option(min=1, help="at most so many sequences")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ema: Annotated[bool, typer.Option("--ema", help="the average of the weights over steps")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Measure a checkpoint on validation text."""
    # Imported here: torch takes seconds, and `--help` should not.
    from moe_runtime.checkpoint.folder import open_checkpoint
    from moe_runtime.checkpoint.load import config_of, model_from
    from moe_runtime.data.bits import ByteCounter
    from moe_runtime.data.loader import BatchLoader
    from moe_runtime.data.shards import TokenDataset
    from moe_runtime.evaluation.loss import evaluate as measure

    check_device(device)
    checkpoint = open_checkpoint(path)
    config = config_of(checkpoint)
    dataset = TokenDataset.open(data, "validation")
    _check_tokenizer(checkpoint, dataset)
    model = config.model
    loader = BatchLoader(dataset, config.batch.seq_len, model.mtp_depth, config.seed, model.vocab_size)
    batches = loader.validation_batches(sequences, BATCH_SEQUENCES)
    counter = ByteCounter(dataset.load_tokenizer())
    result = measure(model_from(checkpoint, device, ema=ema), batches, counter.bytes_of)
    if as_json:
        where = {
            "checkpoint": str(checkpoint.path),
            "step": checkpoint.manifest.step,
            "data": str(data),
            "ema": ema,
        }
        typer.echo(json.dumps(where | asdict(result)))
        return
    typer.echo(
        f"step {checkpoint.manifest.step}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.3f} bits per byte ({result.tokens:,} tokens of {data})"
    )


def _check_tokenizer(checkpoint: "Checkpoint", dataset: "TokenDataset") -> None:
    """Ids of another tokenizer would give a loss that means nothing."""
    from moe_runtime.checkpoint.folder import TOKENIZER_FILE

    trained_with = json.loads(checkpoint.extra(TOKENIZER_FILE))
    if json.loads(dataset.load_tokenizer().to_json()) != trained_with:
        raise DataError(
            f"{dataset.folder}: expected ids of the tokenizer that {checkpoint.path} was trained with, "
            f"got those of {dataset.manifest.tokenizer.name}; prepare the data with that tokenizer"
        )
