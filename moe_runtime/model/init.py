"""How parameters begin: one table of laws, and values that no layout changes. Ref: DSV3 §4.2.

Every logical tensor draws from its own generator, seeded by the run's seed and its canonical name; an
expert of a stacked tensor by its global number too. So a slice of layers, a subset of experts or a copy
of the embedding holds exactly the values of the whole model. Values are drawn in FP32 on the CPU and
then cast, so all dtypes and devices begin at the same point.
"""

import hashlib

import torch
from torch import Tensor, nn

# First law whose suffix ends the canonical name holds; everything else is normal.
ONES, ZEROS, NORMAL, NORMAL_PER_EXPERT = "ones", "zeros", "normal", "normal per expert"
LAWS: tuple[tuple[str, str], ...] = (
    ("norm.weight", ONES),
    ("router.bias", ZEROS),
    ("experts.gate_up", NORMAL_PER_EXPERT),
    ("experts.down", NORMAL_PER_EXPERT),
    ("", NORMAL),
)


def law_of(name: str) -> str:
    """The law of a parameter by its canonical name."""
    return next(law for suffix, law in LAWS if name.endswith(suffix))


def draw(shape: torch.Size, std: float, seed: int, *path: str | int) -> Tensor:
    """N(0, std) in FP32 from a generator seeded by (seed, path); the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * std


@torch.no_grad()
def init_parameters(model: nn.Module, std: float, seed: int, first_expert: int = 0) -> None:
    """Fill parameters and buffers of a model or of any slice of it.

    Args:
        model: its state-dict names are canonical.
        std: standard deviation of every matrix.
        seed: of the run.
        first_expert: global number of the first expert in stacked tensors.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        law = law_of(name)
        if law == ONES:
            tensor.fill_(1.0)
        elif law == ZEROS:
            tensor.zero_()
        elif law == NORMAL:
            tensor.copy_(draw(tensor.shape, std, seed, name))
        else:
            for place, expert in enumerate(tensor):
                expert.copy_(draw(expert.shape, std, seed, name, first_expert + place))
