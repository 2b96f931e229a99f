"""One flipped bit always changes a digest, and says where it is."""

import pytest
import torch

from moe_runtime.parallel.digest import WINDOW_BYTES, digest, window_digests

SHAPES = [(torch.float32, (3, 100)), (torch.bfloat16, (1031,)), (torch.uint8, (2, 1024)), (torch.float32, ())]


@pytest.mark.parametrize(("dtype", "shape"), SHAPES)
def test_every_single_bit_shows_in_its_window_alone(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = tensor.reshape(-1).view(torch.uint8)
    before, whole = window_digests(tensor), int(digest(tensor))
    for bit in range(0, raw.numel() * 8, 7):
        byte = bit // 8
        raw[byte] ^= 1 << bit % 8
        changed = (window_digests(tensor) != before).nonzero().flatten().tolist()
        assert changed == [byte // WINDOW_BYTES] and int(digest(tensor)) != whole
        raw[byte] ^= 1 << bit % 8
    assert torch.equal(window_digests(tensor), before)


def test_elements_and_rows_that_change_places_show() -> None:
    tensor = torch.arange(4096, dtype=torch.float32)
    whole = int(digest(tensor))
    assert int(digest(tensor.roll(1))) != whole
    assert int(digest(tensor.view(4, 1024)[[1, 0, 2, 3]])) != whole


def test_an_empty_tensor_has_a_digest() -> None:
    assert window_digests(torch.empty(0)).numel() == 0 and int(digest(torch.empty(0))) == 0
