"""Figures as tables."""

from typing import Any

_MIB = 2**20


def describe_exchange(result: dict[str, Any]) -> str:
    """Tables of one exchange measurement, a routing each."""
    shape = result["settings"]
    rate = shape["rate_mbit"]
    where = "loopback" if rate is None else f"links of {rate} Mbit/s each way, MTU 9000"
    head = (
        f"{shape['nodes']} nodes x {shape['ranks_per_node']} ranks, {where}; {shape['num_experts']} experts "
        f"in {shape['num_groups']} groups, top-{shape['top_k']} in {shape['groups_kept']}, "
        f"hidden {shape['hidden']}, {shape['tokens']} tokens a rank"
    )
    lines = [head]
    if result["links"]:
        probe = result["links"]
        lines.append(
            f"links: equal blocks, receives posted first, take {probe['receives_first']:.2f}x the floor; "
            f"by gloo's all_to_all_single {probe['all_to_all']:.2f}x"
        )
    for entry in result["routings"]:
        lines += ["", *_routing(entry, rate is not None)]
    lines += ["", *_explain(rate is not None)]
    return "\n".join(lines)


def _routing(entry: dict[str, Any], has_links: bool) -> list[str]:
    title = (
        f"{entry['routing']}: fullest expert {entry['expert_load']:.2f}x the mean, fullest rank "
        f"{entry['rank_load']:.2f}x"
    )
    columns = f"{'':17}{'dispatch MiB':>13}{'x plain':>9}{'combine MiB':>13}{'x plain':>9}{'exact':>7}"
    if has_links:
        columns += f"{'link':>8}{'head':>7}"
    columns += f"{'seconds':>9}{'x plain':>9} {'(range)':12}"
    if has_links:
        columns += f"{'floor s':>8}{'x floor':>8}"
    if "time_over_raw" in entry["contenders"][0]:
        columns += f"{'x raw':>9} {'(range)':12}"
    return [
        title,
        columns + f"{'CPU s':>7}",
        *(_contender(line, has_links) for line in entry["contenders"]),
        *map(_rebalanced, entry["rebalance"]),
    ]


def _rebalanced(gain: dict[str, Any]) -> str:
    return (
        f"these loads on {gain['nodes']} x {gain['ranks_per_node']} ranks: fullest {gain['before']:.2f}x the "
        f"mean; re-placed with {gain['replicas']} replicas {gain['after']:.2f}x ({gain['form']})"
    )


def _contender(line: dict[str, Any], has_links: bool) -> str:
    text = f"{line['contender']:17}"
    phases = [line[phase] for phase in ("dispatch", "combine") if phase in line]
    for phase in phases:
        moved = phase["inter_bytes"] or phase["intra_bytes"]
        text += f"{moved / _MIB:13.2f}" + (
            f"{phase['inter_ratio']:9.4f}" if "inter_ratio" in phase else f"{'':9}"
        )
    if phases:
        text += f"{'yes' if all(phase['is_as_predicted'] for phase in phases) else 'NO':>7}"
    else:
        text += f"{'':51}"
    if has_links:
        text += f"{_worst(phases, 'link_over_counted'):+8.2%}{_worst(phases, 'header_share'):7.2%}"
    text += f"{line['s']:9.4f}{_ratio(line['time'])}"
    if has_links:
        text += f"{line['floor_s']:8.3f}{line['over_floor']:8.2f}"
    if "time_over_raw" in line:
        text += _ratio(line["time_over_raw"])
    return text + f"{line['cpu_s']:7.2f}"


def _ratio(time: dict[str, float]) -> str:
    span = f"({time['low']:.2f}-{time['high']:.2f})"
    return f"{time['ratio']:9.3f} {span:12}"


def _worst(phases: list[dict[str, Any]], key: str) -> float:
    return float(max((phase[key] for phase in phases), key=abs))


def _explain(has_links: bool) -> list[str]:
    lines = [
        "MiB: bytes between nodes of all ranks by our counters: rows, what travels beside them, and counts",
        "(within the node where there is one node only). exact: they equal the count made from the routing",
        "alone, to the byte. plain: every (token, expert) copy in BF16 by all_to_all_single. CPU s: of all.",
    ]
    if has_links:
        lines += [
            "link: what the interfaces sent beyond our counters, the worse phase. head: Ethernet, IP and TCP",
            "headers in that (66 bytes a packet, acknowledgements included). floor: bytes of the busiest",
            "direction of a link / rate.",
        ]
    else:
        lines.append(
            "raw: the same rows, sizes known, with one gather before and one scatter after; nothing else."
        )
    return lines


def describe_layer(results: list[dict[str, Any]]) -> str:
    """Table of whole-layer figures."""
    lines = [
        f"{'MoE layer, forward + backward':32}{'ranks':>6}{'load':>7}{'ours s':>9}{'deepspeed s':>13}"
        f"{'ratio':>8}  {'(range)':14}{'difference':>11}"
    ]
    for line in results:
        span = f"({line['ratio_low']:.2f}-{line['ratio_high']:.2f})"
        lines.append(
            f"{line['routing']:32}{line['ranks']:6}{line['load']:7.2f}{line['ours_s']:9.4f}"
            f"{line['deepspeed_s']:13.4f}{line['ratio']:7.2f}x  {span:14}{line['difference']:11.1e}"
        )
    lines.append(
        "load: rows of the fullest expert over the mean; ratio: deepspeed.moe (no drop) over ours, in turn"
    )
    return "\n".join(lines)


def describe_overlap(results: list[dict[str, Any]]) -> str:
    """Table of overlap figures."""
    lines = [
        f"{'':18}{'':10}{'exchange s':>11}{'compute s':>11}{'both s':>9}{'x longer':>10}  (range)",
    ]
    for line in results:
        span = f"({line['ratio_low']:.2f}-{line['ratio_high']:.2f})"
        lines.append(
            f"{line['contender']:18}{line['operation']:10}{line['exchange_s']:11.3f}{line['compute_s']:11.3f}"
            f"{line['pair_s']:9.3f}{line['ratio']:10.3f}  {span}"
        )
    lines.append(
        "both: exchange started, products computed, exchange waited for; over the longer of the two alone"
    )
    return "\n".join(lines)
