"""Which drafted tokens stand, such that what comes out is distributed as the target alone would have it.

A draft x ~ q is accepted with probability min(1, p(x) / q(x)). At the first refusal the token is drawn
from (p - q)+, normalised: the part of p that the accepted drafts do not cover. A token thus comes out with
probability min(p, q) + (p - q)+ = p, whatever q is. If all stand, the pass has one more target row, and a
token is drawn from it. With one-hot rows this is greedy decoding: a draft stands if it is the argmax.

Ref: Leviathan et al. 2023, algorithm 1; DSV3 §5.4.3 speculates with MTP drafts.
"""

import torch
from torch import Tensor

from moe_runtime.generate.sampling import pick


def verify(
    target: Tensor, draft: Tensor, drafted: Tensor, accept_u: Tensor, pick_u: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept a prefix of the drafts and draw the token after it.

    Args:
        target: [rows, k + 1, vocab], probabilities after filters: row i is for draft i, the last for after.
        draft: [rows, k, vocab], what draft i was drawn from, after the same filters.
        drafted: int64 [rows, k].
        accept_u: float64 [rows, k], uniform in [0, 1).
        pick_u: float64 [rows] or [rows, k + 1], uniform in [0, 1); of several, the one at the drawn token's
            place is used.

    Returns:
        (num_accepted int64 [rows] in 0 .. k on the CPU, next_token int64 [rows]).
    """
    num_drafts = drafted.shape[1]
    counts = _accepted_prefix(target, draft, drafted, accept_u)
    num_accepted = torch.tensor(counts, dtype=torch.int64)
    if len(counts) == 1:  # views instead of indices: a batch of one is the common case, and in a hurry
        count = counts[0]
        pick_u = pick_u[:, count] if pick_u.dim() == 2 else pick_u
        wanted = target[:, count]
        return num_accepted, pick(
            _remainder(wanted, draft[:, count]) if count < num_drafts else wanted, pick_u
        )
    rows = torch.arange(drafted.shape[0], device=drafted.device)
    places = num_accepted.to(drafted.device)
    pick_u = pick_u[rows, places] if pick_u.dim() == 2 else pick_u
    wanted = target[rows, places]  # [rows, vocab]
    if num_drafts == 0:
        return num_accepted, pick(wanted, pick_u)
    is_refused = (places < num_drafts).unsqueeze(-1)
    covered = draft[rows, places.clamp(max=num_drafts - 1)] * is_refused
    return num_accepted, pick(_remainder(wanted, covered), pick_u)


def _accepted_prefix(target: Tensor, draft: Tensor, drafted: Tensor, accept_u: Tensor) -> list[int]:
    """How many drafts of each row stand before the first that does not."""
    chosen = drafted.unsqueeze(-1)
    p = target[:, :-1].gather(-1, chosen).squeeze(-1)
    q = draft.gather(-1, chosen).squeeze(-1)
    # u < p / q without the division; strict, so that p = 0 never stands and p = q always does.
    stands: list[list[bool]] = (accept_u * q < p).tolist()
    return [row.index(False) if False in row else len(row) for row in stands]


def _remainder(wanted: Tensor, covered: Tensor) -> Tensor:
    """(p - q)+ of rows [rows, vocab]; p itself where rounding has left nothing of it."""
    left = (wanted - covered).clamp(min=0.0)
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left, wanted)
