"""What ranks tell each other before rows travel: counts, and what a row looks like.

Every rank sends every rank one short row of int64: a header and the number of rows for each of that
rank's experts. The header lets all ranks see a disagreement at the same moment and raise alike; a rank
that raised alone would leave the others waiting for its rows for ever.
"""

import torch
from torch import Tensor

from moe_comm.errors import RankDisagreement

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FINE, _REFUSED = 0, 1
HEADER_SIZE = 4  # verdict, hidden, dtype of tokens, dtype of weights


def announce(tokens: Tensor, weights: Tensor, expert_counts: Tensor, ep_size: int) -> Tensor:
    """The control message to all ranks.

    Args:
        tokens: [tokens, hidden].
        weights: [tokens, top_k].
        expert_counts: int64 [num_experts] rows for each global expert.
        ep_size: ranks of the group.

    Returns:
        int64 [ep_size, HEADER_SIZE + local_experts], row d for rank d.
    """
    header = (_FINE, tokens.shape[1], _DTYPES.index(tokens.dtype), _DTYPES.index(weights.dtype))
    heads = torch.tensor(header, device=expert_counts.device).expand(ep_size, HEADER_SIZE)
    return torch.cat((heads, expert_counts.view(ep_size, -1)), dim=1)


def announce_refusal(ep_size: int, local_experts: int, device: torch.device) -> Tensor:
    """The control message of a rank whose input cannot be dispatched."""
    message = torch.zeros((ep_size, HEADER_SIZE + local_experts), dtype=torch.int64, device=device)
    message[:, 0] = _REFUSED
    return message


def require_agreement(heard: Tensor) -> None:
    """Raise, on every rank alike, unless all headers are fine and equal.

    Args:
        heard: int64 [ep_size, HEADER_SIZE + local_experts] on the CPU, row s from rank s.

    Raises:
        RankDisagreement: names the ranks and what differs.
    """
    heads = heard[:, :HEADER_SIZE]
    if bool((heads == heads[0]).all()) and int(heads[0, 0]) == _FINE:
        return
    refusing = torch.nonzero(heads[:, 0] == _REFUSED).flatten().tolist()
    if refusing:
        raise RankDisagreement(
            f"dispatch: expert-parallel ranks {refusing} refused their own input; see there"
        )
    other = int(torch.nonzero((heads != heads[0]).any(dim=1))[0])
    raise RankDisagreement(
        f"dispatch: expected one width and dtype on all ranks, got {_describe(heads[0])} on expert-parallel "
        f"rank 0 and {_describe(heads[other])} on rank {other}"
    )


def _describe(head: Tensor) -> str:
    _, hidden, dtype, weight_dtype = head.tolist()
    return f"hidden {hidden} of {_DTYPES[dtype]} with weights of {_DTYPES[weight_dtype]}"
