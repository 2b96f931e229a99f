"""Which tokens are to be predicted, and which are only read.

A token that is read but is no target (a prompt, say) stands in a row of tokens as its complement, -1 - id. So
one tensor carries ids and mask through every layout, and rows without a mask are plain ids.

What masking does to a loss. Every phase that puts a loss out divides by all its positions, masked ones
counting 0, so that a microbatch needs to know nothing of the others. Over a global batch the mean over the
targets is wanted; it is that number times positions / targets, both of the global batch: `head_names` says
under which name each loss finds its factor. Without masks all factors are exactly 1.
"""

import torch
from torch import Tensor


def token_ids(tokens: Tensor) -> Tensor:
    """The ids in int64 tokens of any shape, those of tokens that are only read too."""
    return torch.where(tokens < 0, ~tokens, tokens)


def head_names(mtp_depth: int) -> list[str]:
    """Layers whose phases put losses out: the main head, then the MTP depths."""
    return ["head", *(f"mtp.{depth}" for depth in range(mtp_depth))]


def count_targets(rows: Tensor, seq_len: int, mtp_depth: int) -> Tensor:
    """Targets of the main loss and of each MTP depth, int64 [1 + mtp_depth], of rows on any device.

    Args:
        rows: int64 [sequences, seq_len + 1 + mtp_depth].
    """
    is_target = (rows >= 0).sum(dim=0)
    return torch.stack([is_target[shift : shift + seq_len].sum() for shift in range(1, 2 + mtp_depth)])
