"""The arithmetic of one AdamW step, fixed to the bit. Ref: DSV3 §4.2, arXiv 1711.05101.

A step has several implementations (plain torch, compiled C++, Triton), and which of them a rank gets must
not show in the weights: a run may resume on a machine without a compiler, and a test can only compare
exactly what is defined exactly. So every operation below is one IEEE operation on the parameter's type,
rounded by itself and in this order; products are never fused with the sum that follows:

    m <- m + (1 - beta1) (g - m)
    v <- beta2 v + ((1 - beta2) g) g
    d  = sqrt(v) / sqrt(1 - beta2^t) + eps           a product with the rounded reciprocal
    w <- (1 - lr weight_decay) w - (lr / (1 - beta1^t)) (m / d)

The factors are computed in double precision on the host and rounded once. torch's fused kernel does the
same sums in an order of its own that its versions may change (and joins some by FMA), so it cannot be the
definition; against it the result differs in the last bit.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_runtime.optim.moments import rounded_sqrt


@dataclass(frozen=True)
class Factors:
    """What is the same for all elements of a step. Doubles; arithmetic in FP32 rounds each once.

    Args:
        kept: 1 - lr weight_decay, multiplies the weight.
        mean_gain: 1 - beta1.
        square_kept: beta2.
        square_gain: 1 - beta2.
        root_factor: 1 / sqrt(1 - beta2^t).
        eps: added to the corrected root.
        step_size: lr / (1 - beta1^t).
        mean_correction: 1 - beta1^t, for statistics alone.
    """

    kept: float
    mean_gain: float
    square_kept: float
    square_gain: float
    root_factor: float
    eps: float
    step_size: float
    mean_correction: float

    def of_an_element(self) -> tuple[float, ...]:
        """Those that kernels take, in their order."""
        return (
            self.kept,
            self.mean_gain,
            self.square_kept,
            self.square_gain,
            self.root_factor,
            self.eps,
            self.step_size,
        )


def factors_of(group: dict[str, Any], step: int) -> Factors:
    """Factors of a parameter group at a step counted from 1."""
    beta1, beta2 = group["betas"]
    lr, mean_correction = float(group["lr"]), 1 - beta1**step
    return Factors(
        kept=1 - lr * group["weight_decay"],
        mean_gain=1 - beta1,
        square_kept=beta2,
        square_gain=1 - beta2,
        root_factor=1 / math.sqrt(1 - beta2**step),
        eps=group["eps"],
        step_size=lr / mean_correction,
        mean_correction=mean_correction,
    )


def update(value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, factors: Factors) -> Tensor:
    """One step on elements of one floating type; `value`, `mean` and `square` change in place.

    Returns:
        m / d as above, fresh.
    """
    mean.add_((grad - mean).mul_(factors.mean_gain))
    square.mul_(factors.square_kept).add_((grad * factors.square_gain).mul_(grad))
    quotient = mean / rounded_sqrt(square).mul_(factors.root_factor).add_(factors.eps)
    value.mul_(factors.kept).sub_(quotient * factors.step_size)
    return quotient
