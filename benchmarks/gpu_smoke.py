"""First look at the plain model on a GPU: what runs, what is slow, and where the host waits.

    PYTHONPATH=.:comm python benchmarks/gpu_smoke.py [--experts 8] [--out smoke.json]

Sections run one after the other; what fails is printed with its traceback and the next one goes on.
Needs torch with CUDA, numpy and pydantic; under a minute on one Hopper GPU.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16 = torch.bfloat16
FOUND: dict[str, Any] = {}


def timed_ms(run: Callable[[], Any], times: int = 5) -> float:
    """Median milliseconds of a call, on the device."""
    run()
    marks = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)[times // 2]


def note(name: str, value: Any) -> None:
    FOUND[name] = value
    print(f"{name}: {value}", flush=True)


def machine() -> None:
    import triton

    properties = torch.cuda.get_device_properties(0)
    note("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")
    note("versions", f"triton {triton.__version__}, cudnn {torch.backends.cudnn.version()}")
    note("host syncs of torch", torch.cuda.get_sync_debug_mode())


def peaks() -> None:
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    for _ in range(10):
        left @ right
    note("bf16 gemm 8192^3, TFLOP/s", round(2 * 8192**3 / timed_ms(lambda: left @ right, 20) / 1e9, 1))
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    note("copy, TB/s", round(2 * 2**31 / timed_ms(lambda: target.copy_(source)) / 1e9, 2))


def attention(seq: int = 4096, heads: int = 128, batch: int = 1) -> None:
    """Forward and backward of causal attention, q and k 192 wide, v 128 wide or padded to 192."""
    flops = 2 * batch * heads * seq * seq * (192 + 128) / 2  # causal
    kinds = {
        "default": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, kind in kinds.items():
        for width in (128, 192):
            try:
                q, k, v = (
                    torch.randn(batch, seq, heads, w, device="cuda", dtype=BF16).transpose(1, 2)
                    for w in (192, 192, width)
                )
                leaves = [x.requires_grad_() for x in (q, k, v)]

                def forward(q=q, k=k, v=v, kind=kind) -> Tensor:
                    if kind is None:
                        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                    with sdpa_kernel(kind):
                        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

                out = forward()
                pull = torch.randn_like(out)
                ahead = timed_ms(forward, 3)
                back = timed_ms(
                    lambda out=out, leaves=leaves, pull=pull: torch.autograd.grad(
                        out, leaves, pull, retain_graph=True
                    ),
                    3,
                )
                rate = f"{flops / ahead / 1e9:.0f} and {2.5 * flops / back / 1e9:.0f} TFLOP/s causal"
                note(f"sdpa {name}, v {width}", f"{ahead:.2f} ms forward, {back:.2f} ms backward ({rate})")
            except Exception as error:
                note(f"sdpa {name}, v {width}", f"{type(error).__name__}: {str(error)[:160]}")
            finally:
                torch.cuda.empty_cache()


def grouped(experts: int = 32, rows: int = 1024) -> None:
    """Grouped BF16 products of one MoE layer against a loop."""
    hidden, width = 7168, 4096
    x = torch.randn(experts * rows, hidden, device="cuda", dtype=BF16)
    d = torch.randn(experts * rows, width, device="cuda", dtype=BF16)
    w = torch.randn(experts, width, hidden, device="cuda", dtype=BF16)
    ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * rows
    out = torch.empty_like(d)
    flops = 2 * experts * rows * hidden * width
    mm = nn.functional.grouped_mm

    def loop() -> None:
        for e in range(experts):
            span = slice(e * rows, e * rows + rows)
            torch.mm(x[span], w[e].t(), out=out[span])

    calls = {
        "loop forward": loop,
        "grouped forward": lambda: mm(x, w.transpose(1, 2), offs=ends),
        "grouped dgrad": lambda: mm(d, w, offs=ends),
        "grouped wgrad": lambda: mm(d.t(), x, offs=ends),
    }
    for name, run in calls.items():
        try:
            note(f"{name}, {experts} x {rows}", f"{flops / timed_ms(run, 3) / 1e9:.0f} TFLOP/s")
        except Exception as error:
            note(name, f"{type(error).__name__}: {str(error)[:200]}")


def wide_products() -> None:
    """Weight gradients summed in FP32: a product and an addition, or one call."""
    d, x = (torch.randn(4096, n, device="cuda", dtype=BF16) for n in (16384, 7168))
    total = torch.zeros(16384, 7168, device="cuda")
    flops = 2 * 4096 * 16384 * 7168
    calls = {
        "mm(bf16)": lambda: torch.mm(d.t(), x),
        "mm(out_dtype fp32)": lambda: torch.mm(d.t(), x, out_dtype=torch.float32),
        "add_(mm(out_dtype fp32))": lambda: total.add_(torch.mm(d.t(), x, out_dtype=torch.float32)),
        "addmm(out_dtype fp32, out=)": lambda: torch.addmm(
            total, d.t(), x, out_dtype=torch.float32, out=total
        ),
    }
    for name, run in calls.items():
        try:
            ms = timed_ms(run, 5)
            note(name, f"{ms:.2f} ms, {flops / ms / 1e9:.0f} TFLOP/s")
        except Exception as error:
            note(name, f"{type(error).__name__}: {str(error)[:200]}")


def norms() -> None:
    """RMSNorm of the stream: torch's kernel against FP64 on the CPU, values and gradients."""
    from moe_runtime.model.norm import RMSNorm

    x = torch.randn(64, 7232, dtype=BF16)
    pull = torch.randn(64, 7168, dtype=BF16)
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", BF16)):
        norm = RMSNorm(7168, 1e-6, dtype=dtype, device=device)
        leaf = x.to(device, dtype).requires_grad_()
        out = norm(leaf[:, :7168])  # rows apart, as those of the latent are
        out.backward(pull.to(device, dtype))
        found.append([t.detach().cpu().double() for t in (out, leaf.grad, norm.weight.grad)])
    apart = [f"{float((a - b).norm() / a.norm()):.1e}" for a, b in zip(*found, strict=True)]
    note("norm, relative error of output, d_x, d_gain (BF16: 2e-3)", apart)
    wide = torch.randn(4096, 7168, device="cuda", dtype=BF16, requires_grad=True)
    norm = RMSNorm(7168, 1e-6, dtype=BF16, device="cuda")
    out, d_out = norm(wide), torch.randn_like(wide)
    note("norm of 4096 x 7168, ms", round(timed_ms(lambda: norm(wide)), 3))
    back = timed_ms(lambda: torch.autograd.grad(out, [wide, norm.weight], d_out, retain_graph=True))
    note("its backward, ms", round(back, 3))


