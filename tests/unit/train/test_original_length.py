"""YaRN put on given weights is told the length that they were trained at, or a warning says so."""

from pathlib import Path
from typing import Any

import pytest

from moe_runtime.config.schema import ModelConfig, YarnConfig
from moe_runtime.train.resume import other_original_length
from tests.unit.hugging_face.models import BASE, make_model, save


@pytest.mark.parametrize(
    ("model", "yarn", "expected"),
    [
        ({}, None, ""),
        ({}, {"original_seq_len": 64}, ""),
        ({}, {}, "original_seq_len: expected 64, the batch.seq_len of these weights, got 4096"),
        # Phase two goes on with the setting of phase one, whose sequences are longer than the original ones.
        ({"yarn": {"factor": 5.0, "original_seq_len": 16}}, {"original_seq_len": 16}, ""),
    ],
)
def test_an_original_length_that_the_weights_never_had_is_told(
    tmp_path: Path, model: dict[str, Any], yarn: dict[str, Any] | None, expected: str
) -> None:
    checkpoint = save(make_model(ModelConfig.model_validate(BASE | model)), tmp_path / "run")
    said = other_original_length(checkpoint, None if yarn is None else YarnConfig(**yarn))
    assert said == "" if expected == "" else expected in said
