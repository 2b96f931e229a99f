"""Bytes that a token leaves in each layer: ours, by the formula, and what transformers keeps."""

from typing import Any

from moe_runtime.cli.bench_generate.peer import Peer, bytes_of_cache
from moe_runtime.cli.bench_generate.subject import Subject
from moe_runtime.generate.engine import Engine

TOKENS = 16


def cache_size(subject: Subject) -> dict[str, Any]:
    """Measured on the tensors after decoding a few tokens.

    Returns:
        bytes per token and layer: `ours`, `formula` = (kv_lora_rank + qk_rope_head_dim) x bytes of a number,
        and `transformers`.
    """
    config = subject.transformer.config
    (request,) = subject.requests(TOKENS, 0.0, count=1)
    decoding = Engine(subject.model).start([request])
    latents = decoding.cache.latents
    for _ in decoding:
        latents = decoding.cache.latents if decoding.cache.rows else latents
    layers, rows, slots, _ = latents.shape
    stored, kept = bytes_of_cache(
        Peer(subject.transformer).generate(list(request.tokens), TOKENS).past_key_values
    )
    return {
        "ours": latents.untyped_storage().nbytes() / (layers * rows * slots),
        "formula": (config.kv_lora_rank + config.qk_rope_head_dim) * latents.element_size(),
        "transformers": stored / (config.num_layers * kept),
    }
