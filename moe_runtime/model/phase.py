"""A chunk of the model as a list of phases: the seam between the model and whoever runs it.

A phase reads named slots of a state and writes named slots. Compute phases are plain functions of
tensors; `Dispatch` and `Combine` say only *that* tokens travel to their experts and back: the
runner moves them. So one list serves two runners: plain autograd (`model.transformer`, one device)
and the taped, interleaved runner of a pipeline stage (`parallel.stage`), and the model never learns
which of them it is in.

Slots of a chunk:

    tokens        int64 [sequences, seq_len + 1 + mtp_depth]   input of the first and the last stage; a
                  token that is no target as its complement (`targets`)
    resid         [sequences, seq_len, hidden]                 residual stream
    routed        [sequences, seq_len, hidden]                 routed experts' output, not yet added
    ffn_in        [sequences, seq_len, hidden]                 what shared and routed experts read
    gate_weights  [tokens, top_k], expert_ids int64 [tokens, top_k]
    rows          [rows, hidden]     tokens as the experts of this rank receive them, expert by expert
    row_weights   [rows]             gate weight of each row
    row_counts    int64 [local_experts], on the CPU
    expert_out    [rows, hidden]     experts' outputs, already multiplied by row_weights
    hidden        [sequences, seq_len, hidden]                 normed stream, input of head and MTP

A slot may be written again (resid is, by every block): running the list backwards, the gradient of
the later value is taken out before that of the earlier one is put in.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

# Scalar slots: they are taken out as soon as they are written, one number per phase, and each has
# the same weight in the objective wherever it arises.
LOSS, LOSS_MTP, BALANCE = "loss", "loss_mtp", "balance"
SCALARS = (LOSS, LOSS_MTP, BALANCE)


@dataclass(frozen=True)
class Compute:
    """A function of tensors, differentiated by autograd.

    Args:
        name: kind of the phase (embed, attend, shared, experts, dense, merge, norm, loss, mtp_in).
        layer: canonical prefix of the module it belongs to, such as `layers.3`.
        fn: takes the input slots in order and returns a tuple, one tensor per output slot.
        inputs: slots read. Integer tensors take no part in differentiation.
        outputs: slots written.
    """

    name: str
    layer: str
    fn: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Dispatch:
    """Tokens travel to the ranks of their experts: (ffn_in, gate_weights, expert_ids) -> rows."""

    layer: str
    name: str = field(default="dispatch", init=False)
    inputs: tuple[str, ...] = field(default=("ffn_in", "gate_weights", "expert_ids"), init=False)
    outputs: tuple[str, ...] = field(default=("rows", "row_weights", "row_counts"), init=False)


@dataclass(frozen=True)
class Combine:
    """Expert outputs travel back and are summed per token: expert_out -> routed."""

    layer: str
    name: str = field(default="combine", init=False)
    inputs: tuple[str, ...] = field(default=("expert_out",), init=False)
    outputs: tuple[str, ...] = field(default=("routed",), init=False)


Phase = Compute | Dispatch | Combine
