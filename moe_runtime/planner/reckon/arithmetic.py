"""Which kernels of an FP8 run are not FP8: what the section `fp8` of its config keeps in BF16.

A product goes by its name: the module that it belongs to, and by its ending whether it is a forward's
(`fprop`; what is recomputed is one too), a gradient's of inputs (`, dX`: `dgrad`) or of weights (`, dW`:
`wgrad`). The cast of a product that is not FP8 is not made. Names of single layers in `keep_high` are not
heard here: all blocks of a kind take the same time.
"""

from collections.abc import Iterable
from dataclasses import replace

from moe_runtime.config.fp8 import Fp8Config
from moe_runtime.planner.reckon.kernels import Kernel, Move, Phases, Product

# Products by their first words, and the modules that are multiplied in them together.
_MODULES = {
    "q and kv down": ("attn.q_a", "attn.kv_a"),
    "q up": ("attn.q_b",),
    "kv up": ("attn.kv_b",),
    "o": ("attn.o",),
    "ffn": ("ffn",),
    "shared": ("moe.shared",),
    "experts": ("moe.experts",),
}
_CAST, _COLUMNS = "cast for ", "columns for "


def as_configured(phases: Phases, fp8: Fp8Config) -> Phases:
    """The kernels with those products in BF16 that the config keeps there."""
    return Phases(
        *(tuple(_kept(one, fp8)) for one in (phases.forward, phases.input_grad, phases.weight_grad))
    )


def _kept(kernels: Iterable[Kernel], fp8: Fp8Config) -> Iterable[Kernel]:
    for kernel in kernels:
        if isinstance(kernel, Product):
            yield kernel if _multiplies(kernel.name, fp8) else replace(kernel, fp8=False)
        elif not (isinstance(kernel, Move) and _is_idle_cast(kernel.name, fp8)):
            yield kernel


def _is_idle_cast(name: str, fp8: Fp8Config) -> bool:
    if name.startswith(_CAST):
        return not _multiplies(name.removeprefix(_CAST), fp8)
    return name.startswith(_COLUMNS) and not _multiplies(f"{name.removeprefix(_COLUMNS)}, dW", fp8)


def _multiplies(name: str, fp8: Fp8Config) -> bool:
    """Whether the config has a product in FP8."""
    arithmetic = {"dX": fp8.dgrad, "dW": fp8.wgrad}.get(name.rpartition(", ")[2], fp8.fprop)
    modules = next((found for first, found in _MODULES.items() if _begins(name, first)), ())
    return arithmetic == "fp8" and all(map(fp8.multiplies, modules))


def _begins(name: str, words: str) -> bool:
    return name == words or name.startswith((f"{words} ", f"{words},"))
