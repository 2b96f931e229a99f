"""What a folder of prepared data says about itself: manifest.json, typed and checked.

    FOLDER/
      manifest.json
      tokenizer.json
      train_00000.bin ...        token ids, little-endian uint16 or uint32, documents one after another
      train_mask_00000.bin ...   one bit a token of the shard, from the lowest bit of each byte: 1 for a token
                                 to be predicted; only where some tokens are not
      train_documents.bin        little-endian uint64: first token of each document, then the total
      train_parts.bin            little-endian uint16: which part of the source each document is of
      validation_00000.bin ...   validation_documents.bin   validation_parts.bin

The manifest is written last and the folder renamed into place, so a folder with a manifest is whole.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from moe_runtime.config.data import TextForm
from moe_runtime.config.section import Count, Fraction, Section
from moe_runtime.errors import DataError

VERSION: Literal[1] = 1
MANIFEST = "manifest.json"

PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+\.(bin|json)$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(Section):
    """A file of the folder."""

    file: PlainName
    bytes: Count
    sha256: Sha256


class ShardRecord(FileRecord):
    """A file of token ids."""

    tokens: Count


class SplitRecord(Section):
    """One stream of tokens."""

    tokens: Count = Field(description="length of the stream, ends of documents included")
    documents: Count
    bytes: Count = Field(description="UTF-8 bytes of the documents")
    fim_documents: Count = Field(0, description="documents rewritten prefix-suffix-middle")
    max_id: Count
    shards: tuple[ShardRecord, ...]
    masks: tuple[FileRecord, ...] = Field(
        (), description="one for each shard; empty: every token is a target"
    )
    targets: Count | None = Field(None, description="tokens that are targets; null: all of them")
    index: FileRecord
    part_names: tuple[str, ...] = Field((), description="parts of the source; empty if not recorded")
    parts: FileRecord | None = Field(None, description="of each document, its place in part_names")


class TokenizerRecord(Section):
    """Which tokenizer made the ids; the tokenizer itself lies beside the manifest."""

    name: str
    vocab_size: Count
    eos_id: Count
    record: FileRecord


class Manifest(Section):
    """All that is known about a folder of prepared data."""

    format: Literal["moe_runtime tokens"] = "moe_runtime tokens"
    version: Literal[1] = VERSION
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerRecord
    source: str
    licence: str | None = Field(None, description="what is known about the licence of the text")
    seed: Count = Field(description="keys the choice of rewritten documents and where they are cut")
    fim_rate: Fraction
    form: TextForm = TextForm()
    validation_fraction: Fraction
    counts: dict[str, Count] = Field(description="documents read; duplicates, empty, binary, not UTF-8")
    splits: dict[Literal["train", "validation"], SplitRecord]

    @property
    def fingerprint(self) -> str:
        """One sha256 over the ids and masks of all shards: two folders with the same have the same one."""
        splits = [self.splits[name] for name in sorted(self.splits)]
        files = [file.sha256 for split in splits for file in (*split.shards, *split.masks)]
        return hashlib.sha256("".join(files).encode()).hexdigest()

    @model_serializer(mode="wrap")
    def _plain_goes_without_saying(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Folders without masks stay readable for versions that know none.
        values: dict[str, Any] = dump(self)
        if self.form == TextForm():
            values.pop("form")
        for split in values["splits"].values():
            if not split["masks"]:
                del split["masks"], split["targets"]
        return values


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a folder.

    Raises:
        DataError: no manifest there, or not one that this version understands.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no prepared data there ({MANIFEST} is missing); set data.source or run "
            f"`moe-runtime prepare --source builtin:stdlib --tokenizer byte --out {folder}`"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file}: damaged, not JSON ({error}); prepare the data again") from error
    if isinstance(content, dict) and content.get("version", VERSION) != VERSION:
        got = content["version"]
        raise DataError(f"{file}: expected format version {VERSION}, got {got}; prepare the data again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise DataError(f"{file}: {where}: {first['msg']}; prepare the data again") from error
