"""A checkpoint written as a Hugging Face model: config.json, safetensors shards, generation_config.json.

Tensors go through one at a time, in the order of the model's layers, so memory holds one of our files
(mapped) and one tensor. The folder appears whole or not at all, as checkpoints do.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_runtime.checkpoint.disk import (
    free_bytes,
    fsync_folder,
    make_empty,
    remove,
    replace_folder,
    write_bytes,
)
from moe_runtime.checkpoint.folder import TMP_PREFIX, Checkpoint
from moe_runtime.checkpoint.hugging_face import fp8_form
from moe_runtime.checkpoint.hugging_face.config_form import check_expressible, write_config
from moe_runtime.checkpoint.hugging_face.end_ids import (
    CONFIG_JSON,
    STATE_KEY,
    text_ids_of,
    write_text_ids,
)
from moe_runtime.checkpoint.hugging_face.json_file import object_bytes
from moe_runtime.checkpoint.hugging_face.names import Parameter, empty_parts, parameters_of
from moe_runtime.checkpoint.hugging_face.shard_reader import INDEX_FILE, SINGLE_FILE, ShardReader, index_of
from moe_runtime.checkpoint.hugging_face.shard_writer import FilesWriter, split_in_files
from moe_runtime.checkpoint.load import config_of
from moe_runtime.checkpoint.tensor_file import Planned
from moe_runtime.checkpoint.tensors import DTYPE_WORDS
from moe_runtime.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5_000_000_000
SCALES_PREFIX = "scales-"
WRITTEN_DTYPES = ("F32", "BF16", "F16")
_DTYPES = {word: dtype for dtype, word in DTYPE_WORDS.items()}


@dataclass(frozen=True)
class ExportOptions:
    """What is written.

    Args:
        fp8: matrices as E4M3 codes with a scale for each 128 x 128 block.
        dtype: of everything else, and of all without `fp8`; None: as stored. The routing bias is FP32.
        ema: the averages of the weights over steps.
        shard_bytes: largest size of a file.
        eos_id: token that ends a document, if a tokenizer is known.
        files: other files of the folder, such as a tokenizer's.
    """

    fp8: bool = False
    dtype: torch.dtype | None = None
    ema: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    eos_id: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def export_model(checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> int:
    """Write `folder`, which must not exist or be empty; gives the bytes of its tensors.

    Raises:
        CheckpointError: the model has no such form, a tensor is missing, or the disk is full.
    """
    model = config_of(checkpoint).model
    check_expressible(model)
    refuse_occupied(folder)
    tmp = folder.with_name(TMP_PREFIX + folder.name)
    kind = "ema" if options.ema else "weights"
    ours = {name: file for name, file, _ in checkpoint.manifest.weights(kind)}
    if options.ema and not ours:
        raise CheckpointError(
            f"{checkpoint.path}: expected averaged weights, got none; train with train.ema_decay"
        )
    scale_files = [name for name in checkpoint.manifest.files if name.startswith(SCALES_PREFIX)]
    with (
        ShardReader(checkpoint.path, ours) as weights,
        ShardReader(checkpoint.path, index_of(checkpoint.path, scale_files)) as scales,
    ):
        source = _Source(list(parameters_of(model)), weights, scales, options)
        source.check(checkpoint.path)
        planned = [
            *source.planned(),
            *(Planned(name, source.dtype, shape) for name, shape in empty_parts(model)),
        ]
        small = _small_files(checkpoint, source, options)
        try:
            make_empty(tmp)
            check_space(folder, planned)
            names = _write(tmp, planned, source, options.shard_bytes)
            for name, data in (small | names).items():
                write_bytes(tmp / name, data)
            fsync_folder(tmp)
            replace_folder(tmp, folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from error
        finally:
            remove(tmp)
    return sum(tensor.num_bytes for tensor in planned)


def refuse_occupied(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        CheckpointError: the folder holds files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: expected a new or empty folder, got one with files; choose another")


def check_space(folder: Path, planned: Iterable[Planned]) -> None:
    """Refuse to begin what will not fit.

    Raises:
        CheckpointError: fewer bytes are free where `folder` is than the tensors take.
    """
    needed, free = sum(tensor.num_bytes for tensor in planned), free_bytes(folder)
    if needed > free:
        raise CheckpointError(
            f"{folder}: disk full: expected {needed / 1e6:,.1f} MB free, got {free / 1e6:,.1f} MB"
        )


class _Source:
    """The tensors of an export, as a plan and as values, in the same order."""

    def __init__(
        self, parameters: list[Parameter], weights: ShardReader, scales: ShardReader, options: ExportOptions
    ) -> None:
        self.parameters, self.weights, self.scales, self.options = parameters, weights, scales, options

    @property
    def dtype(self) -> str:
        """Of the embedding, which stands for the model."""
        return self._dtype(self.parameters[0])

    def check(self, where: Path) -> None:
        """Refuse a checkpoint that does not hold the model that its config describes."""
        for parameter in self.parameters:
            got = self.weights.stored.get(parameter.name)
            if got is None:
                raise CheckpointError(f"{where}: expected parameter {parameter.name}, got none of that name")
            if got.shape != parameter.shape:
                wanted = list(parameter.shape)
                raise CheckpointError(
                    f"{where}: {parameter.name}: expected shape {wanted}, got {list(got.shape)}"
                )

            if self._dtype(parameter) not in WRITTEN_DTYPES:
                raise CheckpointError(
                    f"{where}: {parameter.name}: expected one of {', '.join(WRITTEN_DTYPES)}, "
                    f"got {got.dtype}; say --dtype fp32 or --dtype bf16"
                )

    def planned(self) -> Iterator[Planned]:
        """Every tensor that is written, with its dtype and shape."""
        for parameter in self.parameters:
            dtype = self._dtype(parameter)
            for part in parameter.parts:
                if self._is_quantised(parameter, part):
                    scale = part + fp8_form.SCALE_SUFFIX
                    yield Planned(part, fp8_form.CODES, parameter.part_shape)
                    yield Planned(scale, self._scale_dtype(scale), fp8_form.scale_shape(parameter.part_shape))
                else:
                    yield Planned(part, dtype, parameter.part_shape)
            for copy in parameter.copies:
                yield Planned(copy, dtype, parameter.shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The values, one parameter in memory at a time."""
        for parameter in self.parameters:
            whole = self.weights.read(parameter.name)
            dtype = _DTYPES[self._dtype(parameter)]
            for part, rows in zip(parameter.parts, whole.chunk(len(parameter.parts)), strict=True):
                if self._is_quantised(parameter, part):
                    yield from self._quantised(part, rows)
                else:
                    yield part, rows.to(dtype)
            for copy in parameter.copies:
                yield copy, whole.to(dtype)
            del whole, rows  # they keep their file mapped

    @property
    def uses_recorded_scales(self) -> bool:
        """True if an import recorded which matrices were FP8, and with which scales."""
        return self.options.fp8 and bool(self.scales.stored)

    def _quantised(self, part: str, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
        name = part + fp8_form.SCALE_SUFFIX
        recorded = self.scales.read(name).clone() if self.scales.stored else None
        codes, scales = fp8_form.quantise(rows, recorded)
        yield part, codes
        yield name, scales if recorded is None else scales.to(recorded.dtype)

    def _is_quantised(self, parameter: Parameter, part: str) -> bool:
        if self.uses_recorded_scales:
            return part + fp8_form.SCALE_SUFFIX in self.scales.stored
        return self.options.fp8 and parameter.is_linear

    def _scale_dtype(self, name: str) -> str:
        return self.scales.stored[name].dtype if self.scales.stored else "F32"

    def _dtype(self, parameter: Parameter) -> str:
        if self.options.dtype is None:
            return self.weights.stored[parameter.name].dtype
        return "F32" if parameter.is_routing_bias else DTYPE_WORDS[self.options.dtype]


def _write(tmp: Path, planned: list[Planned], source: _Source, shard_bytes: int) -> dict[str, bytes]:
    """Write the shards; gives the index, if there is more than one."""
    groups = split_in_files(planned, shard_bytes)
    count = len(groups)
    files = [
        (f"model-{number:05d}-of-{count:05d}.safetensors", group) for number, group in enumerate(groups, 1)
    ]
    if count == 1:
        files = [(SINGLE_FILE, groups[0])]
    with FilesWriter(tmp, files) as writer:
        for name, tensor in source.tensors():
            writer.write(name, tensor)
            del tensor  # it may keep its file mapped
        for empty in planned:
            if 0 in empty.shape:
                writer.write(empty.name, torch.empty(empty.shape, dtype=_DTYPES[empty.dtype]))
    if count == 1:
        return {}
    total = sum(tensor.num_bytes for tensor in planned)
    weight_map = {tensor.name: file for file, group in files for tensor in group}
    return {INDEX_FILE: object_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})}


def _small_files(checkpoint: Checkpoint, source: _Source, options: ExportOptions) -> dict[str, bytes]:
    config = config_of(checkpoint)
    text_ids = write_text_ids(text_ids_of(checkpoint), options.eos_id)
    fields = write_config(
        config.model,
        dtype=source.dtype,
        context=config.batch.seq_len,
        balance_alpha=config.recipe.balance_alpha,
        text_ids=text_ids.pop(CONFIG_JSON),
    )
    if options.fp8:
        recorded: dict[str, Any] = checkpoint.manifest.state.get(STATE_KEY) or {}
        said = recorded.get("quantization_config") if source.uses_recorded_scales else None
        fields["quantization_config"] = said or fp8_form.QUANTIZATION
    generation = {name: object_bytes(ids) for name, ids in text_ids.items()}
    return {CONFIG_JSON: object_bytes(fields), **options.files, **generation}
