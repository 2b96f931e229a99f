"""One message per destination: what belongs to a row travels as one record of bytes.

A record is the fields of a row side by side, each at a multiple of its own item size, the whole
rounded up to the largest one:

    | hidden x E4M3 ... | scales | top_k x int16 | top_k x fp32 | pad |
      the token, as the wire codec gives it        expert ids, gate weights

Packing costs no pass over the data: the gather that puts rows into sending order writes into the
fields of the record, and the gather that takes them out of the order of arrival reads from them. It
saves further all-to-alls, whose latency would be as long as that of the tokens. A rank that only
passes a row on copies whole records and need not know what is in them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_comm.wire.codec import WireCodec

Field = tuple[int, torch.dtype]


class RecordLayout:
    """Byte layout of the records of one exchange.

    Args:
        codec: how rows are written.
        hidden: width of a row.
        dtype: of the rows before encoding and after decoding.
        extras: (columns, dtype) of what travels beside a row, in order.
    """

    def __init__(
        self, codec: WireCodec, hidden: int, dtype: torch.dtype, extras: Sequence[Field] = ()
    ) -> None:
        self._codec, self._dtype = codec, dtype
        parts = tuple(codec.fields(hidden, dtype))
        self._num_parts = len(parts)
        self.num_extras = len(extras)
        self._fields: tuple[Field, ...] = (*parts, *extras)
        self._starts: list[int] = []
        end = 0
        for columns, kind in self._fields:
            start = _round_up(end, kind.itemsize)
            self._starts.append(start)
            end = start + columns * kind.itemsize
        self.row_bytes = _round_up(end, max(kind.itemsize for _, kind in self._fields))
        self.payload_bytes = sum(columns * kind.itemsize for columns, kind in parts)
        self.meta_bytes = self.row_bytes - self.payload_bytes

    def allocate(self, num_records: int, device: torch.device) -> Tensor:
        """An uninitialised buffer: uint8 [records, row_bytes]."""
        return torch.empty((num_records, self.row_bytes), dtype=torch.uint8, device=device)

    def pack(
        self,
        rows: Tensor,
        order: Tensor,
        extras: Sequence[tuple[Tensor, Tensor]] = (),
        aside: tuple[slice, Tensor] | None = None,
    ) -> Tensor:
        """Encode rows once, and write a record for each place in `order`.

        Args:
            rows: [n, hidden].
            order: int64 [records] row of each record; a row may be taken any number of times.
            extras: (values [m, columns], int64 [records] which of them) for each extra field.
            aside: records that are written elsewhere, and where; the result has a gap in their place.

        Returns:
            uint8 [records, row_bytes], contiguous.
        """
        buffer = self.allocate(order.numel(), rows.device)
        targets = [(slice(None), buffer)]
        if aside is not None:
            gap, elsewhere = aside
            around = (slice(0, gap.start), slice(gap.stop, None))
            targets = [(gap, elsewhere), *((part, buffer[part]) for part in around)]
        sources = [(values, order) for values in self._codec.encode(rows)]
        for index, (values, places) in enumerate((*sources, *extras)):
            for part, target in targets:
                torch.index_select(values, 0, places[part], out=self._field(target, index))
        return buffer

    def pack_all(self, rows: Tensor, extras: Sequence[Tensor] = ()) -> Tensor:
        """A record for each row, in order; what is one field already is not copied.

        Args:
            rows: [n, hidden].
            extras: values [n, columns] for each extra field.
        """
        fields = (*self._codec.encode(rows), *extras)
        if len(fields) == 1 and fields[0].is_contiguous():
            return fields[0].view(torch.uint8)
        buffer = self.allocate(rows.shape[0], rows.device)
        for index, values in enumerate(fields):
            self._field(buffer, index).copy_(values)
        return buffer

    def rows(self, buffer: Tensor, order: Tensor | None = None) -> Tensor:
        """Decode the rows of records: [records, hidden], contiguous; of those in `order`, if given.

        With a codec that keeps tiles they are stand-ins, whose tiles are contiguous.
        """
        parts = [self._field(buffer, index) for index in range(self._num_parts)]
        if self._codec.keeps_tiles:
            kept = parts if order is None else [part.index_select(0, order) for part in parts]
            return self._codec.decode(kept, self._dtype)
        if order is None:
            return self._codec.decode(parts, self._dtype).contiguous()
        if order.numel() > buffer.shape[0]:  # some are taken more than once, and decoded once
            return self._codec.decode(parts, self._dtype).index_select(0, order)
        return self._codec.decode([part.index_select(0, order) for part in parts], self._dtype).contiguous()

    def summable(self, buffer: Tensor) -> Tensor:
        """Decoded rows [records, hidden or more], contiguous; columns beyond hidden mean nothing.

        A kernel that sums rows wants them contiguous. Where they travel as they are, summing whole
        records is cheaper than copying the rows out of them.
        """
        dtype = self._fields[0][1]
        if self._num_parts == 1 and dtype == self._dtype and self.row_bytes % dtype.itemsize == 0:
            return buffer.view(dtype)
        return self.rows(buffer)

    def extra(self, buffer: Tensor, index: int) -> Tensor:
        """A view of one extra field: [records, columns], records row_bytes apart."""
        return self._field(buffer, self._num_parts + index)

    def _field(self, buffer: Tensor, index: int) -> Tensor:
        columns, dtype = self._fields[index]
        start = self._starts[index]
        return buffer[:, start : start + columns * dtype.itemsize].view(dtype)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
