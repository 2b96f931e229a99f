"""A whole step of a run whose ranks are processes of one machine: its program on the cores, then the
optimizer.

After the program every rank reduces its gradients, updates its weights and gathers those of others. It
costs what was calibrated of it, by the weights that a rank holds, and all ranks want a core for it at the
same time. Where links join them, the gradients and the weights cross these too.
"""

import statistics
from dataclasses import dataclass

from moe_runtime.config.counts import attention_weights, expert_weights, mtp_glue
from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.choose import choose
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.host.cores import RankTimes, run_on_cores
from moe_runtime.planner.host.walk import GIGA, MICRO, NANO, Links, Routing, Walk
from moe_runtime.planner.reckon.parts import StageParts, stage_parts, stages_of
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.passes import unpair

FP32 = 4


@dataclass(frozen=True)
class HostStep:
    """A step, in seconds.

    Args:
        step_s: of all.
        program_s: from the first phase to the last of any rank.
        update_s: gradients, weights and record.
        parts: mean over ranks by kind of phase (forward, input_grad, weight_grad, exchange), turns of
            others on a
            rank's core included, and what ranks stood still for (exchange_wait, message_wait).
        exposed_fraction, bubble_fraction: of the step, as `metrics.jsonl` has them.
    """

    step_s: float
    program_s: float
    update_s: float
    parts: dict[str, float]
    exposed_fraction: float
    bubble_fraction: float


@dataclass(frozen=True)
class HeldWeights:
    """Weights of one rank, in numbers: those that every lane holds, and its part of the experts."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.experts


def host_step(
    config: RunConfig, cluster: Cluster, routing: Routing | None = None, links: Links | None = None
) -> HostStep:
    """What a step of a run takes on a host.

    Args:
        config: of the run.
        cluster: with a host.
        routing: how unevenly its tokens choose; None: evenly.
        links: between its ranks; None: one machine.

    Raises:
        ConfigError: the layout is wrong, the schedule unknown, or the cluster has no host.
    """
    host = cluster.host
    if host is None:
        raise ConfigError(f"cluster {cluster.name}: expected a section host, got none; calibrate one")
    layout = check_layout(config)
    chosen = choose(config.model, config.layout, layout, layout.num_microbatches).program
    program = chosen if config.layout.overlap else unpair(chosen)
    walk = Walk(config, layout, cluster, routing or Routing(), links)
    times = run_on_cores(walk.operations(program), host.cores)
    program_s = max(each.end for each in times)
    update_s = _update_s(config, layout, cluster, program, links)
    return _told(times, program_s, update_s)


def _update_s(
    config: RunConfig, layout: ResolvedLayout, cluster: Cluster, program: Program, links: Links | None
) -> float:
    host = cluster.host
    assert host is not None
    held = [held_weights(config.model, layout, rank) for rank in range(layout.pp)]
    crowd = max(1.0, layout.world_size / host.cores)
    mean = statistics.mean(each.total for each in held)
    seconds = crowd * (host.step.fixed_us * MICRO + mean * host.step.ns_per_weight * NANO)
    if links is None:
        return seconds
    replicas = layout.dp * program.num_directions
    others = layout.dp // layout.ep * program.num_directions
    crossing = max(
        each.dense * (replicas - 1) / replicas + each.experts * (others - 1) / others for each in held
    )
    return seconds + 2 * FP32 * crossing / (links.gbps * GIGA)


def held_weights(model: ModelConfig, layout: ResolvedLayout, pp_rank: int) -> HeldWeights:
    """Weights of each rank of a pipeline rank."""
    parts = stage_parts(model, layout)
    stages = stages_of(layout, pp_rank)
    shares = layout.num_stages > 1 and 0 in stages and layout.num_stages - 1 in stages
    dense = sum(_dense(model, parts[stage]) for stage in stages)
    if shares:  # one embedding serves the first and the last stage
        dense -= model.vocab_size * model.hidden_size * bool(model.mtp_depth)
    moe = sum(parts[stage].moe + parts[stage].mtp for stage in stages)
    return HeldWeights(dense, moe * (model.num_experts // layout.ep) * expert_weights(model))


def _dense(model: ModelConfig, part: StageParts) -> int:
    hidden, table = model.hidden_size, model.vocab_size * model.hidden_size
    block = attention_weights(model) + 2 * hidden
    moe = block + model.num_shared_experts * expert_weights(model) + model.num_experts * hidden
    held = part.dense * (block + 3 * hidden * model.ffn_size) + (part.moe + part.mtp) * moe
    held += part.mtp * mtp_glue(model) + part.embedding * table + part.head * (table + hidden)
    return held + (table if part.mtp and not part.embedding else 0)


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