def open_slice(experts: int, vocab: int) -> Any:
    """A DeepSeek-V3 slice of one dense and two MoE layers, true widths, random weights."""
    from moe_runtime.config.schema import ModelConfig
    from moe_runtime.model.transformer import Transformer

    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=7168,
        num_layers=3,
        num_dense_layers=1,
        ffn_size=18432,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=experts,
        num_shared_experts=1,
        top_k=8,
        expert_ffn_size=2048,
        mtp_depth=0,
    )
    model = Transformer(config, dtype=BF16, device="cuda")
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.fill_(1.0) if name.endswith("norm.weight") else param.normal_(0, 0.006)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def model_steps(experts: int, seq: int, sequences: int) -> None:
    """Whole steps of the slice: phases, backward, optimizer; then the kernels; then where the host waits."""
    from moe_runtime.optim.adamw import AdamW
    from moe_runtime.parallel.weight_grad import WeightGradSink

    model = open_slice(experts, 16384)
    named = list(model.named_parameters())
    WeightGradSink().install(param for _, param in named)
    note("parameters", sum(param.numel() for _, param in named))
    masters = [nn.Parameter(param.detach().float()) for _, param in named]
    optimizer = AdamW(masters, lr=1e-4, moments="fp32")
    tokens = torch.randint(16384, (sequences, seq + 1), device="cuda")

    def backward() -> Tensor:
        losses = model.losses(tokens)
        (losses.loss + 1e-4 * losses.balance).backward()
        return losses.loss

    def update() -> None:
        for (_, param), master in zip(named, masters, strict=True):
            master.grad = param.grad_accum
        optimizer.step()
        with torch.no_grad():
            for (_, param), master in zip(named, masters, strict=True):
                param.copy_(master)
                param.grad_accum.zero_()

    torch.cuda.reset_peak_memory_stats()
    losses = []
    for turn in range(4):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        loss = backward()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        update()
        torch.cuda.synchronize()
        losses.append(round(float(loss), 4))
        spent = f"{(middle - begun) * 1e3:.1f} ms forward and backward, "
        print(f"step {turn}: {spent}{(time.perf_counter() - middle) * 1e3:.1f} ms update", flush=True)
    note("losses", losses)
    note("peak memory, GiB", round(torch.cuda.max_memory_allocated() / 2**30, 1))
    phases(model, tokens)
    kernels(backward)
    waits(backward)


