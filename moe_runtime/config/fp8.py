"""The section `fp8`: what a run with `precision: fp8` multiplies in FP8, and what not. Ref: DSV3 §3.3.

Scales are always powers of two: only those let the cached tiles be cut anew along tokens by shifts.
"""

import re
from typing import Literal

from pydantic import Field

from moe_runtime.config.closest import did_you_mean
from moe_runtime.config.finding import Finding
from moe_runtime.config.section import Section

# What can be in FP8, by name within a layer; `fp8/policy.py` says why each is there.
FP8_MODULES = (
    "attn.q",
    "attn.q_a",
    "attn.q_b",
    "attn.kv_a",
    "attn.kv_b",
    "attn.o",
    "ffn",
    "moe.shared",
    "moe.experts",
)
# What is high in any case, which a user may name without harm.
HIGH_MODULES = ("embed", "head", "moe.router", "eh_proj", "norm")
_LAYER = re.compile(r"^(layers|mtp)\.(\d+)(?:\.|$)")
_IN_LAYER = re.compile(r"^(?:layers\.\d+|mtp\.\d+(?:\.block)?)\.")

Arithmetic = Literal["fp8", "bf16"]


class Fp8Config(Section):
    """Which products of the model are FP8; read under `precision: fp8` alone. Ref: DSV3 §3.3.1."""

    fprop: Arithmetic = Field("fp8", description="products of the forward")
    dgrad: Arithmetic = Field("fp8", description="products that give gradients of inputs")
    wgrad: Arithmetic = Field("fp8", description="products that give gradients of weights")
    keep_high: tuple[str, ...] = Field(
        (), description="modules or layers kept in BF16, such as attn.o, moe.experts, layers.0, mtp.0.attn"
    )
    attention_output: Literal["e5m6", "e4m3"] = Field(
        "e5m6", description="how the input of attn.o is kept for backward: 1.5 bytes a value, or 1"
    )
    backend: Literal["auto", "reference", "scaled_mm", "triton", "deepgemm"] = Field(
        "auto", description="what multiplies; auto: as measured for each shape, emulation on a CPU"
    )

    def findings(self) -> list[Finding]:
        """Every name is one of a module or of a layer, or of a module in a layer."""
        return [
            Finding.expected(
                f"keep_high.{number}",
                f"a module ({', '.join(FP8_MODULES)}), a layer (layers.0, mtp.0) or both (layers.0.attn)",
                f"{name!r}{did_you_mean(name, FP8_MODULES)}",
            )
            for number, name in enumerate(self.keep_high)
            if not _is_known(name)
        ]

    def multiplies(self, name: str) -> bool:
        """Whether `precision: fp8` has a module in FP8, by its canonical name such as layers.3.attn.o."""
        module = _IN_LAYER.sub("", name)
        is_used = "fp8" in (self.fprop, self.dgrad, self.wgrad)
        return is_used and module in FP8_MODULES and not any(_names(e, name, module) for e in self.keep_high)

    def unknown_layers(self, num_layers: int, mtp_depth: int) -> list[Finding]:
        """Layers named in `keep_high` that a model does not have."""
        found = []
        for number, name in enumerate(self.keep_high):
            layer = _LAYER.match(name)
            if layer is None:
                continue
            count = num_layers if layer[1] == "layers" else mtp_depth
            if int(layer[2]) >= count:
                has = f"layers {_first(num_layers)}, mtp {_first(mtp_depth)}"
                wanted = f"a layer of the model ({has})"
                found.append(Finding.expected(f"fp8.keep_high.{number}", wanted, repr(name)))
        return found


def _names(entry: str, name: str, module: str) -> bool:
    """Whether an entry of `keep_high` names the module: it, what it is in, or both with the layer."""
    without_block = name.replace(".block.", ".")
    return any(full == entry or full.startswith(f"{entry}.") for full in (module, name, without_block))


def _first(count: int) -> str:
    return f"0 to {count - 1}" if count else "none"


def _is_known(name: str) -> bool:
    module = _LAYER.sub("", name)
    if not module:
        return name != ""
    return any(known == module or known.startswith(f"{module}.") for known in FP8_MODULES + HIGH_MODULES)
