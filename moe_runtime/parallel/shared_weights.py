"""Weights that several stages read: the embedding of the first stage and of MTP, and each of them once."""

from torch.nn import Parameter

from moe_runtime.model.transformer import Transformer


def tie_embedding(mtp_depth: int, num_stages: int, chunks: dict[int, Transformer]) -> Parameter | None:
    """Share the embedding of MTP with the first stage's where both are here; else give the copy."""
    first, last = 0, num_stages - 1
    if mtp_depth == 0 or first == last:
        return None
    if first in chunks and last in chunks:
        chunks[last].embed.weight = chunks[first].embed.weight
        return None
    held = next((stage for stage in (first, last) if stage in chunks), None)
    if held is None:
        return None
    weight = chunks[held].embed.weight
    # A flat group of its own, so that both copies are rounded alike; one of them counts in the norm.
    weight.is_tied = True  # type: ignore[attr-defined]
    weight.ds_pipe_replicated = held == last  # type: ignore[attr-defined]
    return weight


def unique_parameters(chunks: dict[int, Transformer]) -> list[tuple[str, Parameter]]:
    """Canonical name and parameter, each object once, in ascending stage order."""
    seen: dict[int, str] = {}
    named = []
    for chunk in chunks.values():
        for name, param in chunk.named_parameters():
            if id(param) not in seen:
                seen[id(param)] = name
                named.append((name, param))
    return named


def tie_and_name(
    mtp_depth: int, num_stages: int, chunks: dict[int, Transformer]
) -> tuple[Parameter | None, list[tuple[str, Parameter]]]:
    """The tied embedding, if two ranks hold a copy of it, and every parameter of this rank by its name."""
    tied = tie_embedding(mtp_depth, num_stages, chunks)
    return tied, unique_parameters(chunks)
