"""Bytes that a rank sends in a step, by purpose and kind of link.

    dispatch, combine, backwards   once a microbatch and MoE layer: rows of `exchange`, records of `wire`
    counts                         the messages that precede a dispatch
    pipeline                       activations to the next stage, gradients to the one before
    gradients                      FP32, to the owners of their partitions
    parameters                     updated weights, from their owners

What is sent is counted, so the sum over ranks counts every byte once. Where routing is known, `routed` counts
exchanges exactly; here they follow from how many places a token reaches (`exchange`), measured or reckoned.

Ranks lie node by node: world = pp x dp, data parallel ranks fastest. A sum over n ranks is reckoned as rings
through all of its nodes, one for each rank of a node: every rank then sends (n - 1) / n of the bytes, and of
these leaves the node what one in so many ranks of the group there sends. That is what NCCL's rings do; trees
send as much and are not told apart. Our own CPU runs reduce through gloo, which sends more.

Evaluation, sampling, the few bytes of norms and verdicts, and exchanges in rounds are not counted.
"""

from dataclasses import asdict, dataclass, fields

from moe_runtime.config.counts import attention_weights, expert_weights, mtp_glue
from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.planner.reckon.exchange import Spread, exchange, uniform_spread
from moe_runtime.planner.reckon.parts import StageParts, stage_parts, stages_of
from moe_runtime.planner.reckon.wire import (
    ITEM_BYTES,
    OPERATIONS,
    Operation,
    RowFormat,
    dispatcher_kind,
    row_format,
)

