"""What a cluster file says further if its accelerators are processes that share the cores of one machine.

Rates of products come from the same curves as everywhere. Beside them every phase of a block has a time of
its own, of two kinds, both calibrated from short runs (`planner/host/calibrate.py`):

    fixed_us    whatever the size: the framework's way to some dozens of small kernels
    moved       seconds for each byte that its kernels read and write between products: elementwise work,
                and memory that is taken and given back
"""

from pydantic import PositiveFloat, PositiveInt

from moe_runtime.config.section import NonNegative, Section


class PhaseCost(Section):
    """Of one phase of the executor, such as `attend` or `experts_w`."""

    fixed_us: NonNegative
    ns_per_byte: NonNegative = 0.0


class StepCost(Section):
    """Of what a step does outside of its program: gradients reduced, weights updated, a record written."""

    fixed_us: NonNegative
    ns_per_weight: NonNegative = 0.0


class HostLink(Section):
    """What each rank sends over, where every rank has a limited link of its own (a network namespace)."""

    gbps: PositiveFloat
    latency_us: NonNegative = 0.0


class Host(Section):
    """Processes of one machine.

    Args:
        cores: that they share.
        item_bytes: of an activation, 4 where a run is FP32.
        phases: by the executor's word for each.
        exchange: of a dispatch or a combine, on each rank, in the background; bytes are those of its rows.
        message: of a boundary tensor, the same.
        step: by weights that a rank holds.
        jitter: standard deviation of the time of a phase from one time to the next, over its mean: ranks that
            exchange wait for the one that is late.
        routing: standard deviation of the rows of one expert in one microbatch, over their mean, in the run
            that was calibrated on: a fact of its data rather than of the machine.
        link: between ranks; none where nothing but the cores limits what they send each other.
    """

    cores: PositiveInt
    item_bytes: PositiveInt = 4
    phases: dict[str, PhaseCost]
    exchange: PhaseCost
    message: PhaseCost
    step: StepCost
    jitter: NonNegative = 0.0
    routing: NonNegative = 0.0
    link: HostLink | None = None
    source: str = ""
