"""The model once more, as slow and as plain as its equations; nothing of `moe_runtime.model` is used.

Works on a dict of canonically named FP64 tensors, token by token and head by head, and is
differentiable, so that gradients are compared too. Ref: DSV3 §2.1, §2.2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.config.schema import ModelConfig

Weights = dict[str, Tensor]


@dataclass
class Sums:
    """Losses of one forward; `counts` holds one list per MoE layer, of tokens per expert."""

    loss: Tensor
    loss_mtp: Tensor
    balance: Tensor
    counts: list[list[int]]


def under(weights: Weights, prefix: str) -> Weights:
    """The weights below a prefix, named without it."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * gain


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    width = gate_up.shape[0] // 2
    gate, up = gate_up[:width] @ x, gate_up[width:] @ x
    return down @ (gate / (1 + torch.exp(-gate)) * up)


def turning(position: int, dim: int, theta: float) -> Tensor:
    """Matrix [dim, dim] that turns the pairs (0, 1), (2, 3), ... of one position."""
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    for first in range(0, dim, 2):
        angle = position * theta ** (-first / dim)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix[first, first], matrix[first, first + 1] = cos, -sin
        matrix[first + 1, first], matrix[first + 1, first + 1] = sin, cos
    return matrix


def may_look(tokens: list[int] | None, separator: int | None, at: int, to: int) -> bool:
    """Causal, and no document end lies between; the separator belongs to the document it ends."""
    if tokens is None or separator is None:
        return to <= at
    return to <= at and separator not in tokens[to:at]


def attention(
    x: Tensor, w: Weights, config: ModelConfig, tokens: list[int] | None, separator: int | None
) -> Tensor:
    """MLA, or MHA where the config says so, of one sequence x [seq, hidden]; head by head, query by query."""
    rope = config.qk_rope_head_dim
    turns = [turning(p, rope, config.rope_theta) for p in range(x.shape[0])]
    heads_of = mha_heads if config.attention == "mha" else mla_heads
    scale = 1 / math.sqrt(config.qk_nope_head_dim + rope)
    heads = []
    for query, key, values in heads_of(x, w, config):
        query, key = turned(query, turns), turned(key, turns)
        out = []
        for at in range(x.shape[0]):
            seen = [to for to in range(at + 1) if may_look(tokens, separator, at, to)]
            shares = torch.softmax(torch.stack([query[at] @ key[to] for to in seen]) * scale, dim=0)
            out.append(sum(share * values[to] for share, to in zip(shares, seen, strict=True)))
        heads.append(torch.stack(out))
    return torch.cat(heads, dim=1) @ w["o.weight"].T


def turned(rows: Tensor, turns: list[Tensor]) -> Tensor:
    """Rows [seq, nope + rope] with the rotary part of each turned by its matrix [rope, rope]."""
    rope = turns[0].shape[0]
    parts = zip(turns, rows, strict=True)
    return torch.stack([torch.cat((row[:-rope], turn @ row[-rope:])) for turn, row in parts])


def mla_heads(x: Tensor, w: Weights, config: ModelConfig) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Query and key before they are turned, and value, of each head. Ref: DSV3 (1)-(10)."""
    nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    eps = config.rms_norm_eps
    if config.q_lora_rank is None:
        queries = x @ w["q.weight"].T
    else:
        queries = rms_norm(x @ w["q_a.weight"].T, w["q_a_norm.weight"], eps) @ w["q_b.weight"].T
    compressed = x @ w["kv_a.weight"].T
    latent = rms_norm(compressed[:, : config.kv_lora_rank], w["kv_a_norm.weight"], eps)
    for head in range(config.num_heads):
        rows = w["kv_b.weight"][head * (nope + v_dim) : (head + 1) * (nope + v_dim)]
        key = torch.cat((latent @ rows[:nope].T, compressed[:, -rope:]), dim=1)
        yield queries[:, head * (nope + rope) : (head + 1) * (nope + rope)], key, latent @ rows[nope:].T


def mha_heads(x: Tensor, w: Weights, config: ModelConfig) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same of plain multi-head attention. Ref: Vaswani et al. 2017, §3.2.2."""
    width, v_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    for head in range(config.num_heads):
        rows = slice(head * width, (head + 1) * width)
        value = w["v.weight"][head * v_dim : (head + 1) * v_dim]
        yield x @ w["q.weight"][rows].T, x @ w["k.weight"][rows].T, x @ value.T


def choose(affinities: list[float], bias: list[float], config: ModelConfig) -> list[int]:
    """Experts of one token, by sorting. Ref: DSV3 (16), §2.1.2."""
    biased = [a + b for a, b in zip(affinities, bias, strict=True)]
    size = len(biased) // config.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
    scores = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: -scores[g])[: config.num_groups_kept]
    eligible = [e for g in best for e in groups[g]]
    return sorted(eligible, key=lambda e: -biased[e])[: config.top_k]


