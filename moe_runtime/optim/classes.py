"""Which kind of parameter one is, by its canonical name: what gradient norms and updates are told by.

    router       layers.3.moe.router.weight        ffn          dense FFNs, shared experts, MTP's projection
    experts      layers.3.moe.experts.gate_up      embedding    embed.weight
    attention    layers.3.attn.q_a.weight          head         head.weight
    norms        every gain: attn_norm, attn.q_a_norm, norm, mtp.0.enorm ...

Not the optimizer's groups (`groups.py`): those are what is stepped and partitioned together.
"""

CLASSES = ("router", "experts", "attention", "ffn", "embedding", "head", "norms")

_BY_MODULE = {
    "router": "router",
    "experts": "experts",
    "attn": "attention",
    "embed": "embedding",
    "head": "head",
}


def class_of(name: str) -> str:
    """One of `CLASSES`; `ffn` for what has no class of its own."""
    parts = name.split(".")
    if any(part.endswith("norm") for part in parts):
        return "norms"
    return next((_BY_MODULE[part] for part in parts if part in _BY_MODULE), "ffn")
