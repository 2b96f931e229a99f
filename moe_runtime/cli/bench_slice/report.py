"""The measurement of the slice as a table."""

from typing import Any


def describe(result: dict[str, Any]) -> str:
    """What `measure.measure` found, for people."""
    settings, peaks, found = result["settings"], result["peaks"], result["results"]
    per_token = result["flops_per_token"]
    lines = [
        f"a slice of DeepSeek-V3 on {result['device']} (torch {result['torch']}): true widths, 1 dense and "
        f"2 MoE layers of {settings['experts']} experts, top 8, vocabulary {settings['vocab_size']}, "
        f"{result['parameters'] / 1e9:.2f}B parameters",
        f"a step: {settings['microbatches']} microbatches of {settings['sequences']} x {settings['seq_len']} "
        f"tokens, AdamW with FP8 moments; GFLOP a token: {per_token['causal'] / 1e9:.2f} with causal "
        f"attention, {per_token['full'] / 1e9:.2f} with full",
        f"peaks in this run: BF16 {peaks['bf16'] / 1e12:.0f} TFLOP/s, FP8 {peaks['fp8'] / 1e12:.0f} TFLOP/s, "
        f"copy {peaks['copy'] / 1e12:.2f} TB/s",
        "",
        f"{'':6}{'tokens/s':>10}{'step s':>9}{'(range)':>17}{'update s':>10}{'GiB':>7}   MFU causal / full",
    ]
    for name, one in found.items():
        low, high = one["step_s_range"]
        share = one["mfu_of_bf16_peak"]
        lines.append(
            f"{name:6}{one['tokens_per_s']:10.0f}{one['step_s']:9.3f}{f'({low:.3f}-{high:.3f})':>17}"
            f"{one['update_s']:10.3f}{one['peak_gib']:7.1f}   {_pair(share)} of the BF16 peak"
        )
        if "mfu_of_both_peaks" in one:
            lines.append(
                f"{'':62}{_pair(one['mfu_of_both_peaks'])} with FP8 products held against the FP8 peak"
            )
    if {"bf16", "fp8"} <= set(found):
        ratio = found["fp8"]["tokens_per_s"] / found["bf16"]["tokens_per_s"]
        lines.append(f"FP8 over BF16: {ratio:.2f}x tokens/s")
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in result["loss_at_the_same_weights"].items())
    lines.append(f"loss at the same weights: {losses}")
    for role, counts in result["fp8_products"].items():
        lines.append(f"FP8 products, {role}: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    for name, found_kernels in result["kernels"].items():
        lines += ["", *_describe_kernels(name, found_kernels)]
    for name, error in result["failed"].items():
        lines.append(f"\n{name} failed and is left out:\n{error}")
    return "\n".join(lines)


def _describe_kernels(precision: str, found: dict[str, Any]) -> list[str]:
    busy, elapsed = found["ms"], found["elapsed_ms"]
    lines = [
        f"one microbatch in {precision}: {elapsed:.1f} ms, of which kernels {busy:.1f} ms in "
        f"{found['launches']} launches"
    ]
    lines += [f"{ms:9.2f} ms {ms / busy:6.1%}  {kind}" for kind, ms in found["kinds"].items()]
    lines += [f"{k['ms']:9.2f} ms {k['launches']:6}  {k['kind']:17}{k['kernel']}" for k in found["kernels"]]
    lines += [f"{i['ms']:9.2f} ms {i['times']:6}  idle: {i['after']} -> {i['before']}" for i in found["idle"]]
    return lines


def _pair(share: dict[str, float]) -> str:
    return f"{share['causal']:.1%} / {share['full']:.1%}"
