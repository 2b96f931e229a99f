"""Floating-point operations of training, reckoned from a model's widths.

A weight matrix costs 2 operations a weight and token forward and 4 backward; attention to `n` earlier
positions 2 n (qk + v) a head forward, and twice that backward. Causal attention looks at (seq + 1) / 2
positions in the mean. Norms, softmax, rotations and the optimizer are left out, as is usual, and so is
what recompute does again: these are the operations that the model needs, not those that a run makes.
"""

from dataclasses import dataclass

from moe_runtime.config.counts import count_parameters
from moe_runtime.config.schema import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Training operations for one token, forward and backward.

    Args:
        weights: products with the main model's active weights, head included.
        attention: scores and sums over earlier positions, main model.
        mtp: all of the MTP modules, the head's second use included.
    """

    weights: float
    attention: float
    mtp: float

    @property
    def main(self) -> float:
        """Without MTP."""
        return self.weights + self.attention

    @property
    def total(self) -> float:
        """With MTP."""
        return self.main + self.mtp


def token_flops(model: ModelConfig, seq_len: int) -> TokenFlops:
    """Training operations for one token in sequences of `seq_len`.

    Ref: DSV3 §4.2 (widths); Kaplan et al. 2020, §2.1 (six operations a weight).
    """
    counts = count_parameters(model)
    norms = counts.parts["norms"]  # gains multiply, but are no matrix
    seen = (seq_len + 1) / 2
    widths = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    attention = 6 * seen * model.num_heads * widths
    head = 6 * model.vocab_size * model.hidden_size
    return TokenFlops(
        weights=6 * (counts.active - norms),
        attention=model.num_layers * attention,
        mtp=6 * counts.mtp_active + model.mtp_depth * (attention + head),
    )
