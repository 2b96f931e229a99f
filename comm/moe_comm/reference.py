"""The slow oracle: what dispatch and combine mean, in plain loops over all ranks' tokens at once.

One process sees every rank's input; nothing is sorted, permuted or sent. Tests compare the dispatchers
with it. Lists are by rank of the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceRow:
    """Where one received row comes from and goes to."""

    source: int
    token: int
    choice: int
    expert: int


def reference_rows(expert_ids: Sequence[Tensor], num_experts: int) -> list[list[ReferenceRow]]:
    """The rows that each rank receives: by expert, then source rank, then source token.

    Args:
        expert_ids: int64 [tokens, top_k] of each rank.
        num_experts: global number; rank r holds the r-th equal part.
    """
    local_experts = num_experts // len(expert_ids)
    received: list[list[ReferenceRow]] = [[] for _ in expert_ids]
    for expert in range(num_experts):
        for source, ids in enumerate(expert_ids):
            for token, chosen in enumerate(ids.tolist()):
                if expert in chosen:
                    row = ReferenceRow(source, token, chosen.index(expert), expert)
                    received[expert // local_experts].append(row)
    return received


def reference_dispatch(
    tokens: Sequence[Tensor], weights: Sequence[Tensor], received: Sequence[Sequence[ReferenceRow]]
) -> list[tuple[Tensor, Tensor]]:
    """Rows [rows, hidden] and their weights [rows] of each rank.

    Args:
        tokens: [tokens, hidden] of each rank.
        weights: [tokens, top_k] of each rank.
        received: as `reference_rows` gives it.
    """
    results = []
    for rank, origins in enumerate(received):
        rows = [tokens[row.source][row.token] for row in origins]
        row_weights = [weights[row.source][row.token, row.choice] for row in origins]
        results.append(
            (
                torch.stack(rows) if rows else tokens[rank].new_zeros(0, tokens[rank].shape[1]),
                torch.stack(row_weights) if row_weights else weights[rank].new_zeros(0),
            )
        )
    return results


def reference_combine(
    rows: Sequence[Tensor], received: Sequence[Sequence[ReferenceRow]], num_tokens: Sequence[int], top_k: int
) -> list[Tensor]:
    """Sum the rows of each token in the order of its choices; [tokens, hidden] of each rank.

    The sum is made in at least FP32 and rounded once. This is also the oracle of dispatch's backward
    for tokens; `reference_dispatch` of gradients is that of combine's backward.
    """
    copies: dict[tuple[int, int, int], Tensor] = {}
    for rank, origins in enumerate(received):
        for index, row in enumerate(origins):
            copies[row.source, row.token, row.choice] = rows[rank][index]
    dtype = torch.promote_types(rows[0].dtype, torch.float32)
    results = []
    for source, count in enumerate(num_tokens):
        sums = torch.zeros((count, rows[0].shape[1]), dtype=dtype)
        for token in range(count):
            for choice in range(top_k):
                if (source, token, choice) in copies:  # not where the choice is -1
                    sums[token] += copies[source, token, choice].to(dtype)
        results.append(sums.to(rows[0].dtype))
    return results


def reference_layer(
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor],
    expert_ids: Sequence[Tensor],
    experts: Sequence[Callable[[Tensor], Tensor]],
) -> list[Tensor]:
    """Output [tokens, hidden] of each rank of a layer whose experts are all at hand.

    Ordinary autograd runs through it, one expert and one slot at a time.

    Args:
        tokens: [tokens, hidden] of each rank.
        weights: [tokens, top_k] of each rank.
        expert_ids: int64 [tokens, top_k] of each rank.
        experts: one function [rows, hidden] -> [rows, hidden] per global expert.

    Ref: DSV3 (12), the routed part
    """
    outputs = []
    for rank_tokens, rank_weights, ids in zip(tokens, weights, expert_ids, strict=True):
        lines = []
        for token in range(ids.shape[0]):
            line = torch.zeros_like(rank_tokens[token])
            for choice in range(ids.shape[1]):
                if int(ids[token, choice]) < 0:
                    continue
                expert = experts[int(ids[token, choice])]
                line = line + rank_weights[token, choice] * expert(rank_tokens[token : token + 1])[0]
            lines.append(line)
        outputs.append(torch.stack(lines) if lines else torch.zeros_like(rank_tokens))
    return outputs


def reference_rows_sent(expert_ids: Sequence[Tensor], num_experts: int) -> list[list[int]]:
    """How many rows rank s dispatches to rank d: result[s][d]; combine sends as many back."""
    sent = [[0] * len(expert_ids) for _ in expert_ids]
    for destination, origins in enumerate(reference_rows(expert_ids, num_experts)):
        for row in origins:
            sent[row.source][destination] += 1
    return sent
