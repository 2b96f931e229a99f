"""The section fp8: what it takes, and the line that says what it does not."""

from pathlib import Path

import pytest

from moe_runtime.fp8.policy import Policy
from tests.unit.config.samples import build, refusal, write


def test_fp8_is_bf16_with_products_in_fp8_and_its_section_chooses_them() -> None:
    run = build(precision="fp8", fp8={"wgrad": "bf16", "keep_high": ["attn.o", "layers.0", "mtp.0.attn"]})
    choice = Policy(run.fp8).of("layers.1.moe.experts")
    assert choice is not None and (choice.fprop, choice.dgrad, choice.wgrad) == (True, True, False)
    assert Policy(run.fp8).of("layers.0.ffn") is None and Policy(run.fp8).of("mtp.0.block.attn.q") is None
    assert "fprop, dgrad of attn.q" in Policy(run.fp8).summary()
    assert Policy(build(precision="fp8").fp8).of("layers.1.attn.o").keeps_e5m6  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("precision", "section", "told"),
    [
        ("bf16", {"wgrad": "bf16"}, "fp8.wgrad: has no effect under precision bf16; set precision fp8"),
        ("fp8", {"keep_high": ["attn.oo"]}, "fp8.keep_high.0: expected a module"),
        ("fp8", {"keep_high": ["attn.oo"]}, "got 'attn.oo'; did you mean attn.o?"),
        (
            "fp8",
            {"keep_high": ["ffn", "layers.7"]},
            "fp8.keep_high.1: expected a layer of the model (layers 0 to 3",
        ),
        ("fp8", {"keep_high": ["mtp.1"]}, "mtp 0 to 0), got 'mtp.1'"),
        ("fp8", {"dgrad": "fp16"}, "fp8.dgrad: expected one of 'fp8' or 'bf16', got text 'fp16'"),
        ("fp8", {"backend": "cutlass"}, "fp8.backend: expected one of"),
        ("fp8", {"scales": "pow2"}, "fp8.scales: unknown key"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(precision: str, section: dict, told: str, tmp_path: Path) -> None:
    (line,) = refusal(write(tmp_path / "run.yaml", precision=precision, fp8=section))
    assert told in line
