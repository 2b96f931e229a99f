"""Texts of different lengths over a latent cache: the kernel of attention held against torch's form."""

import torch
from torch import Tensor

from moe_runtime.model.latent_attention import gather
from moe_runtime.model.latent_attention_triton import Tile, attend

RANK, ROPE = 32, 16
# Softmax weights are rounded to the dtype of the latents, and so is the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def compare(
    starts: list[int],
    new: int = 1,
    heads: int = 4,
    first: int = 0,
    begins: list[int] | None = None,
    parts: int | None = None,
    dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
    device: str = "cpu",
    widths: tuple[int, int] = (RANK, ROPE),
) -> None:
    """Raise where the kernel is off by more than the tolerance, of the largest latent.

    Args:
        starts: slot of the first new token of each text.
        begins: first slot that the tokens of a text see.
    """
    generator, (rank, rope) = torch.Generator().manual_seed(7), widths

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    slots = torch.tensor(starts, dtype=torch.int64).view(-1, 1) + torch.arange(new)
    stop = max(int(slots.max()) + 1 if starts else 0, 1)
    # Queries lie as products leave them: head by head, and as a slice; behind the last slot is rubbish.
    q_latent = draw(heads, slots.numel(), rank).transpose(0, 1)
    q_rope = draw(slots.numel(), heads + 1, rope)[:, :-1]
    latents = draw(len(starts), stop + 5, rank + rope)
    latents[:, stop:] = torch.nan
    since = None if begins is None else torch.tensor(begins).view(-1, 1).expand_as(slots).contiguous()
    scale = (rank + rope) ** -0.5

    there = torch.arange(first, stop)
    hidden = there > slots.unsqueeze(2)
    if since is not None:
        hidden |= there < since.unsqueeze(2)
    barrier = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).unsqueeze(2).to(device)
    parts_of_queries = (part.unflatten(0, slots.shape).float() for part in (q_latent, q_rope))
    wanted = gather(*parts_of_queries, latents[:, first:stop].float(), scale, barrier)
    wanted = wanted.nan_to_num().flatten(0, 1)  # a softmax over nothing

    ends = slots.to(device)
    also = None if since is None else since.to(device)
    found = attend(q_latent, q_rope, latents, ends, scale, first, stop, also, parts, tile)
    assert found.shape == wanted.shape and found.dtype == dtype
    largest = float(latents[:, :stop].abs().max()) if starts else 0.0
    torch.testing.assert_close(found.float(), wanted, rtol=0.0, atol=TOLERANCE[dtype] * largest)