def phases(model: Any, tokens: Tensor) -> None:
    """Device time of each phase's forward."""
    from moe_runtime.model.phase import Compute

    marks: list[tuple[str, Any, Any]] = []
    original = model.phases()

    def watched(phase: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            outputs = phase.fn(*inputs)
            end.record()
            marks.append((f"{phase.name} {phase.layer}", begin, end))
            return outputs

        return Compute(phase.name, phase.layer, run, phase.inputs, phase.outputs)

    listed = tuple(watched(p) if isinstance(p, Compute) else p for p in original)
    for _ in range(2):
        marks.clear()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        with torch.no_grad():
            model._run(listed, {"tokens": tokens})
        launched = time.perf_counter() - begun
        torch.cuda.synchronize()
        whole = time.perf_counter() - begun
    note("forward alone, ms", f"{whole * 1e3:.1f}, host done after {launched * 1e3:.1f}")
    note("phases, ms", {name: round(begin.elapsed_time(end), 2) for name, begin, end in marks})


def kernels(backward: Callable[[], Any]) -> None:
    """The longest kernels and Functions of one forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        backward()
        torch.cuda.synchronize()
    events = found.key_averages()
    on_device = [e for e in events if str(e.device_type).endswith("CUDA")]
    total = sum(e.self_device_time_total for e in on_device)
    print(f"kernels: {total / 1e3:.1f} ms, {sum(e.count for e in on_device)} launches")
    for e in sorted(on_device, key=lambda e: -e.self_device_time_total)[:40]:
        print(f"  {e.self_device_time_total / 1e3:8.2f} ms {e.count:5d}  {e.key[:110]}")
    on_host = [e for e in events if not str(e.device_type).endswith("CUDA")]
    for e in sorted(on_host, key=lambda e: -e.device_time_total)[:45]:
        print(f"  {e.device_time_total / 1e3:8.2f} ms {e.count:5d}  {e.key[:80]}")
    FOUND["kernel ms"] = total / 1e3


def waits(backward: Callable[[], Any]) -> None:
    """Lines at which the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    seen: Counter[str] = Counter()

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            frame = next((f for f in reversed(traceback.extract_stack()) if "moe_" in f.filename), None)
            seen[f"{Path(frame.filename).name}:{frame.lineno}" if frame else f"{filename}:{lineno}"] += 1

    before, warnings.showwarning = warnings.showwarning, show
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            backward()
    finally:
        warnings.showwarning = before
        torch.cuda.set_sync_debug_mode("default")
    note("host waits", dict(seen))


def fp8_update() -> None:
    """The optimizer step alone on 2^27 parameters, by moment storage."""
    from moe_runtime.optim.adamw import AdamW

    for kind in ("fp32", "fp8"):
        master = nn.Parameter(torch.randn(2**27, device="cuda"))
        master.grad = torch.randn_like(master)
        optimizer = AdamW([master], lr=1e-4, moments=kind)
        note(f"update of 2^27 parameters, {kind} moments, ms", round(timed_ms(optimizer.step, 3), 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="names of sections")
    given = parser.parse_args()
    sections: dict[str, Callable[[], None]] = {
        "machine": machine,
        "peaks": peaks,
        "attention": attention,
        "grouped": grouped,
        "wide": wide_products,
        "norms": norms,
        "model": lambda: model_steps(given.experts, given.seq, given.sequences),
        "update": fp8_update,
    }
    failed = 0
    for name, run in sections.items():
        if given.only and name not in given.only:
            continue
        begun = time.perf_counter()
        try:
            run()
        except Exception:
            failed += 1
            traceback.print_exc(limit=12, file=sys.stdout)
        torch.cuda.empty_cache()
        print(f"-- {name}: {time.perf_counter() - begun:.1f} s", flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(FOUND, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
