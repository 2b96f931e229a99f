"""Memory that nobody wrote reads as NaN, for tests that ask for it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN, so that a forgotten zero is no matter of luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch fills uninitialised memory in deterministic mode"
    yield
    torch.use_deterministic_algorithms(before)
