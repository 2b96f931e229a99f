"""Figures as a table."""

import os
from typing import Any

from moe_runtime.cli.bench_pipeline.summary import TOLERANCE

_MIB = 2**20


def describe(result: dict[str, Any]) -> str:
    """The table of one measurement, what it stands on, and who is left out."""
    lines = [*_head(result), "", _columns(result)]
    lines += [_line(line) for line in result["contenders"]]
    lines += [
        "",
        *(f"left out: {name}: {reason}" for name, reason in result["skipped"].items()),
        *_explain(result),
    ]
    return "\n".join(lines)


def _head(result: dict[str, Any]) -> list[str]:
    shape = result["settings"]
    share = "no share set" if shape["cores"] is None else f"{shape['cores']:g} of a processor for each rank"
    lines = [
        f"pp {shape['pp']} x ep {shape['ep']}, {_where(result)}, {share}; "
        f"{shape['microbatches']} microbatches of {shape['seq_len']} tokens a lane",
        f"{shape['layers']} MoE layers, hidden {shape['hidden']}, {shape['num_experts']} experts of "
        f"{shape['expert_width']}, top-{shape['top_k']}, FP32",
    ]
    found = result.get("one_to_one")
    if found is not None:
        lines.append(
            f"calibrated with {found['contender']}: of a step a rank computes {found['compute_s']:.2f} s, "
            f"exchanges take {found['exchange_s']:.2f} s ({found['link_s']:.2f} s of them bytes over rate): "
            f"{found['ratio']:.2f} to 1"
        )
    return lines


def _where(result: dict[str, Any]) -> str:
    if not result["settings"]["has_links"]:
        return "loopback"
    return f"a namespace each, links of {result['rate_mbit']} Mbit/s each way"


def _columns(result: dict[str, Any]) -> str:
    first = result["contenders"][0]["contender"]
    return (
        f"{'':21}{'seconds':>9} {'(range)':15}{'x ' + first:>13} {'(range)':12}"
        f"{'exchange':>9}{'wait':>7}{'hidden':>8}{'transfer':>9}{'MiB':>8}{'link MiB':>9}{'CPU s':>8}{'loss':>10}{'equal':>9}"
    )


def _line(line: dict[str, Any]) -> str:
    seconds = f"({line['s_low']:.2f}-{line['s_high']:.2f})"
    ratios = f"({line['ratio_low']:.2f}-{line['ratio_high']:.2f})"
    equal = f"{max(line['loss_apart'], line['gradients_apart']):.0e}" if line["is_equal"] else "NO"
    link = line["link_bytes"]
    return (
        f"{line['contender']:21}{line['s']:9.3f} {seconds:15}{line['ratio']:13.3f} {ratios:12}"
        f"{line['exchange_s']:9.2f}{line['exchange_wait_s']:7.2f}{line['hidden']:8.0%}"
        f"{_or_dash(line['transfer_wait_s'], 9, 2)}{line['exchange_bytes'] / _MIB:8.1f}{_or_dash(None if link is None else link / _MIB, 9, 1)}"
        f"{line['cpu_s']:8.2f}{line['loss']:10.6f}{equal:>9}"
    )


def _or_dash(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _explain(result: dict[str, Any]) -> list[str]:
    return [
        "seconds: forward and backward of all microbatches, until the last rank is done; no reduction over",
        "lanes, no optimizer. exchange: seconds in which tokens were under way to experts or back; wait: a",
        "rank stood still for them; hidden: the part of exchange that is not wait. transfer: a rank stood",
        "still for its neighbours (peers do not say). All of these are means over ranks. MiB: sent in",
        "exchanges, by all ranks. link MiB: sent by a rank over its link, transfers and headers included.",
        "CPU s: of all ranks. equal: largest relative difference of the loss and of each gradient's norm to",
        f"those of the first contender; NO beyond {TOLERANCE:g}.",
        "Peers run the same blocks with a plain all_to_all_single; their weight gradients are added up in",
        "place and, by torch's zero-bubble schedules, deferred as ours are. DeepSpeed: ZeRO 0, no clipping,",
        "no reduction, an optimizer whose step does nothing.",
        f"This machine has {os.cpu_count()} processors; other work kept them {result['load']:.0%} busy.",
    ]
