"""Merges a forward and a backward so that one's communication flies under the other's computation.

The merge is a table, not threads: for a MoE block of the forward and a MoE block of the backward it
says in which order their phases run on the one compute stream. A communication phase only starts its
transfer; whoever needs the data waits. Between a start and its wait stand phases of the other half:

    combine(B) ........ shared(B), attend(F) .......... experts(B)
    dispatch(F) ....... experts(W), shared(F) ......... experts(F)
    dispatch(B) ....... experts(W), experts(F) ........ attend(B)
    combine(F) ........ the next pair: shared(B) ...... the next attend(F)

The order is the one that DeepSeek's own trace shows; its expert weight gradients are the filler.
Blocks are paired as they come: the forward's first MoE block with the backward's first (its last
layer). What has no partner (dense blocks, embedding, head, MTP glue, surplus blocks) runs alone, in
its own half's order. Ranks of an expert-parallel group run the same rows over the same layers, so the
merged order of their collectives is the same too.

Ref: DSV3 §3.2.1, Fig. 4.
"""

from collections.abc import Sequence

from moe_runtime.parallel.stage import Step

# Phases of a pair of MoE blocks in order. `_b`: backward, `_w`: weight gradient, bare: forward.
PAIR_ORDER = (
    "combine_b",
    "shared_b",
    "attend",
    "experts_b",
    "dispatch",
    "dispatch_b",
    "shared_w",
    "experts_w",
    "shared",
    "experts",
    "attend_b",
    "attend_w",
    "combine",
)


def interleave(forward: Sequence[Step], backward: Sequence[Step]) -> list[Step]:
    """One list that holds both, each in its own order, MoE blocks merged pair by pair."""
    forward_blocks, backward_blocks = _blocks(forward), _blocks(backward)
    pairs = min(sum(map(_is_moe, forward_blocks)), sum(map(_is_moe, backward_blocks)))
    merged: list[Step] = []
    while pairs:
        merged += _take_until_moe(forward_blocks) + _take_until_moe(backward_blocks)
        merged += _merge_pair(forward_blocks.pop(0), backward_blocks.pop(0))
        pairs -= 1
    rest = [step for block in forward_blocks + backward_blocks for step in block]
    return merged + rest


def _merge_pair(forward: list[Step], backward: list[Step]) -> list[Step]:
    place = {label: position for position, label in enumerate(PAIR_ORDER)}
    return sorted(forward + backward, key=lambda step: place[step.label])


def _blocks(steps: Sequence[Step]) -> list[list[Step]]:
    """Consecutive steps of the same MoE layer together, every other step alone."""
    moe_layers = {step.layer for step in steps if step.label.startswith("dispatch")}
    blocks: list[list[Step]] = []
    for step in steps:
        joins = step.layer in moe_layers and step.label in PAIR_ORDER
        if joins and blocks and blocks[-1][-1].layer == step.layer and blocks[-1][-1].label in PAIR_ORDER:
            blocks[-1].append(step)
        else:
            blocks.append([step])
    return blocks


def _is_moe(block: list[Step]) -> bool:
    return any(step.label.startswith("dispatch") for step in block)


def _take_until_moe(blocks: list[list[Step]]) -> list[Step]:
    alone: list[Step] = []
    while not _is_moe(blocks[0]):
        alone += blocks.pop(0)
    return alone
