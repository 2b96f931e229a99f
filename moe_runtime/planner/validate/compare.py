"""Predicted against measured, figure by figure, and what of a run cannot be compared.

step, tokens/s   median of steady steps: the first one and the traced one left out
parts            of the traced step, mean over ranks; a host's processes alone (`planner/host`)
bytes            of the last step: from its own rows, which must agree to the byte, and from statistics
memory           a run records none on the CPU; said so
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

from moe_runtime.config.derive import batch_size_at
from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.host.observed import Observed, phase_samples, program_seconds
from moe_runtime.planner.host.step import HostStep, host_step, kind_of
from moe_runtime.planner.host.walk import Routing
from moe_runtime.planner.reckon.plan import plan
from moe_runtime.planner.trace import Trace
from moe_runtime.planner.validate.bytes import WAYS, exchanged_bytes, expected_bytes


@dataclass(frozen=True)
class Line:
    """One figure.

    Args:
        unit: s, tokens/s, B or of step (a share).
    """

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float | None:
        """Of the prediction, over what was measured; None where that is 0 and the prediction is not."""
        if self.measured == 0:
            return 0.0 if self.predicted == 0 else None
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Comparison:
    """A run beside its plan.

    Args:
        missing: what cannot be compared, and why.
    """

    run: str
    cluster: str
    lines: tuple[Line, ...]
    missing: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        lines = [{**asdict(line), "error": line.error} for line in self.lines]
        return {"run": self.run, "cluster": self.cluster, "lines": lines, "missing": list(self.missing)}


def compare(run: Observed, cluster: Cluster, routing: Routing | None = None) -> Comparison:
    """Plan the run that was made, and hold the plan against it.

    Args:
        routing: how unevenly its tokens choose, on a host; None: as in the calibrated run.

    Raises:
        ConfigError: the run's config cannot be planned on this cluster.
    """
    layout = check_layout(run.config)
    lines: list[Line] = []
    missing: list[str] = []
    if cluster.host is not None:
        step = host_step(run.config, cluster, routing)
        lines += _step_lines(run, step.step_s)
        lines += _parts(run, step, missing)
    else:
        lines += _step_lines(run, plan(run.config, cluster, with_sensitivity=False).here.step.seconds)
        missing.append(f"parts of a step: {cluster.name} has no section host, which says what phases cost")
    lines += _bytes(run, layout, cluster, missing)
    missing.append("memory: the records of a run hold none")
    if batch_size_at(run.config, layout, run.records[-1]["step"] - 1) != run.config.batch.global_batch_size:
        missing.append("a batch ramp is under way: steps are smaller than the one that was planned")
    return Comparison(str(run.folder), cluster.name, tuple(lines), tuple(missing))


def _step_lines(run: Observed, step_s: float) -> list[Line]:
    tokens = run.config.batch.global_batch_size * run.config.batch.seq_len
    return [
        Line("step", "s", step_s, run.step_s),
        Line("throughput", "tokens/s", tokens / step_s, tokens / run.step_s),
    ]


def _parts(run: Observed, step: HostStep, missing: list[str]) -> list[Line]:
    lines = []
    for name, key in (("bubble", "bubble_fraction"), ("exposed exchange", "exposed_comm_fraction")):
        measured = run.median(key)
        if measured is None:
            missing.append(f"{name}: the run recorded no {key}")
        else:
            lines.append(Line(name, "of step", getattr(step, _FRACTIONS[key]), measured))
    if run.trace is None:
        missing.append("phases: the run kept no trace.json (metrics.trace_step)")
        return lines
    traced = next((each for each in run.records if each["step"] == run.trace.step), None)
    times, planned = _measured_parts(run.trace), dict(step.parts)
    if not times["weight_grad"]:  # made within backwards, by schedules and settings that never part them
        for each in (times, planned):
            each["backward"] = each.pop("input_grad") + each.pop("weight_grad")
    lines += [Line(name.replace("_", " "), "s", planned[name], took) for name, took in times.items()]
    if traced is None:
        missing.append(f"update: no record of the traced step {run.trace.step}")
    else:
        lines.append(Line("update", "s", step.update_s, traced["step_s"] - program_seconds(run.trace)))
    return lines


_W = re.compile(r"\d+W\d+'*")  # a deferred weight gradient is an action without phases
_FRACTIONS = {"bubble_fraction": "bubble_fraction", "exposed_comm_fraction": "exposed_fraction"}


def _measured_parts(trace: Trace) -> dict[str, float]:
    """Seconds by kind of phase and by what ranks waited for, mean over ranks."""
    ranks = len(trace.pp_ranks)
    parts = dict.fromkeys(("forward", "input_grad", "weight_grad", "exchange"), 0.0)
    for phase, samples in phase_samples(trace).items():
        parts[kind_of(phase)] += sum(seconds for _, _, seconds in samples) / ranks
    deferred = (event for event in trace.events if event.lane == "action" and _W.fullmatch(event.name))
    parts["weight_grad"] += sum(event.end - event.start for event in deferred) / ranks
    for part, cause in (("exchange_wait", "exchange"), ("message_wait", "transfer")):
        waits = (event for event in trace.events if event.lane == "wait" and event.name == cause)
        parts[part] = sum(event.end - event.start for event in waits) / ranks
    return parts


def _bytes(run: Observed, layout: ResolvedLayout, cluster: Cluster, missing: list[str]) -> list[Line]:
    last = run.records[-1]
    if not all(f"comm_{what}_{way}" in last for what in ("rows", "bytes") for way in WAYS):
        missing.append("bytes: the records hold no rows of exchanges")
        return []
    alone = last["comm_rows_inter"] == 0
    given = run.config.layout.ranks_per_node
    ranks_a_node = given or (layout.world_size if alone else _ranks_a_node(cluster))
    exact = exchanged_bytes(run.config, layout, last, ranks_a_node)
    expected = expected_bytes(run.config, layout, ranks_a_node)
    measured = {way: last[f"comm_bytes_{way}"] for way in WAYS}
    where = {"inter": "between nodes", "intra": "within nodes"}
    return [
        *(Line(f"exchanged {where[way]}, from its rows", "B", exact[way], measured[way]) for way in WAYS),
        *(Line(f"exchanged {where[way]}, even router", "B", expected[way], measured[way]) for way in WAYS),
    ]


def _ranks_a_node(cluster: Cluster) -> int:
    """Ranks that fast links join; one where each has a link of its own."""
    if cluster.host is not None and cluster.host.link is not None:
        return 1
    return cluster.accelerators_a_node
