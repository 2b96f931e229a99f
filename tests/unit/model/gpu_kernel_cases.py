"""Kernels of the model in Triton's interpreter against eager forms, run as a module by the test beside it.

Each case raises where something is wrong; the last line printed is what went wrong by case, as JSON.
"""

import json
import traceback
from unittest.mock import Mock, patch

import torch
from torch import Tensor

from moe_runtime.config.schema import RecomputeConfig
from moe_runtime.model import experts, experts_grouped, ffn, gated_triton, heads_triton, mla
from moe_runtime.model.mla import _Heads
from moe_runtime.model.rope import Rotary
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import small_config


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _heads(batch: int, seq: int, heads: int, nope: int, rope: int, v: int, dtype: torch.dtype) -> None:
    q = _draw(batch, seq, heads, nope + rope, dtype=dtype, seed=0)
    kv = _draw(batch, seq, heads, nope + v, dtype=dtype, seed=1)
    k_rope = _draw(batch, seq, rope + 4, dtype=dtype, seed=2)[..., 4:]  # a slice, as of kv_a's output
    pulls = [_draw(batch, seq, heads, width, dtype=dtype, seed=3) for width in (nope + rope, nope + rope, v)]
    turns = Rotary(rope, 1e4, None).table(max(seq, 1), torch.float32, q.device)[:seq]
    made = heads_triton.join_heads(q, kv, k_rope, turns)
    back = heads_triton.part_heads(*pulls, turns)
    if not seq:  # the oracle cannot shape nothing
        assert [x.shape for x in (*made, *back)] == [x.shape for x in (*pulls, q, kv, k_rope)]
        return
    # The oracle in FP32, rounded at the end: its copies are exact, its turns rounded once as the kernel's.
    leaves = [x.float().requires_grad_() for x in (q, kv, k_rope)]
    wanted = _Heads.apply(*leaves, turns, v, v)
    torch.autograd.backward(wanted, [pull.float().transpose(1, 2) for pull in pulls])
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    for got, want in zip(made, wanted, strict=True):
        torch.testing.assert_close(got, want.transpose(1, 2).to(dtype), **near)
    for got, leaf in zip(back, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(got, leaf.grad.to(dtype), **near)


def case_heads_of_even_sizes() -> None:
    _heads(2, 3, 16, 128, 64, 128, torch.bfloat16)


def case_heads_of_ragged_sizes() -> None:
    _heads(2, 5, 5, 12, 8, 20, torch.float32)


def case_more_heads_than_are_taken_at_a_time() -> None:
    _heads(1, 2, 18, 8, 2, 4, torch.bfloat16)


def case_no_token() -> None:
    _heads(1, 0, 4, 8, 4, 8, torch.float32)


def _gated(rows: int, width: int, dtype: torch.dtype, weighted: bool) -> None:
    gate_up = (3 * _draw(rows, 2 * width + 1, dtype=dtype, seed=0))[:, : 2 * width]  # rows lie apart
    weights = _draw(rows, dtype=torch.float32, seed=1)
    pull = _draw(rows, width, dtype=dtype, seed=2)
    leaf, its_weights = gate_up.double().requires_grad_(), weights.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    product = gate * gate.sigmoid() * up
    if weighted:
        product = product * its_weights.unsqueeze(1)
    product.backward(pull.double())
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    given = weights if weighted else None
    torch.testing.assert_close(gated_triton.gated(gate_up, given), product.detach().to(dtype), **near)
    d_gate_up = torch.full((rows, 2 * width), torch.nan, dtype=dtype)
    also = gated_triton.gated_backward(pull, gate_up, d_gate_up, given)
    assert leaf.grad is not None
    torch.testing.assert_close(d_gate_up, leaf.grad.to(dtype), **near)
    assert (also is not None) == weighted
    if also is not None:
        assert its_weights.grad is not None
        torch.testing.assert_close(also[0], product.detach().to(dtype), **near)
        torch.testing.assert_close(also[1], its_weights.grad.float(), rtol=1e-4, atol=1e-4)


def case_gated_with_weights() -> None:
    _gated(7, 100, torch.bfloat16, True)


def case_gated_without_weights() -> None:
    _gated(3, 256, torch.float32, False)


def case_gated_wider_than_a_block() -> None:
    _gated(2, gated_triton.BLOCK + 30, torch.bfloat16, True)
    _gated(2, gated_triton.BLOCK + 30, torch.bfloat16, False)


def case_gated_without_rows() -> None:
    _gated(0, 64, torch.bfloat16, True)


def _gradients(recompute: RecomputeConfig) -> list[Tensor]:
    """Losses and gradients of a small model in FP32."""
    model = Transformer(small_config(expert_ffn_size=8), dtype=torch.float32, recompute=recompute)
    model.init_weights(seed=1)
    tokens = torch.randint(model.config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(2))
    losses = model.losses(tokens)
    (losses.loss + losses.balance).backward()
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return [losses.loss.detach(), *grads]


def case_a_model_by_all_the_kernels_is_the_model() -> None:
    for recompute in (RecomputeConfig(), RecomputeConfig(norm=True, swiglu=True, mla_up=True)):
        wanted = _gradients(recompute)
        with (
            patch.object(mla, "_pads_value", lambda _: False),
            patch.object(mla, "_kernels", lambda *_: heads_triton),
            patch.object(ffn, "gated_kernels", lambda _: gated_triton),
            patch.object(experts_grouped, "gated_kernels", lambda _: gated_triton),
            patch.object(experts, "grouped_gemm_serves", lambda _: True),
            patch.object(heads_triton, "join_heads", Mock(wraps=heads_triton.join_heads)) as joined,
            patch.object(gated_triton, "gated_backward", Mock(wraps=gated_triton.gated_backward)) as gated,
        ):
            found = _gradients(recompute)
        assert joined.call_count and gated.call_count
        assert len(found) == len(wanted)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def main() -> None:
    """Run all cases."""
    wrong = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            try:
                case()
                wrong[name] = ""
            except Exception:
                wrong[name] = traceback.format_exc()
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
