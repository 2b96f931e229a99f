"""A cluster file of this machine, from probes and short runs of one layout and shape.

    probes     rates of products and attention, copies, messages; no run
    floor      a run whose model is so small that only the framework is left: what phases cost whatever the
        size
    shape      a run of the layout and shape that is calibrated on: what bytes cost, phase by phase

Both runs are traced, with one rank for each core, and are made twice: without overlap, where each exchange
    stands
alone, and with it, where weight gradients are phases of their own. There background threads take cores from
phases, so of that run only the *share* is taken that weight gradients have in a backward; seconds are those
of the run without.

What this gives up: one shape cannot tell a wrong rate of products from a wrong time a byte. Rates come from
    probes,
so what these miss (caches, memory that is given back to the system) is all counted by the byte, and is
extrapolated by the byte.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_runtime.config.layout import check_layout
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.host import PhaseCost, StepCost
from moe_runtime.planner.host.observed import (
    Observed,
    exchange_seconds,
    phase_samples,
    program_seconds,
    routing_variation,
)
from moe_runtime.planner.host.phases import amount, kernels_of, phase_shape
from moe_runtime.planner.host.probes import Probes
from moe_runtime.planner.host.walk import GIGA, MICRO, NANO
from moe_runtime.planner.reckon.kernel_time import TERA
from moe_runtime.planner.reckon.kernels import Product
from moe_runtime.planner.reckon.states import held_by
from moe_runtime.planner.reckon.wire import ITEM_BYTES
from moe_runtime.planner.trace import Trace


@dataclass(frozen=True)
class Pair:
    """The same run without overlap and with it."""

    apart: Observed
    together: Observed


def calibrate(probes: Probes, floor: Pair, shape: Pair, name: str = "local") -> Cluster:
    """Make a cluster file.

    Raises:
        ConfigError: a run has no trace, or not one rank for each core.
    """
    for run in (floor.apart, floor.together, shape.apart, shape.together):
        _check(run, probes.cores)
    config = shape.apart.config
    base = machine(probes, name, ITEM_BYTES[config.precision])
    smallest, phases = _phase_seconds(floor), _phase_seconds(shape)
    assert base.host is not None
    costs = {
        phase: _phase_cost(phase, seconds, min(smallest.get(phase, seconds), seconds), shape.apart, base)
        for phase, seconds in phases.items()
    }
    ep = config.layout.ep
    variation = routing_variation(_trace(shape.apart), ep, config.model.num_experts // ep)
    host = base.host.model_copy(
        update={
            "phases": costs,
            "exchange": _exchange(floor, shape, base),
            "step": _update(floor, shape),
            "routing": round(variation, 4),
            "jitter": _jitter(_trace(shape.apart)),
        }
    )
    return base.model_copy(update={"host": host})


def _check(run: Observed, cores: int) -> None:
    _trace(run)
    if check_layout(run.config).world_size > cores:
        raise ConfigError(
            f"{run.folder}: expected a run of at most {cores} ranks, one for each core, got "
            f"{run.config.layout.pp} x {run.config.layout.dp}; calibrate with fewer"
        )


def _trace(run: Observed) -> Trace:
    if run.trace is None:
        raise ConfigError(f"{run.folder}: expected a trace.json; set metrics.trace_step and run it again")
    return run.trace


def _phase_seconds(pair: Pair) -> dict[str, float]:
    """Seconds of each phase, weight gradients apart."""
    apart, together = _seconds(_trace(pair.apart)), _seconds(_trace(pair.together))
    _part_weight_grads(together, pair.apart)
    found = {}
    for phase, seconds in apart.items():
        weight = phase.removesuffix("_b") + "_w"
        if not phase.endswith("_b") or weight not in together:
            found[phase] = seconds
            continue
        share = together[weight] / (together[phase] + together[weight])
        found[phase], found[weight] = seconds * (1 - share), seconds * share
    return found


def _part_weight_grads(seconds: dict[str, float], run: Observed) -> None:
    """With overlap `experts_w` makes those of the shared expert too: give each its own, by operations."""
    if "shared_w" not in seconds:
        return
    flops = {}
    for phase in ("experts_w", "shared_w"):
        kernels = kernels_of(phase, run.config.model, phase_shape(run.config), run.config.recompute)
        flops[phase] = sum(kernel.flops for kernel in kernels if isinstance(kernel, Product))
    both, whole = seconds["experts_w"] + seconds["shared_w"], sum(flops.values())
    seconds |= {phase: both * own / whole for phase, own in flops.items()}


def _seconds(trace: Trace) -> dict[str, float]:
    """Usual seconds of each phase."""
    return {
        phase: usual([seconds for _, _, seconds in samples])
        for phase, samples in phase_samples(trace).items()
    }


def usual(samples: Sequence[float]) -> float:
    """Mean without the tenth at either end: rows and ranks that vary count, an interrupted one does not."""
    return statistics.mean(_middle(samples))


def _middle(samples: Sequence[float]) -> list[float]:
    cut = len(samples) // 10
    return sorted(samples)[cut : len(samples) - cut]


def _jitter(trace: Trace) -> float:
    """How much phases vary, experts aside, for their rows do; those of a millisecond or more."""
    squares = []
    for phase, samples in phase_samples(trace).items():
        seconds = _middle([each for _, _, each in samples])
        mean = statistics.mean(seconds)
        if mean >= 1e-3 and not phase.startswith(("experts", "dispatch", "combine")):
            squares += [(each / mean - 1) ** 2 for each in seconds]
    return float(statistics.mean(squares) ** 0.5) if squares else 0.0


def _phase_cost(phase: str, seconds: float, fixed: float, run: Observed, base: Cluster) -> PhaseCost:
    """What is left of a phase beside its fixed part and its products, by the byte."""
    assert base.host is not None
    kernels = kernels_of(phase, run.config.model, phase_shape(run.config), run.config.recompute)
    due = amount(kernels, base, base.host)
    left = max(0.0, seconds - fixed - due.seconds)
    if due.bytes == 0:
        return PhaseCost(fixed_us=seconds / MICRO)
    return PhaseCost(fixed_us=fixed / MICRO, ns_per_byte=left / due.bytes / NANO)


def _exchange(floor: Pair, shape: Pair, base: Cluster) -> PhaseCost:
    assert base.host is not None
    config = shape.apart.config
    if config.layout.ep == 1:
        raise ConfigError(
            f"{shape.apart.folder}: expected layout.ep above 1, got 1: no exchange to calibrate"
        )
    small, large = (usual(exchange_seconds(_trace(pair.apart), config.layout.ep)) for pair in (floor, shape))
    num_bytes = phase_shape(config).rows * config.model.hidden_size * base.host.item_bytes
    return PhaseCost(fixed_us=small / MICRO, ns_per_byte=max(0.0, large - small) / num_bytes / NANO)


def _update(floor: Pair, shape: Pair) -> StepCost:
    """The rest of a step, by weights."""
    small, large = (_rest(pair.apart) for pair in (floor, shape))
    config = shape.apart.config
    held = held_by(config.model, check_layout(config), 0).weights
    return StepCost(fixed_us=small / MICRO, ns_per_weight=max(0.0, large - small) / held / NANO)


def _rest(run: Observed) -> float:
    """Seconds of the traced step outside of its program."""
    trace = _trace(run)
    traced = next(record for record in run.records if record["step"] == trace.step)
    return float(traced["step_s"]) - program_seconds(trace)


def machine(probes: Probes, name: str, item_bytes: int) -> Cluster:
    """What probes alone say, in the form of every other cluster file."""
    products = probes.products
    peak = max(rate for rates in products.values() for rate in rates.values())
    fixed, each_byte = probes.message()

    def curve(rates: Mapping[int, float]) -> dict[str, object]:
        points = [{"size": size, "value": round(rate / peak, 4)} for size, rate in sorted(rates.items())]
        return {"points": points, "source": "probe on this machine"}

    bandwidth = probes.copy_bytes_s / GIGA
    latency, none = round(fixed / MICRO, 1), _known(0, "left out: one machine, for a short run")
    loopback = {"gbps": round(1 / max(each_byte * GIGA, 1e-3), 3), "latency_us": latency, "source": "probe"}
    return Cluster.model_validate(
        {
            "name": name,
            "accelerator": {
                "name": "one core of this machine",
                "memory_gb": 8,
                "memory_gbps": _known(round(bandwidth, 3), "probe: rows put into another order"),
                "peak_tflops": {"bf16": round(peak / TERA, 5), "fp32": round(peak / TERA, 5)},
                "multiprocessors": 1,
                "source": "FP32 products on one core, all cores at once: the best. Memory is assumed",
            },
            "accelerators_a_node": probes.cores,
            "fast": loopback,
            "network": loopback,
            "kernels": {
                "bf16": {
                    "dense": curve(products["dense"]),
                    "groups": curve(products["groups"]),
                    "weight": curve(products["weight"]),
                    "weight_groups": curve(products["weight"]),
                },
                "attention_forward": curve(probes.attention["forward"]),
                "attention_backward": curve(probes.attention["backward"]),
                "memory_bound": _known(1.0, "by definition: memory_gbps is what such work reaches here"),
                "launch_us": _known(5.0, "assumed; a host's step has it in the fixed part of its phases"),
            },
            "communication": {
                "multiprocessors": _known(0, "an exchange takes cores, which the host section counts"),
                "start_us": _known(latency, "probe: a small message"),
            },
            "failures": dict.fromkeys(("per_node_day", "restart_minutes", "save_s"), none),
            "price_usd_hour": none,
            "host": {
                "cores": probes.cores,
                "item_bytes": item_bytes,
                "phases": {},
                "exchange": {"fixed_us": 0},
                "message": {"fixed_us": fixed / MICRO, "ns_per_byte": each_byte / NANO},
                "step": {"fixed_us": 0},
                "source": "probe and short runs on this machine",
            },
        }
    )


def _known(value: float, source: str) -> dict[str, object]:
    """A figure without a range, as an `Estimate` is written."""
    return {"low": value, "central": value, "high": value, "source": source}
