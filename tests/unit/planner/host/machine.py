"""A host with figures that were made up, to be found again, and runs as it would have recorded them."""

from pathlib import Path

from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.host import PhaseCost, StepCost
from moe_runtime.planner.host.calibrate import machine
from moe_runtime.planner.host.observed import Observed
from moe_runtime.planner.host.phases import phase_seconds, phase_shape
from moe_runtime.planner.host.probes import Probes
from moe_runtime.planner.reckon.states import held_by
from moe_runtime.planner.trace import Event, Trace
from moe_runtime.schedule import build

PHASES = ("embed", "dense", "attend", "shared", "experts", "merge", "norm", "loss", "mtp_in")
EXCHANGE = PhaseCost(fixed_us=300, ns_per_byte=0.5)
UPDATE = StepCost(fixed_us=2000, ns_per_weight=10)

PROBES = Probes(
    products={kind: {64: 5e10, 512: 8e10} for kind in ("dense", "groups", "weight")},
    attention={"forward": {128: 2e10, 512: 4e10}, "backward": {128: 3e10, 512: 5e10}},
    copy_bytes_s=1e10,
    message_s={1000: 1e-4, 1001000: 6e-4},
    cores=2,
)


def made_up() -> Cluster:
    """The cluster that runs are made on."""
    base = machine(PROBES, "made-up", 4)
    assert base.host is not None
    costs = {}
    for place, name in enumerate(PHASES):
        for way, factor in (("", 1.0), ("_b", 2.0), ("_w", 1.5)):
            costs[name + way] = PhaseCost(fixed_us=100 * factor + 10 * place, ns_per_byte=0.1 * factor)
    for name in ("dispatch", "combine", "dispatch_b", "combine_b"):
        costs[name] = PhaseCost(fixed_us=50)
    update = {"phases": costs, "exchange": EXCHANGE, "step": UPDATE}
    return base.model_copy(update={"host": base.host.model_copy(update=update)})


def run_of(overrides: tuple[str, ...], cluster: Cluster, apart: bool) -> Observed:
    """A run that recorded what the cluster says; without overlap weight gradients are within backwards."""
    config = load_config("calibrate", [*overrides, f"layout.overlap={'false' if apart else 'true'}"])
    layout = check_layout(config)
    host = cluster.host
    assert host is not None
    held = held_by(config.model, layout, 0).weights
    rest = host.step.fixed_us * 1e-6 + held * host.step.ns_per_weight * 1e-9
    trace = _trace(config, cluster, apart)
    program_s = max(event.end for event in trace.events)
    records = tuple({"step": step, "step_s": program_s + rest} for step in range(1, 5))
    return Observed(Path("made up"), config, records, trace)


def _trace(config: RunConfig, cluster: Cluster, apart: bool) -> Trace:
    events, end = [], 0.0
    assert cluster.host is not None
    shape = phase_shape(config)
    for phase in cluster.host.phases:
        seconds = phase_seconds(phase, config.model, shape, cluster)
        weights = phase.removesuffix("_b") + "_w"
        if apart and phase.endswith("_w"):
            continue
        if apart and phase.endswith("_b") and weights in cluster.host.phases:
            seconds += phase_seconds(weights, config.model, shape, cluster)
        if not apart and phase == "shared_w":  # the experts' phase makes these too
            seconds = 0.0
        if not apart and phase == "experts_w":
            seconds += phase_seconds("shared_w", config.model, shape, cluster)
        events += [Event(rank, "phase", f"{phase} layers.3", end, end + seconds) for rank in range(2)]
        end += seconds
    cost = cluster.host.exchange
    row_bytes = config.model.hidden_size * 4
    flight = cost.fixed_us * 1e-6 + shape.rows * row_bytes * cost.ns_per_byte * 1e-9
    events += [Event(rank, "exchange", "dispatch layers.3", 0.0, flight) for rank in range(2)]
    events += [Event(rank, "action", "0F0", 0.0, end) for rank in range(2)]
    return Trace(tuple(events), build("single", 1, 1), (0, 0), step=3)
