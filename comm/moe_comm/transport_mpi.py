"""The transport over MPI (mpi4py): CPU tensors, `Ialltoallv` on a private communicator.

Rows travel as bytes: the unit of an exchange is a contiguous datatype of one row, so any dtype will
do, and counts and displacements are rows, which keeps messages of more than 2 GiB within the 32-bit
counts of MPI before version 4. What drives exchanges while the caller computes, and what happens when
a rank ends early, is in `mpi_progress`.

MPI is called from the caller's threads and from the progress thread, so it must have been started with
MPI_THREAD_MULTIPLE, as mpi4py does unless told otherwise. To send every call through the progress
thread instead was rejected: it would add two thread switches to each exchange.

The block that a rank sends itself is copied here, while the others are under way: MPICH 5.0 moves it
8 KiB per look, which made an exchange of 4 MiB take 256 looks, and 20 ms in place of 0.7.

The ranks must agree on what they exchange: MPICH cuts a block that is longer than the receiver expects
without a word (`control` makes sure of the counts before rows travel).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from moe_comm.errors import PlacementError, TransportError
from moe_comm.mpi_lane import one_line
from moe_comm.mpi_progress import Exchange, shared_progress

if TYPE_CHECKING:
    from mpi4py import MPI

_MAX_TAG = 32767  # every MPI has tags up to here


class MpiTransport:
    """All-to-all over an MPI communicator.

    Opening one is collective over `comm`, which is duplicated; the duplicate lives until the process
    ends, so open few.

    Args:
        comm: the expert-parallel group, an mpi4py intracommunicator; None is COMM_WORLD.

    Raises:
        TransportError: no mpi4py, no MPI library, or one without MPI_THREAD_MULTIPLE.
        PlacementError: `comm` is not a communicator with this rank in it.
    """

    def __init__(self, comm: "MPI.Intracomm | None" = None) -> None:
        mpi = _load_mpi()
        comm = mpi.COMM_WORLD if comm is None else comm
        if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
            raise PlacementError(f"expected an mpi4py intracommunicator with this rank in it, got {comm!r}")
        self._mpi = mpi
        self._progress = shared_progress(mpi)
        try:
            self._lane = self._progress.open_lane(comm.Dup())
        except mpi.Exception as error:
            raise TransportError(f"MPI cannot duplicate {comm.Get_name()}: {one_line(str(error))}") from error
        self._row_types: dict[int, MPI.Datatype] = {}

    @property
    def size(self) -> int:
        return self._lane.size

    @property
    def rank(self) -> int:
        return self._lane.rank

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def close(self) -> None:
        """See `Transport.close`: peers hear that this rank starts no more exchanges."""
        self._progress.close(self._lane)

    def all_to_all(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        received: Tensor | None = None,
    ) -> Exchange:
        """See `Transport.all_to_all`.

        Raises:
            TransportError: here, when the tensor or the splits cannot be sent or MPI refuses; in the
                wait, when MPI fails or a peer has ended.
        """
        self._check(send, send_splits, recv_splits)
        shape = (sum(recv_splits), *send.shape[1:])
        into = torch.empty(shape, dtype=send.dtype) if received is None else received
        lane = self._lane
        if lane.is_closed:
            raise self._refused("an exchange", "the transport is closed")
        try:
            request = lane.comm.Ialltoallv(self._message(send, send_splits), self._message(into, recv_splits))
        except self._mpi.Exception as error:
            raise self._refused("an exchange", one_line(str(error))) from error
        if received is None:
            self._own_block(into, recv_splits).copy_(self._own_block(send, send_splits))
        lane.started += 1
        exchange = Exchange(self._progress, lane, request, send, into)
        self._progress.drive(exchange)
        return exchange

    def split(self, ranks: Sequence[int]) -> "MpiTransport":
        """See `Transport.split`.

        Raises:
            PlacementError: ranks are not ascending ranks of this transport with this one among them.
            TransportError: MPI refuses.
        """
        ranks = list(ranks)
        if ranks != sorted(set(ranks)) or not set(ranks) <= set(range(self.size)) or self.rank not in ranks:
            raise PlacementError(
                f"expected ascending ranks of 0..{self.size - 1} with {self.rank} among them, got {ranks}"
            )
        # The tag keeps apart what several groups with common members make at the same time.
        tag = crc32(repr(ranks).encode()) % _MAX_TAG
        try:
            comm = self._lane.comm.Create_group(self._lane.comm.Get_group().Incl(ranks), tag)
        except self._mpi.Exception as error:
            raise self._refused(f"a split into {ranks}", one_line(str(error))) from error
        part = MpiTransport(comm)
        comm.Free()
        return part

    def _check(self, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]) -> None:
        """MPI trusts addresses and counts, so they are looked at first."""
        if send.device.type != "cpu":
            raise self._refused(
                f"an exchange of a tensor on {send.device}",
                "MPI moves CPU tensors here; move it to the CPU, or use a torch process group with NCCL",
            )
        if not send.is_contiguous():
            raise self._refused("an exchange", "the tensor is not contiguous; call .contiguous() first")
        for splits in (send_splits, recv_splits):
            if len(splits) != self.size or min(splits) < 0:
                raise self._refused(
                    "an exchange", f"expected {self.size} splits of 0 or more, got {list(splits)}"
                )
        if sum(send_splits) != send.shape[0]:
            raise self._refused(
                "an exchange",
                f"expected splits that sum to the {send.shape[0]} rows sent, got {list(send_splits)}",
            )
        if send_splits[self.rank] != recv_splits[self.rank]:
            raise self._refused(
                "an exchange",
                f"expected as many rows from this rank as to it, got {recv_splits[self.rank]} and "
                f"{send_splits[self.rank]}",
            )

    def _row_type(self, send: Tensor) -> "MPI.Datatype":
        row_bytes = send.shape[1:].numel() * send.dtype.itemsize
        if row_bytes not in self._row_types:
            self._row_types[row_bytes] = self._mpi.BYTE.Create_contiguous(row_bytes).Commit()
        return self._row_types[row_bytes]

    def _message(self, tensor: Tensor, splits: Sequence[int]) -> list[Any]:
        """What MPI is told of a tensor: all blocks but this rank's own."""
        buffer = self._mpi.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        starts = [0, *accumulate(splits[:-1])]
        counts = [0 if peer == self.rank else rows for peer, rows in enumerate(splits)]
        return [buffer, counts, starts, self._row_type(tensor)]

    def _own_block(self, tensor: Tensor, splits: Sequence[int]) -> Tensor:
        return tensor.narrow(0, sum(splits[: self.rank]), splits[self.rank])

    def _refused(self, what: str, why: str) -> TransportError:
        return TransportError(
            f"expert-parallel rank {self.rank} of {self.size}: MPI cannot start {what}: {why}"
        )


def _load_mpi() -> Any:
    """The module `mpi4py.MPI`, started and fit for threads."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        cause = str(error).strip().split("\n")[0]
        raise TransportError(
            f"the MPI transport needs mpi4py and an MPI library, got: {cause}; pip install 'moe_runtime[mpi]'"
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise TransportError("the MPI transport needs MPI to be running; call MPI.Init_thread() first")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise TransportError(
            f"expected MPI at thread level MULTIPLE ({MPI.THREAD_MULTIPLE}), got level {MPI.Query_thread()}; "
            "leave mpi4py.rc.thread_level at 'multiple' and use an MPI built for threads"
        )
    return MPI
