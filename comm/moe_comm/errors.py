"""The named errors of expert-parallel communication; each message is one line a user can act on."""


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
