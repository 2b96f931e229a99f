"""Figures as a table."""

import os
from collections.abc import Callable
from typing import Any

from moe_runtime.cli.bench_pipeline.summary import TOLERANCE

_MIB = 2**20
Text = Callable[[dict[str, Any]], str]  # what a column says of a line


def describe(result: dict[str, Any]) -> str:
    """The table of one measurement, what it stands on, and who is left out."""
    lines = [*_head(result), "", _titles(result)]
    lines += [_line(line) for line in result["contenders"]]
    lines += [
        "",
        *(f"{name}: {said}" for name, said in result["said"].items()),
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


def _titles(result: dict[str, Any]) -> str:
    first = result["contenders"][0]["contender"]
    titles = (title.format(first=first).rjust(width) for title, width, _ in _COLUMNS)
    return f"{'':{_NAME}}{''.join(titles)}"


def _line(line: dict[str, Any]) -> str:
    return f"{line['contender']:{_NAME}}" + "".join(text(line).rjust(width) for _, width, text in _COLUMNS)


def _number(key: str, digits: int, unit: float = 1) -> Text:
    """A figure of a line; a dash where it is not known."""
    return lambda line: "-" if line[key] is None else f"{line[key] / unit:.{digits}f}"


def _share(key: str) -> Text:
    return lambda line: "-" if line[key] is None else f"{line[key]:.0%}"


def _range(key: str) -> Text:
    return lambda line: f"({line[f'{key}_low']:.2f}-{line[f'{key}_high']:.2f})"


def _equal(line: dict[str, Any]) -> str:
    return f"{max(line['loss_apart'], line['gradients_apart']):.0e}" if line["is_equal"] else "NO"


_NAME = 20
_COLUMNS: tuple[tuple[str, int, Text], ...] = (
    ("seconds", 9, _number("s", 3)),
    ("(range)", 14, _range("s")),
    ("x {first}", 14, _number("ratio", 3)),
    ("(range)", 12, _range("ratio")),
    ("exchange", 10, _number("exchange_s", 2)),
    ("wait", 7, _number("exchange_wait_s", 2)),
    ("hidden", 8, lambda line: f"{line['hidden']:.0%}"),
    ("in pairs", 10, _share("hidden_in_pairs")),
    ("transfer", 10, _number("transfer_wait_s", 2)),
    ("MiB", 8, _number("exchange_bytes", 1, _MIB)),
    ("link MiB", 10, _number("link_bytes", 1, _MIB)),
    ("simulated", 11, _number("simulated", 3)),
    ("CPU s", 8, _number("cpu_s", 2)),
    ("loss", 10, _number("loss", 6)),
    ("equal", 8, _equal),
)


def _explain(result: dict[str, Any]) -> list[str]:
    return [
        "seconds: forward and backward of all microbatches, until the last rank is done; no reduction over",
        "lanes, no optimizer. exchange: seconds in which tokens were under way to experts or back; wait: a",
        "rank stood still for them; hidden: the part of exchange that is not wait; in pairs: the same",
        "within the overlapped pairs of the last round. transfer: a rank stood still for its neighbours",
        "(peers do not say). All of these are means over ranks. MiB: sent in exchanges, by all ranks. link",
        "MiB: sent by a rank over its link, transfers and headers included. simulated: the last step in",
        "the simulator, fed with its own measured costs, over that step as measured. CPU s: of all ranks.",
        "equal: largest relative difference of the loss and of each gradient's norm to those of the first",
        f"contender; NO beyond {TOLERANCE:g}. Peers run the same blocks with a plain all_to_all_single;",
        "their weight gradients are added up in place and, by torch's zero-bubble schedules, deferred as",
        "ours are. DeepSpeed: ZeRO 0, no clipping, no reduction, an optimizer whose step does nothing.",
        f"This machine has {os.cpu_count()} processors; other work kept them {result['load']:.0%} busy.",
    ]
