"""Bytes that a token leaves in each layer: ours, by the formula, and what transformers keeps."""

from typing import Any

from moe_runtime.cli.bench_generate.peer import Peer, bytes_of_cache
from moe_runtime.cli.bench_generate.subject import Subject
from moe_runtime.config.counts import cache_width
from moe_runtime.generate.engine import Engine

TOKENS = 16


def cache_size(subject: Subject) -> dict[str, Any]:
    """Measured on the tensors after decoding a few tokens.

    Returns:
        bytes per token and layer: `ours`, `formula` = `cache_width` x bytes of a number, and `transformers`
        where it has such attention.
    """
    config = subject.transformer.config
    (request,) = subject.requests(TOKENS, 0.0, count=1)
    decoding = Engine(subject.model).start([request])
    latents = decoding.cache.latents
    for _ in decoding:
        latents = decoding.cache.latents if decoding.cache.rows else latents
    layers, rows, slots, _ = latents.shape
    sizes: dict[str, Any] = {
        "ours": latents.untyped_storage().nbytes() / (layers * rows * slots),
        "formula": cache_width(config) * latents.element_size(),
    }
    if Peer.knows(subject.transformer):
        made = Peer(subject.transformer).generate(list(request.tokens), TOKENS)
        stored, kept = bytes_of_cache(made.past_key_values)
        sizes["transformers"] = stored / (config.num_layers * kept)
    return sizes
