"""Models for tests of decoding: a small vocabulary, so that drafts of untrained modules often stand."""

from typing import Any

import torch

from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import F64, small_config, small_model


def draft_model(
    mtp_depth: int,
    vocab_size: int = 6,
    dtype: torch.dtype = F64,
    separator: int | None = None,
    **changes: Any,
) -> Transformer:
    """Two layers, one of them dense, and `mtp_depth` modules; its next tokens are neither sure nor even."""
    config = small_config(
        num_layers=2, mtp_depth=mtp_depth, vocab_size=vocab_size, expert_ffn_size=8, **changes
    )
    return small_model(config, dtype=dtype, document_separator=separator)
