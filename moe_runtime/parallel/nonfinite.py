"""Finds which gradient is not finite, after the global norm has shown that one is.

The norm alone decides, on all ranks alike and at no cost. Only then is this looked for, on every rank in
what it still holds: at ZeRO stage 1 its own gradients, before any sum, so that the rank is known besides
the parameter; at stage 2 the sums that it owns, so that the parameter is known alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class GradientPart(NamedTuple):
    """A parameter's gradient, or a part of it.

    Args:
        name: canonical, of the parameter.
        begin: place of its first element in the flattened gradient.
        flat: the elements, 1-D, live.
    """

    name: str
    begin: int
    flat: Tensor


@dataclass(frozen=True)
class Culprit:
    """A parameter with a gradient that is not finite.

    Args:
        name: canonical, of the parameter.
        first: place of the first such element in the flattened gradient.
        nans, infs: how many elements are which.
        numel: elements looked at.
    """

    name: str
    first: int
    nans: int
    infs: int
    numel: int


def find_culprits(gradients: Iterable[GradientPart]) -> Iterator[Culprit]:
    """The gradients that are not finite."""
    for name, begin, flat in gradients:
        is_bad = ~torch.isfinite(flat)
        if bool(is_bad.any()):
            nans = int(torch.isnan(flat).sum())
            first = begin + int(is_bad.nonzero()[0])
            yield Culprit(name, first, nans, int(is_bad.sum()) - nans, flat.numel())
