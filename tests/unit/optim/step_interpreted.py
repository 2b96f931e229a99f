"""The Triton step in Triton's interpreter on CPU tensors, against the plain one.

Triton reads TRITON_INTERPRET when a kernel is defined, so this runs in a process of its own:
`python -m tests.unit.optim.step_interpreted` runs each `case_` and prints {name: what went wrong or ""}.
The working copy of the step with FP8 moments is left out: the interpreter cuts BF16 off instead of rounding
it (see the PTX test).
"""

import json
import sys
import traceback
import warnings
from functools import partial

import torch

from moe_runtime.optim import fused_step_triton
from moe_runtime.optim.bf16_step_triton import bf16_step
from moe_runtime.optim.fused_step_triton import fused_step
from moe_runtime.optim.moments import Fp8Moments
from tests.unit.optim.step_cases import LAYOUTS, differences, plain, run


def compare(count: int, offset: int, dtype: torch.dtype, rows: int | None = None) -> None:
    # The interpreter's time goes with the number of programs.
    rows = rows or (8 if count < 2000 else 32)
    step = partial(fused_step, rows=rows)
    ours, expected = (run(form, "fp8", count, offset, dtype, steps=3) for form in (step, plain("fp8")))
    found = differences(ours, expected, working=False)
    assert not found, (count, offset, dtype, rows, found)


def case_bits_and_counts_are_those_of_the_plain_step() -> None:
    for count, offset in LAYOUTS:
        compare(count, offset, torch.float32)


def case_bf16_gradients_and_the_shape_of_programs_that_a_gpu_runs() -> None:
    compare(*LAYOUTS[4], torch.bfloat16, rows=fused_step_triton.ROWS)


def case_several_launches_give_the_bits_of_one() -> None:
    fused_step_triton._LAUNCH_ELEMENTS = 512
    try:
        compare(1300, (1 << 32) - 600, torch.float32, rows=4)
    finally:
        fused_step_triton._LAUNCH_ELEMENTS = 1 << 30


def case_what_is_not_finite_reads_as_after_the_plain_step() -> None:
    def spoil(grad: torch.Tensor) -> None:
        grad[3], grad[200], grad[300] = torch.inf, torch.nan, 3e30

    ours, expected = (run(form, "fp8", 600, steps=2, spoil=spoil) for form in (fused_step, plain("fp8")))
    got, want = (Fp8Moments().read(made.state, 0, 600) for made in (ours, expected))
    for mine, theirs in zip((*got, ours.value), (*want, expected.value), strict=True):
        assert torch.equal(mine.nan_to_num(nan=-1.0), theirs.nan_to_num(nan=-1.0))
    assert got[1][[3, 200, 300]].isnan().all() and ours.counts.nonfinite == 3


def case_bf16_moments_have_the_bits_of_the_plain_step() -> None:
    for count, dtype in ((1, torch.float32), (2500, torch.bfloat16)):
        ours, expected = (run(form, "bf16", count, 0, dtype) for form in (bf16_step, plain("bf16")))
        assert not differences(ours, expected), (count, dtype)


def case_the_comparison_sees_another_noise() -> None:
    """The planted fault: the same steps with the noise one element on."""
    ours, expected = (run(form, "fp8", 100, at, steps=1) for form, at in ((fused_step, 1), (plain("fp8"), 0)))
    assert "exp_avg_codes" in differences(ours, expected, working=False)


def main() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns of quotients that are not used
    results = {}
    for name, case in sorted(globals().items()):
        if name.startswith("case_"):
            try:
                case()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
