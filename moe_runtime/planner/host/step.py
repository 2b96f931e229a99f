"""A whole step of a run whose ranks are processes of one machine: its program on the cores, then the
optimizer.

After the program every rank reduces its gradients, updates its weights and gathers those of others. It
costs what was calibrated of it, by the weights that a rank holds, and all ranks want a core for it at the
same time. Where links join them, the gradients and the weights cross these too.
"""

import statistics
from dataclasses import dataclass

from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.choose import choose
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.host import Host
from moe_runtime.planner.host.cores import RankTimes, run_on_cores
from moe_runtime.planner.host.walk import GIGA, MICRO, NANO, Routing, Walk
from moe_runtime.planner.reckon.states import held_by
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.passes import unpair

FP32 = 4
# gloo reduces to an owner in a ring and then gathers the parts there; weights come back once.
_CROSSINGS = 3


@dataclass(frozen=True)
class HostStep:
    """A step, in seconds.

    Args:
        step_s: of all.
        program_s: from the first phase to the last of any rank.
        update_s: gradients, weights and record.
        parts: mean over ranks by kind of phase (forward, input_grad, weight_grad, exchange), turns of others
            on a rank's core included, and what ranks stood still for (exchange_wait, message_wait).
        exposed_fraction, bubble_fraction: of the step, as `metrics.jsonl` has them.
    """

    step_s: float
    program_s: float
    update_s: float
    parts: dict[str, float]
    exposed_fraction: float
    bubble_fraction: float


def host_step(config: RunConfig, cluster: Cluster, routing: Routing | None = None) -> HostStep:
    """What a step of a run takes on a host.

    Args:
        config: of the run.
        cluster: with a host.
        routing: how unevenly its tokens choose; None: as in the calibrated run.

    Raises:
        ConfigError: the layout is wrong, the schedule unknown, or the cluster has no host.
    """
    host = cluster.host
    if host is None:
        raise ConfigError(f"cluster {cluster.name}: expected a section host, got none; calibrate one")
    layout = check_layout(config)
    chosen = choose(config.model, config.layout, layout, layout.num_microbatches).program
    program = chosen if config.layout.overlap else unpair(chosen)
    walk = Walk(config, layout, cluster, routing or Routing(host.routing))
    times = run_on_cores(walk.operations(program), host.cores)
    program_s = max(each.end for each in times)
    update_s = _update_s(config, layout, host, program)
    return _told(times, program_s, update_s)


def _update_s(config: RunConfig, layout: ResolvedLayout, host: Host, program: Program) -> float:
    held = [held_by(config.model, layout, rank) for rank in range(layout.pp)]
    crowd = max(1.0, layout.world_size / host.cores)
    mean = statistics.mean(one.weights for one in held)
    seconds = crowd * (host.step.fixed_us * MICRO + mean * host.step.ns_per_weight * NANO)
    if host.link is None:
        return seconds
    replicas = layout.dp * program.num_directions
    others = layout.dp // layout.ep * program.num_directions
    crossing = max(
        (one.weights - one.experts) * (replicas - 1) / replicas + one.experts * (others - 1) / others
        for one in held
    )
    return seconds + _CROSSINGS * FP32 * crossing / (host.link.gbps * GIGA)


def _told(times: list[RankTimes], program_s: float, update_s: float) -> HostStep:
    step_s, ranks = program_s + update_s, len(times)
    parts = dict.fromkeys(("forward", "input_grad", "weight_grad", "exchange"), 0.0)
    for each in times:
        for name, seconds in each.work.items():
            parts[kind_of(name)] += seconds / ranks
    waits = sum(each.waited_exchange for each in times), sum(each.waited_message for each in times)
    parts |= {"exchange_wait": waits[0] / ranks, "message_wait": waits[1] / ranks}
    return HostStep(step_s, program_s, update_s, parts, waits[0] / ranks / step_s, waits[1] / ranks / step_s)


def kind_of(phase: str) -> str:
    """What a phase of the executor counts as."""
    if phase.split("_")[0] in ("dispatch", "combine"):
        return "exchange"
    return {"b": "input_grad", "w": "weight_grad"}.get(phase.rsplit("_", 1)[-1], "forward")
