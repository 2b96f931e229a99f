"""What every rank of a run does in one step, as operations on the cores of one machine.

The same lists of phases that the executor runs, in its order: a forward, a backward with or without its
    weight
gradients, and the two of an overlapped pair by the same table. Where a phase reads what an exchange brings,
the rank waits for it; without overlap it waits at once.

Rows are not spread evenly: an expert has more of them in one microbatch than in another, and the ranks of a
    group
wait for the one with the most. So for every layer and microbatch each rank draws its part, with the standard
deviation that routing has (`Routing.variation`), always from the same seed. So
does every phase, for none takes quite the same time twice.
"""

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.host.cores import Need, Operation, Send, Start, Wait, Work
from moe_runtime.planner.host.phases import phase_seconds, phase_shape
from moe_runtime.planner.reckon.parts import StageParts, stage_parts
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program, actions_of, is_transfer
from moe_runtime.schedule.interleave import interleave
from moe_runtime.schedule.products import Product, made_by, needed_by, user_of

GIGA, MICRO, NANO = 1e9, 1e-6, 1e-9


@dataclass(frozen=True)
class Routing:
    """How unevenly tokens choose.

    Args:
        variation: standard deviation of the rows of one expert in one microbatch, over their mean.
    """

    variation: float = 0.0

    def of_rank(self, local_experts: int, ep: int) -> float:
        """The same of all rows of a rank, whose parts sum to the whole: experts vary independently."""
        return self.variation * (max(ep - 1, 0) / ep / local_experts) ** 0.5


@dataclass(frozen=True)
class Step:
    """A phase by its label and layer, as the table of pairs wants them."""

    label: str
    layer: str
    micro: tuple[int, int]  # direction and microbatch


