"""`moe-runtime convert`: models to and from Hugging Face's form."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.cli.convert_tasks import tasks
from moe_runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from moe_runtime.checkpoint.hugging_face.importing import Imported
    from moe_runtime.data.vocabulary import Tokenizer

# torch takes seconds to import and `--help` should not: the rooms are imported by each command.

app = typer.Typer(no_args_is_help=True, help="Write a model in Hugging Face's form, or read one.")
app.command("tasks")(tasks)

DTYPES = ("fp32", "bf16")
MIN_SHARD_GB, MAX_SHARD_GB = 0.001, 1e6
ShardSize = Annotated[
    float, typer.Option("--shard-gb", help="largest size of a file, in 10^9 bytes; at least 0.001")
]


@app.command("export")
def export(
    path: Annotated[Path, typer.Argument(help="run folder (its last good checkpoint) or checkpoint folder")],
    folder: Annotated[Path, typer.Argument(help="new folder for config.json, safetensors and tokenizer")],
    fp8: Annotated[bool, typer.Option("--fp8", help="matrices as E4M3 with 128x128 scales")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; otherwise as stored")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="the average of the weights over steps")] = False,
    shard_gb: ShardSize = 5.0,
) -> None:
    """Write a checkpoint as a model that transformers, vLLM and SGLang load by DeepSeek's names."""
    kind, shard_bytes = _dtype(dtype), _shard_bytes(shard_gb)
    from moe_runtime.checkpoint.folder import open_checkpoint
    from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
    from moe_runtime.checkpoint.hugging_face.names import ragged_widths
    from moe_runtime.checkpoint.load import config_of
    from moe_runtime.cli.own_tokenizer import own_tokenizer
    from moe_runtime.data.hugging_face import hub_files

    checkpoint = open_checkpoint(path)
    tokenizer = own_tokenizer(checkpoint)
    if tokenizer is None:
        _warn(f"{checkpoint.path} carries no tokenizer: {folder} has none either")
    if config_of(checkpoint).data.document_mask:
        _warn("trained with data.document_mask: in Hugging Face's form attention crosses documents")
    if fp8 and (widths := ragged_widths(config_of(checkpoint).model)):
        _warn(
            f"widths {', '.join(map(str, widths))} are no multiples of 128: transformers without a GPU "
            "misreads or refuses such matrices in FP8 (version 5.23)"
        )
    options = ExportOptions(
        fp8=fp8,
        dtype=kind,
        ema=ema,
        shard_bytes=shard_bytes,
        eos_id=None if tokenizer is None else tokenizer.eos_id,
        files={} if tokenizer is None else hub_files(tokenizer),
    )
    num_bytes = export_model(checkpoint, folder, options)
    typer.echo(f"{folder}: step {checkpoint.manifest.step}, {num_bytes / 1e6:,.1f} MB of tensors")


@app.command("import")
def import_(
    hub: Annotated[Path, typer.Argument(help="folder with config.json and safetensors")],
    out: Annotated[Path, typer.Argument(help="new checkpoint folder")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32 or bf16; otherwise as stored, FP8 as config.json says")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="byte, deepseek or a tokenizer.json; otherwise the folder's own, if any"),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of a sequence; otherwise as config.json says, up to 4096"),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="a key of config.json that does not matter; repeatable")
    ] = None,
    shard_gb: ShardSize = 5.0,
) -> None:
    """Read a model of the DeepSeek-V3 kind into a checkpoint; train on it with train.init_from=OUT."""
    kind, shard_bytes = _dtype(dtype), _shard_bytes(shard_gb)
    from moe_runtime.checkpoint.folder import TOKENIZER_FILE
    from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model

    found = _find_tokenizer(hub, tokenizer)
    options = ImportOptions(
        dtype=kind,
        seq_len=seq_len,
        ignored=ignore or (),
        shard_bytes=shard_bytes,
        extras={} if found is None else {TOKENIZER_FILE: found.to_json().encode()},
        state={} if found is None else {"tokenizer": found.name},
    )
    result = import_model(hub, out, options)
    for warning in result.warnings:
        _warn(warning)
    if found is None:
        _warn(f"{out} has no tokenizer: text needs one, so import with --tokenizer")
    else:
        _warn_of_ids(found, result)
    typer.echo(
        f"{out}: {result.model.num_layers} layers, {result.model.mtp_depth} MTP layers, "
        f"{result.num_bytes / 1e6:,.1f} MB in {result.dtype}; train on it with "
        f"bases: [{out}/model.yaml] and train.init_from={out}"
    )


def _dtype(name: str | None) -> "torch.dtype | None":
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name}")
    import torch

    return torch.float32 if name == "fp32" else torch.bfloat16


def _shard_bytes(shard_gb: float) -> int:
    if not MIN_SHARD_GB <= shard_gb <= MAX_SHARD_GB:  # NaN is neither
        raise ConfigError(
            f"--shard-gb: expected a number from {MIN_SHARD_GB:g} to {MAX_SHARD_GB:g}, got {shard_gb:g}"
        )
    return int(shard_gb * 1e9)


def _find_tokenizer(hub: Path, name: str | None) -> "Tokenizer | None":
    """The tokenizer that the user names, or the model's own; one that cannot be used is told of."""
    from moe_runtime.data.hugging_face import tokenizer_of_hub
    from moe_runtime.data.tokenizer import open_tokenizer

    if name is not None:
        return open_tokenizer(name)
    try:
        return tokenizer_of_hub(hub)
    except DataError as error:
        _warn(f"{error}; left out")
        return None


def _warn_of_ids(tokenizer: "Tokenizer", result: "Imported") -> None:
    if tokenizer.vocab_size > result.model.vocab_size:
        _warn(f"the tokenizer has {tokenizer.vocab_size} ids, the model {result.model.vocab_size}")
    if result.eos_ids and tokenizer.eos_id not in result.eos_ids:
        said = ", ".join(map(str, sorted(result.eos_ids)))
        _warn(
            f"text ends with {said} by the model's configs and with {tokenizer.eos_id} by its tokenizer: "
            "generate stops at each of them, an export keeps both"
        )


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)
