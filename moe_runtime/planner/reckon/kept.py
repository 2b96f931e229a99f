"""What lives between a forward and its backward: named tensors, and how a device keeps them.

    F ......... B                   a full backward lets go of everything
    F ......... I ......... W       split: what weight gradients need stays, and gradients join it

A tensor has so many bytes for each token of a microbatch, or for each row, a (token, expert) pair that
arrives here, or for the microbatch as a whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moe_runtime.planner.reckon.kernels import Shape

# Alive from the forward to the input gradient, on to the weight gradient, or only between those two.
Life = Literal["to_input_grad", "to_weight_grad", "between"]


@dataclass(frozen=True)
class Kept:
    """One tensor.

    Args:
        token, row, once: bytes.
    """

    name: str
    token: float = 0.0
    row: float = 0.0
    once: float = 0.0
    life: Life = "to_input_grad"

    def nbytes(self, shape: Shape) -> float:
        """Bytes of a microbatch."""
        return self.token * shape.tokens + self.row * shape.rows + self.once


@dataclass(frozen=True)
class Live:
    """Bytes of one microbatch in one stage.

    Args:
        whole: from its F to the end of its I, or of its B.
        owed: from there to the end of its W.
    """

    whole: float
    owed: float


def live(tensors: Iterable[Kept], shape: Shape) -> Live:
    """Both sums."""
    kept = [(one.life, one.nbytes(shape)) for one in tensors]
    return Live(
        whole=sum(size for life, size in kept if life != "between"),
        owed=sum(size for life, size in kept if life != "to_input_grad"),
    )


@dataclass(frozen=True)
class Keeping:
    """What the same model keeps on one device and not on another.

    Args:
        pads_value: attention wants values as wide as queries (CPU).
        attention_bytes: of its operands; None: those of the run's dtype.
        gradient_bytes: of gradients that wait for W in a BF16 run; None: two.
        joins_router: a log-sigmoid keeps a buffer of its own (CPU).
        grouped: experts are one grouped product, which never keeps the SwiGLU product (CUDA, BF16).
        product_bytes: of a value of the experts' SwiGLU product where it is kept; None: the run's dtype.
        weighs_after: gate weights multiply what experts put out, which their gradient then needs kept; we
            multiply the narrower input of the second product. For comparison with others.
        indices: the dispatcher's.
    """

    pads_value: bool = False
    attention_bytes: int | None = None
    gradient_bytes: int | None = None
    joins_router: bool = False
    grouped: bool = True
    product_bytes: float | None = None
    weighs_after: bool = False


CUDA = Keeping()
# A CPU with BF16 units; without them, attention and waiting gradients are FP32.
CPU = Keeping(pads_value=True, joins_router=True, grouped=False)
