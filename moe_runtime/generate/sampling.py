"""From logits to the next token: filters over the vocabulary, and a draw by the inverse of the CDF.

Temperature first, then top-k, then top-p, each renormalised; a tie goes to the lowest id. A filter needs
a threshold and a count only, never an order of tokens, so nothing sorts the vocabulary unless top-p is so
wide that no shortlist holds its mass.

Draws are made of fixed-point integers: a sum of floats depends on the device's order of addition and may
give a token of probability 0 a sliver; a sum of integers does neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.errors import ConfigError, NumericsError

SHORTLISTS = (256, 8192)  # so many likeliest tokens nearly always hold top-p: no need to sort all
COLDEST = 1e-30  # below this a temperature is 0: a quotient by it leaves the range of FP32
_ONE = float(1 << 52)  # fixed point of `pick`: sums stay below 2^53, where float64 is exact


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is drawn.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw from so many likeliest tokens; 0: all.
        top_p: draw from the likeliest tokens that hold this share, in (0, 1].
        seed: the same seed draws the same tokens.

    Raises:
        ConfigError: a number out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected 0 (all tokens) or more, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p: expected above 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True)
class Filters:
    """The filters of a batch: a number where all rows have the same, else a tensor [rows]."""

    temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> "Filters":
        """Filters of rows with these params."""

        def column(name: str) -> float | int | Tensor:
            values = [getattr(one, name) for one in params]
            return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)

        return cls(column("temperature"), column("top_k"), column("top_p"))  # type: ignore[arg-type]

    def probs(self, logits: Tensor) -> Tensor:
        """`filtered_probs` of logits [rows, ..., vocab], each row with its own filters."""

        def fit(value: float | int | Tensor) -> float | int | Tensor:
            return value.view(-1, *[1] * (logits.dim() - 2)) if isinstance(value, Tensor) else value

        return filtered_probs(logits, fit(self.temperature), fit(self.top_k), fit(self.top_p))  # type: ignore[arg-type]

    def keep(self, rows: Tensor) -> "Filters":
        """Filters of some of the rows: int64 [kept] or bool [rows]."""
        fields = (self.temperature, self.top_k, self.top_p)
        kept = [value[rows] if isinstance(value, Tensor) else value for value in fields]
        return Filters(*kept)  # type: ignore[arg-type]


def filtered_probs(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
) -> Tensor:
    """What the next token is drawn from.

    Args:
        logits: [..., vocab]; -inf forbids a token.
        temperature: 0, or below 1e-30, puts everything on the likeliest token; a tensor broadcasts to
            [...], as do the next.
        top_k: 0 keeps all.
        top_p: in (0, 1]; at least the likeliest token stays.

    Returns:
        [..., vocab], at least FP32, each row sums to 1; NaN where a row holds NaN or +inf, or nothing but
        -inf, which `pick` refuses: so the host waits for a device once, not twice.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    below = wide - wide.amax(dim=-1, keepdim=True)  # no temperature overflows; NaN if the peak is not finite
    if not isinstance(temperature, Tensor):
        return _one_hot(below) if temperature < COLDEST else _filter(below / temperature, top_k, top_p)
    is_greedy = (temperature < COLDEST).unsqueeze(-1)
    divisor = temperature.to(wide.dtype).unsqueeze(-1).masked_fill(is_greedy, 1.0)
    return torch.where(is_greedy, _one_hot(below), _filter(below / divisor, top_k, top_p))


def keep_top_k(logits: Tensor, top_k: int | Tensor) -> Tensor:
    """-inf on all but the `top_k` largest of logits [..., vocab]; 0 keeps all."""
    vocab = logits.shape[-1]
    if not isinstance(top_k, Tensor):
        if not 0 < top_k < vocab:
            return logits
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        return logits.masked_fill(~_largest(logits, top_k, least), -torch.inf)
    count = top_k.masked_fill(top_k == 0, vocab).clamp(max=vocab).unsqueeze(-1)
    count = count.expand(*logits.shape[:-1], 1)
    least = logits.topk(int(count.max()), dim=-1).values.gather(-1, count - 1)
    return logits.masked_fill(~_largest(logits, count, least), -torch.inf)


def keep_top_p(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """The smallest set of likeliest tokens that holds at least `top_p`, renormalised.

    Args:
        probs: [..., vocab], sums to 1.
        top_p: in (0, 1]; at least the likeliest token stays.
    """
    if not isinstance(top_p, Tensor):
        if top_p >= 1.0:
            return probs
        top_p = torch.tensor(top_p, dtype=torch.float64, device=probs.device)
    share = top_p.to(torch.float64).unsqueeze(-1)
    keeps_all = share >= 1.0
    for size in (*(size for size in SHORTLISTS if size < probs.shape[-1]), probs.shape[-1]):
        values = probs.topk(size, dim=-1).values
        held = values.cumsum(dim=-1, dtype=torch.float64)
        if bool(((held[..., -1:] >= share) | keeps_all).all()):
            break
    count = (held - values < share).sum(dim=-1, keepdim=True)  # before these, less than the share is held
    least = values.gather(-1, count - 1)
    kept = probs.masked_fill(~(_largest(probs, count, least) | keeps_all), 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def pick(probs: Tensor, u: Tensor) -> Tensor:
    """A token of each row by the inverse of its CDF; never one of probability 0.

    Args:
        probs: [rows, vocab], at least 0; need not sum to 1. A share below 2^-52 counts as 0.
        u: float64 [rows], uniform in [0, 1).

    Returns:
        int64 [rows].

    Raises:
        NumericsError: a row sums to 0 or is not finite.
    """
    total = probs.sum(dim=-1, keepdim=True, dtype=torch.float64)
    cdf = (probs * (_ONE / total)).to(torch.int64).cumsum(dim=-1)
    last = cdf[..., -1:]
    if not bool((last > 0).all()):  # NaN and infinity become the lowest integer, or zero
        raise NumericsError("sampling: expected finite logits, got NaN or infinity; the model has diverged")
    below = (u.unsqueeze(-1) * last).to(torch.int64)  # u < 1, so below the sum after rounding too
    return torch.searchsorted(cdf, below, right=True).squeeze(-1)


def sample_token(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """The next token, where draws need not be counted.

    Args:
        logits: [vocab] or [rows, vocab].
        temperature: 0 is greedy.
        top_p: mass of the likeliest tokens to draw from, in (0, 1].
        generator: on the device of `logits`; None uses torch's own.

    Returns:
        int64 [] or [rows].
    """
    rows = logits.view(-1, logits.shape[-1])
    u = torch.rand(rows.shape[0], dtype=torch.float64, device=logits.device, generator=generator)
    return pick(filtered_probs(rows, temperature, top_p=top_p), u).view(logits.shape[:-1])


def _filter(scaled: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    return keep_top_p(torch.softmax(keep_top_k(scaled, top_k), dim=-1), top_p)


def _one_hot(below: Tensor) -> Tensor:
    """1 at the first of the likeliest, whose logit below the peak is 0, or NaN, which stays."""
    likeliest = below.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(below).scatter_(-1, likeliest, below.gather(-1, likeliest) + 1.0)


def _largest(values: Tensor, count: int | Tensor, least: Tensor) -> Tensor:
    """Which of values [..., vocab] are the `count` largest, `least` being the smallest of them.

    Of those equal to `least`, the first that there is room for.
    """
    above, equal = values > least, values == least
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= room))