class Walk:
    """Turns rows of a program into operations.

    Args:
        config: the run.
        layout: what its layout resolves to.
        cluster: with a host.
        routing: of the run's data.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: ResolvedLayout,
        cluster: Cluster,
        routing: Routing,
    ) -> None:
        assert cluster.host is not None, "a walk needs a host"
        self.config, self.layout, self.cluster, self.host = config, layout, cluster, cluster.host
        model = config.model
        self.shape = phase_shape(config)
        self.row_bytes = model.hidden_size * self.host.item_bytes
        self._parts = stage_parts(model, layout)
        self._layers = layout.layers
        self._variation = routing.of_rank(self.shape.local_experts, layout.ep)
        self._seconds: Callable[[str], float] = cache(self._phase_seconds)

    def operations(self, program: Program) -> list[list[Operation]]:
        """Of every global rank, the lanes of a pipeline rank together."""
        return [
            list(self._rank(program, pp_rank, lane))
            for pp_rank in range(self.layout.pp)
            for lane in range(self.layout.dp)
        ]

    def _rank(self, program: Program, pp_rank: int, lane: int) -> Iterator[Operation]:
        rank = pp_rank * self.layout.dp + lane
        for entry in program.rows[pp_rank]:
            if is_transfer(entry):
                continue
            for action in actions_of(entry):
                need = needed_by(action, program.num_stages)
                if need is not None and self._is_remote(program, need, pp_rank):
                    yield Need((need, lane))
            yield from self._entry(entry, rank, lane)
            for action in actions_of(entry):
                product = made_by(action)
                user = None if product is None else user_of(program, product)
                if user is not None and user != pp_rank:
                    yield self._send((product, lane), user * self.layout.dp + lane)

    def _is_remote(self, program: Program, need: Product, pp_rank: int) -> bool:
        return program.placement[need.direction][need.stage] != pp_rank

    def _send(self, key: Hashable, peer: int) -> Send:
        cost, num_bytes = self.host.message, self.shape.tokens * self.row_bytes
        background = cost.fixed_us * MICRO + num_bytes * cost.ns_per_byte * NANO
        return Send(key, peer, background, self._link_s(num_bytes))

    def _entry(self, entry: Entry, rank: int, lane: int) -> Iterator[Operation]:
        if isinstance(entry, Overlap):
            ahead = self.forward(entry.forward)
            return self._steps(interleave(ahead, self.backward(entry.backward, "spread")), rank)
        match entry.kind:
            case Kind.FORWARD:
                return self._steps(self.forward(entry), rank)
            case Kind.INPUT_GRAD:
                return self._steps(self.backward(entry, "none"), rank)
            case Kind.WEIGHT_GRAD:
                return self._steps(self.backward(entry, "only"), rank)
        if self.config.layout.overlap:
            return self._steps(interleave((), self.backward(entry, "spread")), rank)
        return self._steps(self.backward(entry, "now"), rank)

    def forward(self, action: Action) -> list[Step]:
        """Steps of a forward."""
        micro = (action.direction, action.microbatch)
        return [Step(label, layer, micro) for label, layer in self._phases(action.stage)]

    def backward(self, action: Action, weights: str) -> list[Step]:
        """Steps of a backward; weight gradients beside (spread, now), left out (none), or alone (only)."""
        micro, steps = (action.direction, action.microbatch), []
        for label, layer in _backward_order(self._phases(action.stage)):
            exchange = label in ("dispatch", "combine")
            if weights != "only":
                steps.append(Step(f"{label}_b", layer, micro))
            if weights != "none" and not exchange:
                steps.append(Step(f"{label}_w", layer, micro))
        return steps

    def _phases(self, stage: int) -> list[tuple[str, str]]:
        """(label, layer) of a stage's forward."""
        model, part = self.config.model, self._parts[stage]
        phases = [("embed", "embed")] if part.embedding else []
        routed = False
        for number in self._layers[stage]:
            layer = f"layers.{number}"
            routed = number >= model.num_dense_layers
            phases += self._moe(layer) if routed else [("dense", layer)]
        if routed:
            phases.append(("merge", phases[-1][1]))
        return phases + (self._head(part) if part.head else [])

    def _moe(self, layer: str) -> list[tuple[str, str]]:
        shared = ["shared"] if self.config.model.num_shared_experts else []
        return [(label, layer) for label in ("attend", "dispatch", *shared, "experts", "combine")]

    def _head(self, part: StageParts) -> list[tuple[str, str]]:
        phases = [("norm", "norm"), ("loss", "head")]
        for depth in range(part.mtp):
            name = f"mtp.{depth}"
            phases += [("mtp_in", name), *self._moe(f"{name}.block"), ("merge", f"{name}.block")]
            phases += [("norm", name), ("loss", name)]
        return phases

    def _steps(self, steps: Sequence[Step], rank: int) -> Iterator[Operation]:
        """Operations of steps in order; at the end of an entry every exchange of it has been waited for."""
        flying: dict[str, Hashable] = {}  # what a later phase will wait for, by the slot that it reads
        for step in steps:
            for slot in self._reads(step):
                if slot in flying:
                    yield Wait(flying.pop(slot))
            factor = self._part(rank, step) if step.label.startswith("experts") else 1.0
            late = 1.0 + self.host.jitter * random.Random(f"{rank} {step}").gauss(0.0, 1.0)
            yield Work(self._seconds(step.label) * factor * max(late, 0.1), step.label)
            name = step.label.removesuffix("_b")
            if name not in ("dispatch", "combine"):
                continue
            if self.layout.ep == 1:
                yield Work(self._local_exchange(), step.label)
                continue
            key: Hashable = (rank // self.layout.ep, step.label, step.layer, step.micro)
            yield self._start(key, rank)
            if self.config.layout.overlap:
                flying[_slot(step)] = key
            else:
                yield Wait(key)
        for key in flying.values():
            yield Wait(key)

    def _reads(self, step: Step) -> list[str]:
        """Slots that a phase reads and an exchange may still bring."""
        half = "b" if step.label.endswith("_b") else "f"
        if step.label in ("experts", "experts_b"):
            return [f"{half} rows {step.layer}"]
        if step.label == "attend_b":
            return [f"b ffn_in {step.layer}"]
        if step.label in ("attend", "dense", "merge"):
            return ["f routed"]
        return []

    def _start(self, key: Hashable, rank: int) -> Start:
        ep, cost = self.layout.ep, self.host.exchange
        first = rank // ep * ep
        num_bytes = self.shape.rows * self.row_bytes
        background = cost.fixed_us * MICRO + num_bytes * cost.ns_per_byte * NANO
        sent = num_bytes * (ep - 1) / ep
        return Start(key, tuple(range(first, first + ep)), background, self._link_s(sent))

    def _link_s(self, num_bytes: float) -> float:
        """Of a message on its own."""
        link = self.host.link
        return 0.0 if link is None else num_bytes / (link.gbps * GIGA) + link.latency_us * MICRO

    def _local_exchange(self) -> float:
        """Rows put in order on their own rank: read and written."""
        moved = 2 * self.shape.rows * self.row_bytes
        return moved / (self.cluster.accelerator.memory_gbps.central * GIGA)

    def _part(self, rank: int, step: Step) -> float:
        """Rows of a rank over the mean, alike in forward and backward of a microbatch."""
        if self.layout.ep == 1:
            return 1.0
        parts = self._parts_of(rank // self.layout.ep, step.layer, step.micro)
        return parts[rank % self.layout.ep]

    def _parts_of(self, group: int, layer: str, micro: tuple[int, int]) -> list[float]:
        draw = random.Random(f"{group} {layer} {micro}")
        ep = self.layout.ep
        raw = [draw.gauss(0.0, 1.0) for _ in range(ep)]
        mean = sum(raw) / ep
        scale = (ep / (ep - 1)) ** 0.5 * self._variation  # taking the mean off leaves (ep - 1) / ep
        return [max(0.0, 1.0 + scale * (value - mean)) for value in raw]

    def _phase_seconds(self, label: str) -> float:
        return phase_seconds(label, self.config.model, self.shape, self.cluster, self.config.recompute)


def _slot(step: Step) -> str:
    if step.label == "dispatch_b":
        return f"b ffn_in {step.layer}"
    if step.label == "combine":
        return "f routed"
    return f"{'b' if step.label.endswith('_b') else 'f'} rows {step.layer}"


def _backward_order(phases: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Reversed, but the shared expert before the routed ones, as the stage runner has it."""
    order: list[tuple[str, str]] = []
    for phase in reversed(phases):
        follows = phase[0] == "shared" and bool(order) and order[-1][0] == "experts"
        order.insert(len(order) - 1 if follows else len(order), phase)
    return order