def balance_loss(affinities: Tensor, top_k: int) -> Tensor:
    """Ref: DSV3 (17)-(20), for the affinities [seq, experts] of one sequence."""
    length, experts = affinities.shape
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(experts):
        chosen = sum(
            expert in sorted(range(experts), key=lambda e: -row[e])[:top_k] for row in affinities.tolist()
        )
        frequency = experts / (top_k * length) * chosen
        share = sum(row[expert] / row.sum() for row in affinities) / length
        total = total + frequency * share
    return total


def shared_experts(token: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    """Sum of the shared experts' outputs, one by one; their gate rows come first, then all up rows."""
    y, width, count = torch.zeros_like(token), config.expert_ffn_size, config.num_shared_experts
    for n in range(count):
        gate, up = slice(n * width, (n + 1) * width), slice((count + n) * width, (count + n + 1) * width)
        rows = w["shared.gate_up.weight"]
        y = y + swiglu(token, torch.cat((rows[gate], rows[up])), w["shared.down.weight"][:, gate])
    return y


def moe(x: Tensor, w: Weights, config: ModelConfig) -> tuple[Tensor, Tensor, list[int]]:
    """MoE FFN of one sequence x [seq, hidden]: output, balance loss, tokens per expert."""
    affinities = 1 / (1 + torch.exp(-x @ w["router.weight"].T))
    bias = w["router.bias"].tolist()
    counts = [0] * config.num_experts
    out = []
    for token, row in zip(x, affinities, strict=True):
        chosen = choose(row.tolist(), bias, config)
        total = sum(row[e] for e in chosen)
        y = torch.zeros_like(token)
        for e in chosen:
            counts[e] += 1
            gate = config.routed_scaling_factor * row[e] / total
            y = y + gate * swiglu(token, w["experts.gate_up"][e], w["experts.down"][e])
        out.append(y + shared_experts(token, w, config))
    return torch.stack(out), balance_loss(affinities, config.top_k), counts


def _mean(sequences: list[Tensor]) -> Tensor:
    return torch.stack(sequences).mean(dim=0)


def block(
    streams: list[Tensor], w: Weights, config: ModelConfig, tokens: list[list[int]], separator: int | None
) -> tuple[list[Tensor], Tensor | None, list[int]]:
    """One block over all sequences: streams, balance loss (None: dense), tokens per expert."""
    out, balances, counts = [], [], [0] * config.num_experts
    for x, words in zip(streams, tokens, strict=True):
        normed = rms_norm(x, w["attn_norm.weight"], config.rms_norm_eps)
        x = x + attention(normed, under(w, "attn."), config, words, separator)
        normed = rms_norm(x, w["ffn_norm.weight"], config.rms_norm_eps)
        if "ffn.down.weight" in w:
            y = torch.stack([swiglu(t, w["ffn.gate_up.weight"], w["ffn.down.weight"]) for t in normed])
        else:
            y, balance, used = moe(normed, under(w, "moe."), config)
            balances.append(balance)
            counts = [a + b for a, b in zip(counts, used, strict=True)]
        out.append(x + y)
    return out, _mean(balances) if balances else None, counts


def cross_entropy(hidden: list[Tensor], head: Tensor, tokens: list[list[int]], shift: int) -> Tensor:
    """Mean over all positions i of -log p(token i + shift)."""
    losses = []
    for stream, words in zip(hidden, tokens, strict=True):
        for i, h in enumerate(stream):
            logits = head @ h
            losses.append(torch.logsumexp(logits, dim=0) - logits[words[i + shift]])
    return _mean(losses)


def model_losses(w: Weights, config: ModelConfig, tokens: Tensor, separator: int | None = None) -> Sums:
    """All losses of tokens [sequences, seq + 1 + mtp_depth]. Ref: DSV3 (21)-(25)."""
    words = tokens.tolist()
    length, eps = tokens.shape[1] - 1 - config.mtp_depth, config.rms_norm_eps
    embed = w["embed.weight"]
    streams = [embed[row[:length]] for row in words]
    balance = torch.zeros((), dtype=torch.float64)
    loss_mtp = torch.zeros((), dtype=torch.float64)
    counts = []
    for number in range(config.num_layers):
        streams, added, used = block(streams, under(w, f"layers.{number}."), config, words, separator)
        if added is not None:
            balance = balance + added
            counts.append(used)
    hidden = [rms_norm(x, w["norm.weight"], eps) for x in streams]
    loss = cross_entropy(hidden, w["head.weight"], words, 1)
    for depth in range(config.mtp_depth):
        mtp = under(w, f"mtp.{depth}.")
        joined = []
        for row, h in zip(words, hidden, strict=True):
            ahead = embed[row[1 + depth : 1 + depth + length]]
            pair = (rms_norm(ahead, mtp["enorm.weight"], eps), rms_norm(h, mtp["hnorm.weight"], eps))
            joined.append(torch.cat(pair, dim=1) @ mtp["eh_proj.weight"].T)
        streams, added, used = block(joined, under(mtp, "block."), config, words, separator)
        assert added is not None, "MTP blocks route"
        balance, counts = balance + added, [*counts, used]
        hidden = [rms_norm(x, mtp["norm.weight"], eps) for x in streams]
        loss_mtp = loss_mtp + cross_entropy(hidden, w["head.weight"], words, 2 + depth)
    return Sums(loss, loss_mtp, balance, counts)
