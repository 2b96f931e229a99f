"""The kernel of latent attention: right in Triton's interpreter, compiled for sm_90, right on a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.comm.test_kernels_compiled import SPILLS, Launch, cache, compile_sm90, launches

__all__ = ["cache", "launches"]

pytest.importorskip("triton")

_ROOT = Path(__file__).parents[3]
_CASES = re.findall(
    r"^def (case_\w+)", Path(__file__).with_name("latent_attention_cases.py").read_text(), re.MULTILINE
)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong in each case; empty where nothing did."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.model.latent_attention_cases"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", _CASES)
def test_interpreted(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == "", outcomes[case]


def _launch(heads: int, launches: list[Launch]) -> list[Launch]:
    """What DeepSeek-V3's widths launch, for two texts that four programs share."""
    from moe_runtime.model.latent_attention_triton import attend

    q_latent, q_rope, latents = (
        torch.zeros(*shape, dtype=torch.bfloat16)
        for shape in ((2, heads, 512), (2, heads, 64), (2, 512, 576))
    )
    attend(q_latent, q_rope, latents, torch.zeros(2, 1, dtype=torch.int64), 0.125, 0, 512, parts=4)
    return launches


@pytest.mark.parametrize("heads", [128, pytest.param(16, marks=pytest.mark.slow)])
def test_compiles_for_sm_90_with_hardly_a_spill(heads: int, launches: list[Launch], cache: Path) -> None:
    attend, join = _launch(heads, launches)
    binary = compile_sm90(attend, cache)
    assert binary.count(SPILLS) <= 16  # none by Triton 3.6; 3.8 moves a few numbers outside of the loop
    assert binary.count(r"LDGSTS\.E\.BYPASS\.128"), (
        "latents are not copied to shared memory 16 bytes a thread"
    )
    assert compile_sm90(join, cache).count(r"LDG\.E\.128")


def test_no_product_is_done_twice(launches: list[Launch], cache: Path) -> None:
    """Two groups of four warps share the slots of a block, then the columns of the sums; see the kernel."""
    binary = compile_sm90(_launch(128, launches)[0], cache)
    scores, sums = (binary.count(rf"HGMMA\.64x{n}x16\.F32\.BF16") for n in (32, 256))
    assert (scores, sums) == ((512 + 64) // 16, 64 // 16)


def test_programs_fill_the_gpu_and_no_more_than_the_blocks() -> None:
    from moe_runtime.model.latent_attention_triton import best_parts

    assert best_parts(tiles=512, blocks=64, processors=132) == 1  # four waves already
    assert best_parts(tiles=64, blocks=64, processors=132) == 2  # two programs a tile fill one wave
    assert 16 <= best_parts(tiles=2, blocks=64, processors=132) <= 64
    assert best_parts(tiles=2, blocks=1, processors=132) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("parts", [None, 1, 5])
@pytest.mark.parametrize("sizes", [{"heads": 128}, {"heads": 128, "new": 2}, {"heads": 16}])
def test_a_gpu_gives_the_numbers_of_torch_in_bf16(sizes: dict[str, Any], parts: int | None) -> None:
    from tests.unit.model.latent_attention_texts import compare

    starts, real = (
        [0, 62, 63, 64, 700, 1999],
        {"dtype": torch.bfloat16, "device": "cuda", "widths": (512, 64)},
    )
    compare(starts, parts=parts, **sizes, **real)
    compare(starts, parts=parts, begins=[0, 0, 5, 60, 64, 1000], **sizes, **real)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_decodes_the_same_logits_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_runtime.model import latent_attention
    from moe_runtime.model.inference import InferenceModel
    from moe_runtime.model.transformer import Transformer
    from tests.unit.model.latent_attention_cases import decode
    from tests.unit.model.samples import draw_tokens, small_config

    # Without experts: a router may choose another one for the last bit of a score.
    config = small_config(hidden_size=64, ffn_size=64, kv_lora_rank=64, qk_rope_head_dim=16, mtp_depth=0)
    config = config.model_copy(update={"num_dense_layers": config.num_layers})
    transformer = Transformer(config, dtype=torch.float32)
    transformer.init_weights(seed=1)
    model = InferenceModel(transformer.to("cuda", torch.bfloat16))
    tokens = draw_tokens(config, 3, 13).cuda()
    with torch.no_grad():
        found = decode(model, tokens)
        monkeypatch.setattr(latent_attention, "_kernels", lambda *_: None)
        wanted = decode(model, tokens)
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).float().norm() / want.float().norm()) < 2e-2