FP32 = 4


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends, over fast links within nodes and over the network between them."""

    fast: float = 0.0
    network: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.fast + other.fast, self.network + other.network)

    def times(self, count: float) -> "Sent":
        """So often."""
        return Sent(self.fast * count, self.network * count)


@dataclass(frozen=True)
class StepTraffic:
    """One step of one pipeline rank, in the mean over its lanes."""

    dispatch: Sent
    combine: Sent
    combine_backward: Sent
    dispatch_backward: Sent
    counts: Sent
    pipeline: Sent
    gradients: Sent
    parameters: Sent

    @property
    def total(self) -> Sent:
        """All purposes together."""
        return sum((getattr(self, field.name) for field in fields(self)), Sent())

    def to_plain(self) -> dict[str, dict[str, float]]:
        """For JSON: {purpose: {fast, network}}, bytes, with `total`."""
        return {**asdict(self), "total": asdict(self.total)}


def step_traffic(
    config: RunConfig, layout: ResolvedLayout, rank: int, ranks_a_node: int, spread: Spread | None = None
) -> StepTraffic:
    """What a pipeline rank sends in one step after the batch ramp.

    Args:
        rank: of the pipeline.
        ranks_a_node: that fast links join; see `domain_ranks`.
        spread: measured; None: that of a router that prefers no expert.
    """
    model, batch = config.model, config.batch
    parts = stage_parts(model, layout)
    tokens = batch.micro_batch_size * batch.seq_len
    passes = layout.num_microbatches / len(layout.placement)  # of each stage in each direction
    layers = sum(parts[stage].moe + parts[stage].mtp for stage in _held(layout, rank))
    one = layer_traffic(config, layout.ep, ranks_a_node, tokens, spread)
    dense, experts = held_weights(model, layout, rank)
    replicas = layout.dp * len(layout.placement)
    # The mirrored row is on other nodes, unless one node holds the whole pipeline.
    near = replicas if layout.world_size <= ranks_a_node else min(ranks_a_node, layout.dp)
    groups = ((dense, replicas, near), (experts, replicas // layout.ep, max(1, near // layout.ep)))
    boundary = tokens * model.hidden_size * ITEM_BYTES[config.precision]
    return StepTraffic(
        **{name: sent.times(layers * passes) for name, sent in one.items()},
        pipeline=_pipeline(layout, rank, ranks_a_node).times(passes * boundary),
        gradients=_sum([ring(FP32 * weights, size, near) for weights, size, near in groups]),
        parameters=_sum(
            [ring(ITEM_BYTES[config.precision] * weights, size, near) for weights, size, near in groups]
        ),
    )


def layer_traffic(
    config: RunConfig, ep: int, ranks_a_node: int, tokens: int, spread: Spread | None = None
) -> dict[str, Sent]:
    """What a rank sends for one microbatch in one MoE layer, by operation, and as `counts`.

    Args:
        tokens: of the rank.
        spread: measured; None: that of a router that prefers no expert.
    """
    kind = dispatcher_kind(config.model, config.layout.dispatcher, ep, ranks_a_node)
    if kind is None:
        return dict.fromkeys((*OPERATIONS, "counts"), Sent())
    spread = spread or uniform_spread(config.model, ep, ranks_a_node)
    form = row_format(config, kind)
    found: dict[str, Sent] = {name: operation_bytes(form, name, spread, tokens) for name in OPERATIONS}
    near = ep / spread.num_nodes - 1
    counts = Sent(near, ep - 1 - near).times(form.counts_bytes(ep))
    return {**found, "counts": counts}


def operation_bytes(form: RowFormat, operation: Operation, spread: Spread, tokens: int) -> Sent:
    """Rows of one operation of one rank, from statistics of routing alone."""
    rows = exchange(spread, tokens, form.record(operation).size, form.kind == "two_hop")
    return Sent(rows.fast_bytes, rows.network_bytes)


def ring(size_bytes: float, ranks: int, near: int) -> Sent:
    """What one rank sends to sum or to gather `size_bytes` over ranks.

    Args:
        near: of those ranks that share a node.
    """
    sent = size_bytes * (ranks - 1) / ranks
    if ranks <= near:
        return Sent(fast=sent)
    return Sent(fast=sent * (near - 1) / near, network=sent / near)


def domain_ranks(accelerators_a_node: int, ep: int) -> int:
    """Ranks of a node in use: the most that expert-parallel groups fill, or that fill such a group.

    Of a domain of 72 a group of 64 uses 64, and groups of 24 all.
    """
    return next(n for n in range(accelerators_a_node, 0, -1) if n % ep == 0 or ep % n == 0)


def held_weights(model: ModelConfig, layout: ResolvedLayout, rank: int) -> tuple[int, int]:
    """Weights of a rank that all of its replicas hold, and those of its experts."""
    parts = stage_parts(model, layout)
    held = [parts[stage] for stage in stages_of(layout, rank)]
    shared = any(part.embedding for part in held)
    dense = sum(_dense_weights(model, part) for part in held)
    if any(part.mtp for part in held) and not shared:
        dense += model.vocab_size * model.hidden_size  # a copy of the embedding of its own
    blocks = sum(part.moe + part.mtp for part in held)
    return dense, blocks * model.num_experts // layout.ep * expert_weights(model)


def _dense_weights(model: ModelConfig, part: StageParts) -> int:
    """Weights of a stage outside its routed experts."""
    hidden = model.hidden_size
    block = attention_weights(model) + 2 * hidden
    moe = block + model.num_shared_experts * expert_weights(model) + model.num_experts * hidden
    table = model.vocab_size * hidden
    return (
        part.dense * (block + 3 * hidden * model.ffn_size)
        + part.moe * moe
        + part.mtp * (moe + mtp_glue(model))
        + part.embedding * table
        + part.head * (table + hidden)
    )


def _held(layout: ResolvedLayout, rank: int) -> list[int]:
    """Stages of a rank; one that it runs in both directions counts twice."""
    return [stage for way in layout.placement for stage, at in enumerate(way) if at == rank]


def _pipeline(layout: ResolvedLayout, rank: int, ranks_a_node: int) -> Sent:
    """Messages of a rank for one microbatch in each direction, by links."""
    sent = Sent()
    for way in layout.placement:
        for stage, at in enumerate(way):
            neighbours = [way[there] for there in (stage - 1, stage + 1) if 0 <= there < len(way)]
            for peer in neighbours if at == rank else []:
                sent += _message(layout, rank, peer, ranks_a_node)
    return sent


def _message(layout: ResolvedLayout, rank: int, peer: int, ranks_a_node: int) -> Sent:
    """One message from rank to rank of every lane, in the mean."""
    if rank == peer:
        return Sent()
    lanes = range(layout.dp)
    inside = sum(
        (rank * layout.dp + lane) // ranks_a_node == (peer * layout.dp + lane) // ranks_a_node
        for lane in lanes
    )
    return Sent(inside / layout.dp, 1 - inside / layout.dp)


def _sum(parts: list[Sent]) -> Sent:
    return sum(parts, Sent())
