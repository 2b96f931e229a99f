"""Private communicators of the MPI transport, and how ranks learn that a peer has ended.

A rank that raises, or just ends early, must not leave the others waiting for ever; yet MPI
notices nothing until the process is gone, and the process does not go: MPI_Finalize waits for
everybody. So a rank whose interpreter ends tells its peers how many exchanges it has started. One
with a higher number can never end: it fails with a `TransportError` that names the rank. The
interpreter then waits, sleeping, for its peers to leave too; without limit after a good run, for
`_LEAVE_S` if it raised. Where something is left that can never end, the job is aborted, because
MPI_Finalize would hang. A process that is killed or leaves by `os._exit` tells nobody: there the
launcher has to end the job, which MPICH's mpiexec does at once (after `os._exit(0)` with status 0, so
leave that way only when all ranks are done).

Rejected: a barrier with a time limit at exit (a rank may rightly end an hour before another), and
`sys.excepthook` (it misses `sys.exit`, and the library is not alone in wanting it).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

_GOODBYE_TAG = 77
_GOODBYE_BYTES = 8


class Lane:
    """A private communicator, what was started on it, and who has left it.

    Args:
        mpi: the module `mpi4py.MPI`.
        comm: used by nobody else; lives until the process ends, since freeing it is collective.
    """

    def __init__(self, mpi: Any, comm: "MPI.Intracomm") -> None:
        comm.Set_errhandler(mpi.ERRORS_RETURN)
        self._mpi = mpi
        self.comm = comm
        self.size: int = comm.Get_size()
        self.rank: int = comm.Get_rank()
        self.started = 0
        self.left: dict[int, int] = {}  # rank -> exchanges it had started
        self.is_closed = False
        self._goodbye = b""
        self._goodbyes: list[MPI.Request] = []

    def say_goodbye(self) -> None:
        """Tell every peer how many exchanges this rank has started, there being no more to come; once."""
        if self.is_closed:
            return
        self.is_closed = True
        self._goodbye = self.started.to_bytes(_GOODBYE_BYTES, "little")
        message = [self._goodbye, self._mpi.BYTE]
        peers = (peer for peer in range(self.size) if peer != self.rank)
        self._goodbyes = [self.comm.Isend(message, peer, _GOODBYE_TAG) for peer in peers]

    def hear_goodbyes(self) -> None:
        """Take the goodbyes that have arrived."""
        status = self._mpi.Status()
        while self.comm.Iprobe(self._mpi.ANY_SOURCE, _GOODBYE_TAG, status):
            message = bytearray(_GOODBYE_BYTES)
            self.comm.Recv([message, self._mpi.BYTE], status.Get_source(), _GOODBYE_TAG)
            self.left[status.Get_source()] = int.from_bytes(message, "little")

    def is_deserted(self) -> bool:
        """Whether all peers have left, and this rank's goodbyes are sent."""
        return len(self.left) == self.size - 1 and self._mpi.Request.Testall(self._goodbyes)

    def why_never(self, number: int) -> str | None:
        """Why exchange `number` can never end, if so."""
        for peer, started in self.left.items():
            if started < number:
                return f"rank {peer} ended after {started} exchanges; look for its error"
        return None


def one_line(text: str) -> str:
    """The first and the last line of an MPI error: what, and where it was found."""
    lines = text.strip().splitlines()
    return lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1].strip()}"
