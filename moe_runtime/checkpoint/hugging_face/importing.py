"""A Hugging Face model read into a checkpoint, tensor by tensor.

    1  config.json and the headers of all shards: whatever does not fit is refused here, by name
    2  weights, in the order of the layers; gate and up become one matrix, codes become values
    3  scales of FP8 matrices, as they were, so that an export can give back the same codes
    4  the manifest, then the rename: the checkpoint is whole or absent

Memory holds one shard (mapped) and one tensor. There is no optimizer state: training begins with
`train.init_from`.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_runtime.checkpoint.disk import (
    fsync_folder,
    make_empty,
    remove,
    replace_folder,
    write_bytes,
)
from moe_runtime.checkpoint.folder import TMP_PREFIX
from moe_runtime.checkpoint.hugging_face import fp8_form
from moe_runtime.checkpoint.hugging_face.config_form import HubConfig, read_config
from moe_runtime.checkpoint.hugging_face.end_ids import (
    CONFIG_JSON,
    IDS_KEY,
    STATE_KEY,
    eos_ids_in,
    read_text_ids,
)
from moe_runtime.checkpoint.hugging_face.export import (
    DEFAULT_SHARD_BYTES,
    SCALES_PREFIX,
    check_space,
    refuse_occupied,
)
from moe_runtime.checkpoint.hugging_face.fitting import check_counts, check_fit, present_mtp_depth
from moe_runtime.checkpoint.hugging_face.json_file import read_object
from moe_runtime.checkpoint.hugging_face.names import Parameter, parameters_of
from moe_runtime.checkpoint.hugging_face.shard_reader import ShardReader, open_shards
from moe_runtime.checkpoint.hugging_face.shard_writer import FilesWriter, split_in_files
from moe_runtime.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, Position, TensorEntry
from moe_runtime.checkpoint.tensor_file import Planned, bytes_of
from moe_runtime.checkpoint.tensors import DTYPE_WORDS
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.config.tree import dump_text
from moe_runtime.errors import CheckpointError

MODEL_FILE = "model.yaml"
DEFAULT_SEQ_LEN = 4096
_DTYPES = {word: dtype for dtype, word in DTYPE_WORDS.items()}
_PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp32"}
_LAYOUT: dict[str, int | str] = {"pp": 1, "dp": 1, "ep": 1, "world_size": 1, "schedule": "single"}


@dataclass(frozen=True)
class ImportOptions:
    """What is read and how it is kept.

    Args:
        dtype: of the weights; None: as stored, and what was FP8 as config.json says. The routing bias is
            FP32 unless it is kept as stored.
        seq_len: tokens of a sequence for `eval` and `generate`; None: as config.json says, at most 4096.
        ignored: keys of config.json that do not matter, though this version does not know them.
        shard_bytes: largest size of a file.
        extras: file name -> bytes that the checkpoint carries, such as `tokenizer.json`.
        state: what else the manifest says, such as the tokenizer's name.
    """

    dtype: torch.dtype | None = None
    seq_len: int | None = None
    ignored: Collection[str] = ()
    shard_bytes: int = DEFAULT_SHARD_BYTES
    extras: Mapping[str, bytes] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """A checkpoint is on disk: its model, its dtype word, bytes of weights, and what the user should know.

    Args:
        eos_ids: ids that end text, by config.json and generation_config.json.
    """

    model: ModelConfig
    dtype: str
    num_bytes: int
    warnings: tuple[str, ...]
    eos_ids: frozenset[int]


def import_model(hub: Path, out: Path, options: ImportOptions) -> Imported:
    """Write the checkpoint folder `out`, which must not exist or be empty.

    Args:
        hub: folder with config.json and safetensors shards.

    Raises:
        CheckpointError: a file is missing or damaged, the model is another than ours, or the disk is full.
    """
    refuse_occupied(out)
    where = str(hub / CONFIG_JSON)
    said = read_config(read_object(hub / CONFIG_JSON), where, options.ignored)
    if said.quantization is not None:
        fp8_form.check_quantization(said.quantization, where)
    text_ids = read_text_ids(hub)
    about = {STATE_KEY: {"quantization_config": said.quantization, IDS_KEY: text_ids}}
    options = replace(options, state={**options.state, **about})
    with open_shards(hub) as reader:
        check_counts(said.model, reader.stored, hub)
        depth, warnings = present_mtp_depth(said.model, reader.stored, hub)
        model = ModelConfig.model_validate(said.model.model_dump() | {"mtp_depth": depth})
        source = _Source(hub, reader, model, said.dtype, options.dtype)
        check_fit(model, source.parameters, reader.stored, hub, said.quantization is not None)
        tmp = out.with_name(TMP_PREFIX + out.name)
        try:
            make_empty(tmp)
            num_bytes = _write(tmp, source, said, options)
            fsync_folder(tmp)
            replace_folder(tmp, out)
        except OSError as error:
            raise CheckpointError(f"{out}: cannot be written: {error.strerror}") from error
        finally:
            remove(tmp)
        return Imported(model, source.dtype, num_bytes, tuple(warnings), eos_ids_in(text_ids))


class _Source:
    """The tensors of an import, as a plan and as values, in the same order."""

    def __init__(
        self,
        hub: Path,
        reader: ShardReader,
        model: ModelConfig,
        said: str | None,
        wanted: torch.dtype | None,
    ) -> None:
        self.hub, self.reader, self.model, self.wanted = hub, reader, model, wanted
        self.parameters = list(parameters_of(model))
        self.of_codes = "F32" if said in ("fp32", "fp16") else "BF16"

    @property
    def dtype(self) -> str:
        """Of the embedding, which stands for the model."""
        return self.dtype_of(self.parameters[0])

    def dtype_of(self, parameter: Parameter) -> str:
        """Dtype word under which a parameter is kept."""
        if self.wanted is not None:
            return "F32" if parameter.is_routing_bias else DTYPE_WORDS[self.wanted]
        stored = [self.reader.stored[part].dtype for part in parameter.parts]
        kept = [_DTYPES[self.of_codes if word == fp8_form.CODES else word] for word in stored]
        widest = kept[0] if len(kept) == 1 else torch.promote_types(kept[0], kept[1])
        return DTYPE_WORDS[widest]

    def planned(self) -> list[Planned]:
        """Every parameter, under our name."""
        return [Planned(each.name, self.dtype_of(each), each.shape) for each in self.parameters]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, one in memory at a time; what a model shares is compared on the way.

        Raises:
            CheckpointError: a value is not finite, or a copy differs from what it repeats.
        """
        for parameter in self.parameters:
            dtype = _DTYPES[self.dtype_of(parameter)]
            digest = b""
            yield parameter.name, (whole := self._whole(parameter, dtype))
            if parameter.copies:
                digest = hashlib.sha256(bytes_of(whole)).digest()
            del whole
            for copy in parameter.copies:
                if hashlib.sha256(bytes_of(self.reader.read(copy).to(dtype))).digest() != digest:
                    raise CheckpointError(
                        f"{self.hub}: {copy}: expected the values of {parameter.parts[0]}, which MTP shares, "
                        "got others: the model here has one of them"
                    )

    def scales(self) -> list[Planned]:
        """Scales of the matrices that were FP8."""
        stored = self.reader.stored
        names = [part + fp8_form.SCALE_SUFFIX for each in self.parameters for part in each.parts]
        return [Planned(name, stored[name].dtype, stored[name].shape) for name in names if name in stored]

    def _whole(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """A parameter out of its parts."""
        if len(parameter.parts) == 1 and self.reader.stored[parameter.parts[0]].dtype != fp8_form.CODES:
            return self.reader.read(parameter.parts[0]).to(dtype)
        whole = torch.empty(parameter.shape, dtype=dtype)
        for part, rows in zip(parameter.parts, whole.chunk(len(parameter.parts)), strict=True):
            if self.reader.stored[part].dtype == fp8_form.CODES:
                scales = self.reader.read(part + fp8_form.SCALE_SUFFIX).clone()
                fp8_form.dequantise_into(rows, self.reader.read(part), scales, f"{self.hub}: {part}")
            else:
                rows.copy_(self.reader.read(part))
        return whole


def _write(tmp: Path, source: _Source, said: HubConfig, options: ImportOptions) -> int:
    """Write everything into `tmp`, the manifest last; gives the bytes of the weights."""
    weights = _files("weights-", source.planned(), options.shard_bytes)
    scales = _files(SCALES_PREFIX, source.scales(), options.shard_bytes)
    check_space(tmp.parent, [tensor for _, group in (*weights, *scales) for tensor in group])
    with FilesWriter(tmp, weights) as writer:
        for name, tensor in source.tensors():
            writer.write(name, tensor)
            del tensor  # it may keep its shard mapped
    with FilesWriter(tmp, scales) as scale_writer:
        for planned in source.scales():
            scale_writer.write(planned.name, source.reader.read(planned.name))
    entries = {
        name: FileEntry(kind="weights", bytes=size, sha256=sha256, tensors=_described(group))
        for (name, size, sha256), (_, group) in zip(writer.written, weights, strict=True)
    }
    for name, size, sha256 in scale_writer.written:  # carried, for they are no parameters
        entries[name] = FileEntry(kind="extra", bytes=size, sha256=sha256)
    _write_manifest(tmp, entries, _run_config(source, said, options), options)
    return sum(tensor.num_bytes for tensor in source.planned())


def _write_manifest(
    tmp: Path, entries: dict[str, FileEntry], config: RunConfig, options: ImportOptions
) -> None:
    """Write the files that are only carried, and the manifest of all."""
    model_text = dump_text({"model": config.model.model_dump(mode="json")})
    for name, data in {**options.extras, MODEL_FILE: model_text.encode()}.items():
        entries[name] = write_bytes(tmp / name, data)
    manifest = Manifest(
        position=Position(step=0, tokens=0),
        config=config.model_dump(mode="json"),
        layout=_LAYOUT,
        state=dict(options.state),
        files=entries,
    )
    write_bytes(tmp / MANIFEST_NAME, manifest.to_bytes())


def _files(prefix: str, planned: list[Planned], max_bytes: int) -> list[tuple[str, list[Planned]]]:
    """File names and what goes into each."""
    groups = split_in_files(planned, max_bytes)
    return [(f"{prefix}{number:05d}.safetensors", group) for number, group in enumerate(groups)]


def _described(group: list[Planned]) -> dict[str, TensorEntry]:
    return {
        each.name: TensorEntry.model_validate({"shape": each.shape, "dtype": each.dtype}) for each in group
    }


def _run_config(source: _Source, said: HubConfig, options: ImportOptions) -> RunConfig:
    """A run that this model could be of: what `eval`, `generate` and `load_model` ask of a checkpoint."""
    seq_len = options.seq_len or min(said.context or DEFAULT_SEQ_LEN, DEFAULT_SEQ_LEN)
    name = source.hub.name
    fields: dict[str, Any] = {
        "name": name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) else "imported",
        "precision": _PRECISIONS[source.dtype],
        "model": source.model.model_dump(),
        "batch": {"seq_len": seq_len, "global_batch_size": 1},
        "data": {"path": "data"},
    }
    if said.balance_alpha is not None:
        fields["recipe"] = {"balance_alpha": said.balance_alpha}
    return RunConfig.model_validate(fields)
