"""Where two greedy decodings of the same requests part, and how close the choice was there.

A pass over one token and a pass over several add up in another order, and in BF16 round otherwise. So
speculation may give another token than plain decoding where the plain decoder's best logits are nearly equal,
and from there on the texts differ. That, and nothing else, is allowed: the first difference of each request
is looked at, for what comes after it answers another text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.generate.request import Continuation, Request
from moe_runtime.model.inference import InferenceModel

BF16_TOLERANCE = 2.0**-6  # largest gap at which BF16 may part


@dataclass(frozen=True)
class Parting:
    """The first difference between two continuations of one request.

    Args:
        request: its number.
        position: new token, counted from 0.
        gap: how far the plain decoder's logit of the other's token lies below its best one, in parts of the
            range of its logits there.
    """

    request: int
    position: int
    gap: float


def partings(
    model: InferenceModel,
    requests: Sequence[Request],
    plain: Sequence[Continuation],
    other: Sequence[Continuation],
) -> list[Parting]:
    """The first differences, of the requests that have one.

    Args:
        requests: greedy ones.
        plain: decoded one token a pass.
        other: decoded in another way.
    """
    found = []
    for number, (request, one, two) in enumerate(zip(requests, plain, other, strict=True)):
        if one.tokens == two.tokens:
            continue
        pairs = zip(one.tokens, two.tokens, strict=False)
        shorter = min(len(one.tokens), len(two.tokens))
        position = next((place for place, (left, right) in enumerate(pairs) if left != right), shorter)
        # A token that ended a continuation is not given out.
        chosen = two.tokens[position : position + 1] or sorted(request.stop_ids)
        logits = _plain_logits(model, request.tokens, one.tokens[:position])
        best, range_ = logits.max(), logits.max() - logits.min()
        found.append(Parting(number, position, float((best - logits[chosen].max()) / range_)))
    return found


def _plain_logits(model: InferenceModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits [vocab] behind `tokens`, read one by one, in at least FP32."""
    cache = model.new_cache(1, len(prompt) + len(tokens))
    hidden = model.read(cache, torch.tensor([list(prompt)], device=model.device))
    for token in tokens:
        hidden = model.read(cache, torch.tensor([[token]], device=model.device))
    logits = model.logits(hidden[-1:])[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
