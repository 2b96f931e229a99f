"""Records: fields side by side, every bit kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.record import RecordLayout
from moe_comm.wire.codec import WIRES, open_wire

from tests.unit.comm.plain_hops import record_bytes, through

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXTRAS = (torch.int16, torch.int32, *DTYPES)
fields_beside = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(EXTRAS)), max_size=3)


def _values(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(rows, columns, generator=generator)).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(WIRES), st.sampled_from([1, 3, 130]), st.sampled_from(DTYPES), fields_beside, st.data()
)
def test_what_is_packed_in_any_order_comes_out_as_the_codec_gives_it(wire, hidden, dtype, beside, data):
    codec = open_wire(wire)
    layout = RecordLayout(codec, hidden, dtype, beside)
    parts = [(kind.itemsize, columns) for columns, kind in codec.fields(hidden, dtype)]
    assert layout.payload_bytes == sum(size * columns for size, columns in parts)
    assert layout.row_bytes == record_bytes(*parts, *((kind.itemsize, columns) for columns, kind in beside))
    assert layout.meta_bytes == layout.row_bytes - layout.payload_bytes
    assert layout.num_extras == len(beside)

    rows = _values(4, hidden, dtype, 0)
    order = torch.tensor(data.draw(st.lists(st.integers(0, 3), max_size=6)), dtype=torch.int64)
    extras = [_values(5, columns, kind, i) for i, (columns, kind) in enumerate(beside)]
    places = [(order + i) % 5 for i in range(len(beside))]
    buffer = layout.pack(rows, order, list(zip(extras, places, strict=True)))
    assert buffer.shape == (len(order), layout.row_bytes) and buffer.is_contiguous()
    wanted = through(codec, rows)[order]
    back = torch.tensor(data.draw(st.permutations(range(len(order)))), dtype=torch.int64)
    assert torch.equal(layout.rows(buffer), wanted) and layout.rows(buffer).is_contiguous()
    assert torch.equal(layout.rows(buffer, back), wanted[back])
    assert torch.equal(layout.summable(buffer)[:, :hidden], wanted)
    for index, (values, place) in enumerate(zip(extras, places, strict=True)):
        assert torch.equal(layout.extra(buffer, index), values[place])

    first, last = sorted((data.draw(st.integers(0, len(order))), data.draw(st.integers(0, len(order)))))
    elsewhere = layout.allocate(last - first, buffer.device)
    around = layout.pack(rows, order, list(zip(extras, places, strict=True)), (slice(first, last), elsewhere))
    assert around.shape == buffer.shape
    around[first:last] = elsewhere
    assert torch.equal(layout.rows(around), wanted)
    assert all(torch.equal(layout.extra(around, i), layout.extra(buffer, i)) for i in range(len(beside)))

    whole = layout.pack_all(rows, [values[:4] for values in extras])
    assert whole.shape == (4, layout.row_bytes) and whole.dtype == torch.uint8
    assert torch.equal(layout.rows(whole), through(codec, rows))
    for index, values in enumerate(extras):
        assert torch.equal(layout.extra(whole, index), values[:4])


def test_fields_begin_where_their_items_may_lie():
    layout = RecordLayout(open_wire("auto"), 3, torch.bfloat16, ((1, torch.float64), (2, torch.float32)))
    assert layout.row_bytes == 24  # 6 bytes, 2 of padding, 8, 8
    assert layout.meta_bytes == 18


@pytest.mark.parametrize("hidden", [0, 130])
def test_rows_that_travel_alone_as_they_are_are_not_copied(hidden):
    rows = torch.randn(4, 2 + hidden)
    layout = RecordLayout(open_wire("auto"), 2 + hidden, torch.float32)
    assert layout.pack_all(rows).data_ptr() == rows.data_ptr()
    buffer = layout.pack_all(rows)
    assert layout.summable(buffer).data_ptr() == rows.data_ptr()
