"""What was measured, as a JSON file: one object with all models, read back as it was written."""

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moe_runtime.config.schema import YarnConfig
from moe_runtime.errors import DataError
from moe_runtime.evaluation.by_position import PositionLoss
from moe_runtime.evaluation.needle import NeedleForm


@dataclass(frozen=True)
class NeedleCell:
    """Questions of one length and depth, and how many of them came out right in either sense."""

    length: int
    depth: float
    questions: int
    preferred: int
    returned: int


@dataclass(frozen=True)
class Terms:
    """What all models of a call meet alike.

    Args:
        data: folder of prepared data whose validation text gives the windows.
        needle_data: the same for the text in which needles are planted.
        lengths: of questions, tokens; the first is the old length, the last that of windows.
        windows: how many.
        depths: where needles are planted; questions: so many of each length and depth.
    """

    data: str
    needle_data: str
    lengths: tuple[int, ...]
    windows: int
    depths: tuple[float, ...]
    questions: int
    form: NeedleForm = field(default_factory=NeedleForm)


@dataclass(frozen=True)
class Measured:
    """One model.

    Args:
        label: what is compared; models of one label are seeds of the same thing.
        checkpoint: as it was named.
        weights: the beginning of a sha256 over its weights.
        step: of the run that it comes from.
        seq_len: tokens of a sequence in that run.
        seed: of that run.
        yarn: as it was measured.
        trained: False where YaRN was put on and nothing trained since.
    """

    label: str
    checkpoint: str
    weights: str
    step: int
    seq_len: int
    seed: int
    yarn: YarnConfig | None
    trained: bool
    position: PositionLoss
    needle: tuple[NeedleCell, ...]


@dataclass(frozen=True)
class Record:
    """All models, and the terms that they were measured on."""

    terms: Terms
    models: tuple[Measured, ...]


_RECORD = TypeAdapter(Record)


def write_record(record: Record) -> str:
    """JSON text, the same for the same record."""
    return _RECORD.dump_json(record, indent=1).decode() + "\n"


def read_record(path: Path) -> Record:
    """The record of a file.

    Raises:
        DataError: no such file, or something else in it.
    """
    try:
        return _RECORD.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; write one with `moe-runtime context measure`") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        wanted = "what `moe-runtime context measure --out` wrote"
        raise DataError(f"{path}: {place or 'top'}: expected {wanted}, got: {first['msg']}") from None
