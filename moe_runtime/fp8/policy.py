"""What is multiplied in FP8 and what stays high: one table. Ref: DSV3 §3.3.1.

    module                                      products   input kept for backward
    embed                                       none       a look-up
    every norm                                  none       its own input, BF16; casts its output at once
    attn.q_a, attn.kv_a  (attn.q)               FP8        E4M3; one cast of the normed stream for both
    attn.q_b, attn.kv_b                         FP8        E4M3 of the normed latents
    attention core (QK^T, softmax, AV)          BF16       as its kernel wants it
    attn.o                                      FP8        E5M6
    ffn, moe.shared, moe.experts                FP8        E4M3, gate_up's output E4M3, product made again
    moe.router                                  FP32       BF16
    eh_proj of MTP                              BF16       BF16
    final norms and head                        BF16       BF16

The report keeps high what is sensitive and cheap: embedding, head, gate, norms, attention. The input of
`attn.o` is read by the backward of attention too, hence three more bits for what is kept of it. `ffn` and
experts are units of two products, because the cast between them is part of SwiGLU.

`eh_proj` is not named in the report. It is kept high here: it reads embeddings, whose rows differ in size as
no normed stream does, it is one product of 2 h^2 a depth where a layer of DeepSeek-V3 has 88 h^2 active, and
the inference engines that load the released FP8 weights load this one in BF16.

Within an FP8 module each of the three products may be FP8 or BF16:

    product   value             operands in FP8
    fprop     y = x W^T         x in 1x128 tiles, W in 128x128 blocks
    dgrad     dx = dy W         dy in 1x128 tiles, the same blocks, transposed
    wgrad     dW = dy^T x       both in 128x1 tiles: dy cast anew, x retiled from what is kept in E4M3

With `wgrad: bf16` the input is still kept in E4M3 and decoded: this is the exact gradient of what fprop
computed; only dy is spared its rounding.
"""

from dataclasses import dataclass

from moe_runtime.config.fp8 import FP8_MODULES, Fp8Config


@dataclass(frozen=True)
class Choice:
    """How one module multiplies.

    Args:
        fprop, dgrad, wgrad: True if that product is FP8.
        keeps_e5m6: the input is kept in E5M6, not in E4M3.
        backend: what multiplies, as `gemm` names it.
    """

    fprop: bool = True
    dgrad: bool = True
    wgrad: bool = True
    keeps_e5m6: bool = False
    backend: str = "auto"


class Policy:
    """The table with what a config changes in it."""

    def __init__(self, config: Fp8Config | None = None) -> None:
        self._config = Fp8Config() if config is None else config

    def summary(self) -> str:
        """The choice in a line: which products are FP8, in which modules, and what was taken out."""
        config = self._config
        roles = [role for role in ("fprop", "dgrad", "wgrad") if getattr(config, role) == "fp8"]
        modules = [module for module in FP8_MODULES if self.of(module) is not None]
        apart = f"; high: {', '.join(config.keep_high)}" if config.keep_high else ""
        return f"{', '.join(roles) or 'nothing'} of {', '.join(modules) or 'no module'}{apart}"

    def of(self, name: str) -> Choice | None:
        """The choice for a module by its canonical name, such as `layers.3.attn.o`; None: it stays high."""
        config = self._config
        if not config.multiplies(name):
            return None
        fprop, dgrad, wgrad = (kind == "fp8" for kind in (config.fprop, config.dgrad, config.wgrad))
        keeps_e5m6 = name.endswith("attn.o") and config.attention_output == "e5m6"
        return Choice(fprop, dgrad, wgrad, keeps_e5m6, config.backend)
