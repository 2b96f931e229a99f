"""Weights of a pipeline rank, and what training keeps for each of them.

    weights      as they are multiplied: BF16, or FP32, and the routing bias
    gradients    FP32 sums over microbatches; every weight of the rank
    masters      FP32, the rank's share
    moments      FP32, BF16 or FP8, the rank's share
    casts        FP8 forms of weights, from a step's first microbatch to its update

How ZeRO shares, as `parallel/zero.py` has it. The weights of a rank are flat groups: matrices, gains,
experts, and an embedding of which another stage has a copy. Each is cut over the ranks that hold the same
weights: all lanes, and with them those of the mirrored row under a bidirectional schedule; for experts those
lanes alone that hold the same ones, 1/ep of them. So with ep = dp an expert has one owner and costs all of
its states, which is what makes up most of a large model.

At stage 1 whole gradients are there until the update; at stage 2 the rank's share, and those of the
microbatch whose backward runs.

A stage that is on a rank twice, once for each direction, is there once. An embedding is there for the first
stage, and for MTP at the last: once if both are on one rank, otherwise two copies.

Ref: DSV3 §3.2.3 (parameter sharing), §3.3.3 (BF16 moments); Rajbhandari et al. 2020 (ZeRO)
"""

from dataclasses import dataclass, fields

from moe_runtime.config.counts import attention_weights, expert_weights
from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.planner.reckon.casts import cast_bytes
from moe_runtime.planner.reckon.parts import StageParts, stage_parts, stages_of

# Bytes of a value, by `precision`: of weights and activations, and of what is added up from them.
ITEM = {"fp32": 4, "bf16": 2, "fp64": 8, "fp8": 2}
FP32 = 4
# Both moments; under fp8 two codes, and a scale for each 128 elements.
MOMENTS = {"fp32": 8.0, "bf16": 4.0, "fp8": 2 + 1 / 128}
# What DeepSpeed pads a flat group to, in elements an owner.
_ALIGNMENT = 2
# Elements that are reduced together, as `ZeroOptimizer` has it.
_BUCKET = 2**24


@dataclass(frozen=True)
class Held:
    """Weights of a rank or a stage, in elements, by flat group; `bias` is a buffer, in FP32."""

    matrices: int = 0
    gains: int = 0
    experts: int = 0
    tied: int = 0
    bias: int = 0

    def __add__(self, other: "Held") -> "Held":
        return Held(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def times(self, count: int) -> "Held":
        """So many of it."""
        return Held(*(count * getattr(self, one.name) for one in fields(self)))

    @property
    def weights(self) -> int:
        """All of them, the bias not."""
        return self.matrices + self.gains + self.experts + self.tied


@dataclass(frozen=True)
class States:
    """Bytes of one rank.

    Args:
        at_update: besides, while gradients are reduced and weights updated.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    weight_casts: float
    at_update: float


def rank_states(config: RunConfig, layout: ResolvedLayout, rank: int) -> States:
    """What a pipeline rank keeps for its weights; the same in all its lanes.

    Args:
        rank: pipeline rank.
    """
    held, item = held_by(config.model, layout, rank), ITEM[config.precision]
    owners = layout.dp * len(layout.placement)
    groups = [(held.matrices, owners), (held.gains, owners), (held.tied, owners)]
    groups += [(held.experts, owners // layout.ep)]
    padded = sum(_up(size, _ALIGNMENT * each) for size, each in groups)
    share = sum(_up(size, _ALIGNMENT * each) // each for size, each in groups)
    whole = float(max(FP32, item)) * held.weights
    partition, bucket = float(FP32 * share), FP32 * min(_BUCKET, max(size for size, _ in groups))
    shares_gradients = config.layout.zero_stage == 2
    return States(
        weights=item * padded + FP32 * held.bias,
        gradients=partition if shares_gradients else whole,
        masters=FP32 * share,
        moments=MOMENTS[config.optim.moments] * share,
        weight_casts=cast_bytes(config, layout, rank),
        at_update=bucket + (whole if shares_gradients else partition),
    )


def held_by(model: ModelConfig, layout: ResolvedLayout, rank: int) -> Held:
    """Weights of a pipeline rank with the experts of one lane."""
    parts = stage_parts(model, layout)
    table, last = model.vocab_size * model.hidden_size, layout.num_stages - 1
    total, stages = Held(), stages_of(layout, rank)
    for stage in stages:
        total += stage_weights(model, parts[stage], layout.ep)
    reads_table = 0 in stages or (last in stages and model.mtp_depth > 0)
    if not reads_table:
        return total
    shares = {0, last} <= set(stages) or model.mtp_depth == 0
    return total + (Held(matrices=table) if shares else Held(tied=table))


def stage_weights(model: ModelConfig, parts: StageParts, ep: int) -> Held:
    """Weights of a stage, the embedding not.

    Args:
        ep: ranks over which experts are spread.
    """
    hidden, table = model.hidden_size, model.vocab_size * model.hidden_size
    dense, moe = block_weights(model, False, ep), block_weights(model, True, ep)
    mtp = moe + Held(matrices=2 * hidden * hidden, gains=3 * hidden)
    head = Held(matrices=table, gains=hidden) if parts.head else Held()
    return dense.times(parts.dense) + moe.times(parts.moe) + mtp.times(parts.mtp) + head


def block_weights(model: ModelConfig, is_moe: bool, ep: int) -> Held:
    """Weights of one block."""
    hidden, latents = model.hidden_size, 0
    if model.attention == "mla":
        latents = model.kv_lora_rank + (model.q_lora_rank or 0)
    attention, gains = attention_weights(model) - latents, 2 * hidden + latents
    if not is_moe:
        return Held(matrices=attention + 3 * hidden * model.ffn_size, gains=gains)
    each, shared = expert_weights(model), model.num_shared_experts
    return Held(
        matrices=attention + hidden * model.num_experts + shared * each,
        gains=gains,
        experts=model.num_experts // ep * each,
        bias=model.num_experts,
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
