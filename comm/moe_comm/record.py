"""One message per destination: what belongs to a row travels as one record of bytes.

A record is the fields of a row side by side, each at a multiple of its own item size, the whole
rounded up to the largest one:

    | hidden x bf16 ................. | pad | 1 x fp32 | pad |
      the token                         gate weight

Packing costs no pass over the data: the gather that puts rows into sending order writes into the
field of the record, and the gather that takes them out of the order of arrival reads from it. It
saves a second all-to-all for the weights, whose latency would be as long as that of the tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class RecordLayout:
    """Byte layout of the records of one exchange.

    Args:
        fields: (columns, dtype) of each field, in order.
    """

    def __init__(self, fields: Sequence[tuple[int, torch.dtype]]) -> None:
        self._fields = tuple(fields)
        self._starts: list[int] = []
        end = 0
        for columns, dtype in self._fields:
            start = _round_up(end, dtype.itemsize)
            self._starts.append(start)
            end = start + columns * dtype.itemsize
        self.row_bytes = _round_up(end, max(dtype.itemsize for _, dtype in self._fields))

    def allocate(self, num_rows: int, device: torch.device) -> Tensor:
        """An uninitialised buffer: uint8 [num_rows, row_bytes]."""
        return torch.empty((num_rows, self.row_bytes), dtype=torch.uint8, device=device)

    def field(self, buffer: Tensor, index: int) -> Tensor:
        """A view of one field: [num_rows, columns], rows row_bytes apart."""
        columns, dtype = self._fields[index]
        start = self._starts[index]
        return buffer[:, start : start + columns * dtype.itemsize].view(dtype)

    def whole(self, buffer: Tensor) -> Tensor:
        """The contiguous view [num_rows, row_bytes / item size] in the dtype of the first field.

        Its first columns are the first field; what the later ones mean in that dtype is nothing. It
        lets a kernel that wants contiguous rows read the first field without a copy of it.
        """
        return buffer.view(self._fields[0][1])


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
