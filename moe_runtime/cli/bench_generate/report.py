"""The measurement as text."""

from collections.abc import Callable
from typing import Any


def describe(result: dict[str, Any]) -> str:
    """What `measure.measure` found, for people."""
    subject = result["subject"]
    blocks = [
        [
            f"{subject['run']} at step {subject['step']}: {subject['parameters'] / 1e6:.1f}M parameters, "
            f"{subject['layers']} layers, {subject['mtp_depth']} MTP, {subject['dtype']}, trained on "
            f"{subject['trained_context']} tokens a sequence",
            f"prompts of {subject['prompt_tokens']} held-out tokens; {subject['threads']} threads of the "
            f"{subject['device']}, torch {subject['torch']}; medians of {subject['rounds']} rounds (range)",
        ]
    ]
    blocks += [_PARTS[part](found) for part, found in result.items() if part in _PARTS]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _cache(found: dict[str, Any]) -> list[str]:
    agreeing = ", ".join(f"{name} {count}" for name, count in found["agreeing"].items())
    return [
        f"greedy decoding of {found['tokens']} tokens at batch 1",
        *_table(found["results"]),
        f"of the first prompt's {found['tokens']} tokens, so many are ours before one differs: {agreeing}",
    ]


def _drafts(found: dict[str, Any]) -> list[str]:
    return [
        f"sampling at temperature 1, {found['tokens']} tokens at batch 1, drafts by MTP",
        *_table(found["results"]),
    ]


def _table(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'':22}{'tokens/s':>10}{'ratio':>9}"]
    for name, one in results.items():
        low, high = one["ratio_range"]
        lines.append(f"{name:22}{one['tokens_per_s']:10.1f}{one['ratio']:8.2f}x   ({low:.2f} to {high:.2f})")
    return lines


def _acceptance(found: dict[str, Any]) -> list[str]:
    forced = found["teacher_forced"]
    lines = [
        "acceptance of each draft of a pass, with all before it",
        f"{'on held-out text':22}greedy {_shares(forced['greedy'])}, sampled {_shares(forced['sampled'])}, "
        f"equal to the text {_shares(forced['label'])} ({forced['positions']:,} positions)",
    ]
    for name, title in (("sampled", "at temperature 1"), ("greedy", "greedy")):
        one = found[name]
        control, others = one["control"], one["rate_without_repeating"]
        lines += [
            f"{title:22}{_shares(one['rate'])}, {one['tokens_per_pass']:.2f} tokens a pass; "
            f"{one['repeating']:.0%} of continuations end in repetition, "
            f"{'none is left' if others is None else 'the others ' + _shares(others)}",
            f"{'  shuffled drafts':22}{control['rate']:.4f} of {control['trials']:,}, chance "
            f"{control['chance']:.4f} +- {control['standard_error']:.4f} ({control['deviation']:+.1f} "
            "standard errors)",
        ]
    lines.append(
        f"of the held-out text itself, {found['repeating_in_the_text']:.0%} of rows end in repetition"
    )
    return lines


def _shares(shares: list[float]) -> str:
    return "/".join(f"{share:.3f}" for share in shares)


def _size(found: dict[str, Any]) -> list[str]:
    peer = f", transformers {found['transformers']:.0f}" if "transformers" in found else ""
    ours = f"{found['ours']:.0f}, by the formula {found['formula']}"
    return [f"cache, bytes a token and layer: {ours}{peer}"]


def _prefix(found: dict[str, Any]) -> list[str]:
    lines = [f"first token of {found['prompt_tokens']:,} in a new process, {found['hits']:,} found on disk"]
    lines += [
        f"{name:22}{found[key]['first_token_s'] * 1e3:10.1f} ms   process {found[key]['process_s']:.2f} s"
        for name, key in (("read anew", "anew"), ("from the prefix cache", "cached"))
    ]
    low, high = found["ratio_range"]
    return [
        *lines,
        f"{found['ratio']:.2f}x sooner ({low:.2f} to {high:.2f}); same token: {found['same_token']}",
    ]


def _against(found: dict[str, Any]) -> list[str]:
    lines = [f"decoding of {found['tokens']} tokens a row after a context, this checkpoint against another"]
    lines += [
        f"{name:22}{one['run']} at step {one['step']}: {one['attention']}, {one['parameters'] / 1e6:.2f}M "
        f"parameters, cache {one['cache_bytes_per_token']:,} bytes a token"
        for name, one in found["checkpoints"].items()
    ]
    lines.append(f"{'context':>9}{'batch':>7}{'this tok/s':>13}{'against tok/s':>15}{'ratio':>9}")
    for shape in found["shapes"]:
        this, other = (shape["results"][name] for name in ("this", "against"))
        low, high = this["ratio_range"]
        lines.append(
            f"{shape['context']:9,}{shape['batch']:7}{this['tokens_per_s']:13.1f}{other['tokens_per_s']:15.1f}"
            f"{this['ratio']:8.2f}x   ({low:.2f} to {high:.2f})"
        )
    return lines


_PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "cache": _cache,
    "drafts": _drafts,
    "acceptance": _acceptance,
    "size": _size,
    "prefix": _prefix,
    "against": _against,
}
