"""The named errors of expert-parallel communication; each message is one line a user can act on."""

from torch import Tensor


class CommError(Exception):
    """Base: something about an exchange of tokens is wrong."""


class PlacementError(CommError):
    """Experts and ranks cannot be laid out as asked, or the process group is another size."""


class InputError(CommError):
    """Tokens, gate weights or expert ids have a wrong shape, dtype or range."""


class CountMismatch(CommError):
    """A tensor given back does not have the rows or the width that its handle knows."""


class RankDisagreement(CommError):
    """Ranks of one group began the same exchange with different widths or dtypes, or one refused."""


class TransportError(CommError):
    """Bytes did not arrive: a peer died, timed out, or the backend cannot move this tensor."""


class NumericsError(CommError):
    """Numbers of a kind that a wire format does not take."""


class ReceiveOverflow(CommError):
    """Some rank would hold more rows than it may; raised on all ranks of the group alike.

    Args:
        message: names the rank, the bound and the rows.
        rows_sent: int64 [ep_size, ep_size] on the CPU: rows that rank s would send to rank d.
    """

    def __init__(self, message: str, rows_sent: Tensor) -> None:
        super().__init__(message)
        self.rows_sent = rows_sent

    def __reduce__(self) -> tuple[type, tuple[str, Tensor]]:
        return type(self), (str(self), self.rows_sent)
