"""Merges a forward and a backward so that one's communication flies under the other's computation.

The merge is a table, not threads: for a MoE block of the forward and a MoE block of the backward it
says in which order their phases run on the one compute stream. A communication phase only starts its
transfer; whoever needs the data waits. Between a start and its wait stand phases of the other half:

    combine(B) ........ all W of the pair before, shared(B), attend(F) .............. experts(B)
    dispatch(F) ....... experts(B), shared(F) ....................................... experts(F)
    dispatch(B) ....... shared(F), experts(F) ....................................... attend(B)
    combine(F) ........ attend(B), then all W, and shared(B) of the next pair ....... the next attend(F)

So each of the four exchanges has computation of its own to fly under, at the end of an entry too: the last
combine(F) flies under attend(B) and all W. Weight gradients as the filler are DeepSeek's idea. Its trace
has them between experts(B) and experts(F), and combine(F) after attend(B); there the two dispatches have most
of the computation to fly under, and the two combines, which are twice as long where rows go in FP8 and come
back in BF16, have the least.

Blocks are paired as they come: the forward's first MoE block with the backward's first (its last
layer). A block without a partner goes through the same table alone; a backward then keeps experts(W) to
hide dispatch(B) under, and has attend(W) for the next combine(B). What is no MoE block (dense blocks,
embedding, head, MTP glue) runs where its own half has it, a forward's after combine(B) has started. Ranks of
an expert-parallel group run the same rows over the same layers, so the merged order of their collectives
is the same too.

Steps are whatever has a label and a layer: the executor merges what runs, the planner what takes time.

Ref: DSV3 §3.2.1, Fig. 4.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol, TypeVar

# Phases of a pair of MoE blocks in order. `_b`: backward, `_w`: weight gradient, bare: forward.
# LATE: weight gradients of the blocks before; ALONE: the forward's phases outside of MoE blocks.
LATE, ALONE = "late", "alone"
PAIR_ORDER = (
    "combine_b",
    LATE,
    "shared_b",
    ALONE,
    "attend",
    "dispatch",
    "experts_b",
    "dispatch_b",
    "shared",
    "experts_w",
    "shared_w",
    "experts",
    "combine",
    "attend_b",
)
_PLACE = {label: place for place, label in enumerate(PAIR_ORDER)}
_LATE_IN_PAIRS = ("experts_w", "shared_w", "attend_w")
_OF_MOE = {*PAIR_ORDER, "attend_w"}


class Step(Protocol):
    """One indivisible piece of a forward or backward, compared by identity or by value."""

    @property
    def label(self) -> str:
        """The phase's name; `_b` is added for its backward, `_w` for its weight gradient."""
        ...

    @property
    def layer(self) -> str:
        """What steps of one block have in common."""
        ...


S = TypeVar("S", bound=Step)


def interleave(forward: Sequence[S], backward: Sequence[S]) -> list[S]:
    """One list that holds both, each in its own order (weight gradients aside), MoE blocks pair by pair."""
    ahead, back = _blocks(forward), _blocks(backward)
    merged: list[S] = []
    late: list[S] = []
    while ahead or back:
        merged += _take_alone(back)
        alone = _take_alone(ahead)
        ahead_block, back_block = _take(ahead), _take(back)
        waits = _LATE_IN_PAIRS if ahead_block else ("attend_w",)
        next_late = [step for step in back_block if step.label in waits]
        placed = [(_PLACE[LATE], step) for step in late] + [(_PLACE[ALONE], step) for step in alone]
        placed += [(_PLACE[step.label], step) for step in ahead_block + back_block if step not in next_late]
        merged += [step for _, step in sorted(placed, key=lambda each: each[0])]
        late = next_late
    return merged + late


def _blocks(steps: Sequence[S]) -> list[list[S]]:
    """Consecutive steps of the same MoE layer together, every other step alone."""
    moe_layers = {step.layer for step in steps if step.label.startswith("dispatch")}
    blocks: list[list[S]] = []
    for step in steps:
        joins = step.layer in moe_layers and step.label in _OF_MOE
        if joins and blocks and blocks[-1][-1].layer == step.layer and blocks[-1][-1].label in _OF_MOE:
            blocks[-1].append(step)
        else:
            blocks.append([step])
    return blocks


def _is_moe(block: Sequence[Step]) -> bool:
    return any(step.label.startswith("dispatch") for step in block)


def _take_alone(blocks: list[list[S]]) -> list[S]:
    """Take the steps before the next MoE block off a list of blocks."""
    alone = list(takewhile(lambda block: not _is_moe(block), blocks))
    del blocks[: len(alone)]
    return [step for block in alone for step in block]


def _take(blocks: list[list[S]]) -> list[S]:
    """Take the MoE block at the head of a list of blocks; nothing if the list is at its end."""
    return blocks.pop(0) if blocks else []
