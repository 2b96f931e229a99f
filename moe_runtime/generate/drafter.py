"""Drafts by the model's own MTP modules. Ref: DSV3 §2.2 (21)-(25), §5.4.3.

When the main model has read tokens up to L-1 and token L is drawn, module 0 reads the main model's outputs at
positions ..L-1 together with tokens ..L and drafts token L+1; module 1 reads module 0's outputs with tokens
..L+1 and drafts L+2, and so on. Beyond the last module it is used again, on its own output: what it gave at
slot s stands for what comes before it at s+1, for both predict the same token.

    slot          ..      L      L+1     L+2          (a module's slot s: token s, and what stands at s-1)
    module 0    true    true      .       .           drafts L+1
    module 1    true    true    draft     .           drafts L+2
    module 1 again                      draft         drafts L+3

After verification the slots behind L are run again with true tokens. Module 0 then needs the main model's new
outputs alone, module d also what module d-1 gave at slot L, one vector a row, which is carried over.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.latent_cache import LatentCache

# (position among the drafts, logits [rows, vocab]) -> the drafted tokens, int64 [rows].
DrawDraft = Callable[[int, Tensor], Tensor]


class Drafter:
    """The MTP modules over one batch.

    Args:
        model: with `mtp_depth` of at least 1.
        num_modules: how many of them run; the first ones.
        cache: of the batch; the main model's and the modules'.

    Attributes:
        known: int64 [rows] on the CPU: below these slots the modules' latents are of true tokens.
    """

    def __init__(self, model: InferenceModel, num_modules: int, cache: LatentCache) -> None:
        self._model, self._cache, self._num_modules = model, cache, num_modules
        self._origin: Tensor | None = None  # int64 [rows]: slot at which module 0 began, module d d later
        empty = torch.zeros(cache.rows, model.config.hidden_size, dtype=model.dtype, device=model.device)
        self._carried = [empty] * (num_modules - 1)  # of module d+1: what module d gave at slot L
        self.known = torch.zeros_like(cache.lengths)

    def propose(self, hidden: Tensor, counts: Tensor, num_drafts: int, draw: DrawDraft) -> None:
        """Read the main model's new outputs, and write drafts behind the next token of each row.

        Args:
            hidden: [tokens, hidden], packed, of the last `counts` positions of each row.
            counts: int64 [rows] on the CPU; 0, where nothing is read, needs `num_drafts` 0.
            num_drafts: 0 only reads.
            draw: makes a token of logits; the cache holds the tokens before it.
        """
        model, lengths = self._model, self._cache.lengths
        reads = counts > 0
        first = starts = lengths - counts + 1
        if self._origin is None:
            self._origin = first
        spans, last = counts, hidden
        for depth in range(self._num_modules):
            if depth:
                begins = torch.maximum(first, self._origin + depth)
                joined = self._join(depth - 1, hidden, spans, reads & (begins == starts))
                self._carry(depth - 1, hidden, starts, spans)
                hidden, starts = joined, begins
                spans = torch.where(reads, lengths + depth + 1 - starts, 0)
            hidden = model.draft(depth, self._cache, hidden, starts, spans)
            if depth < num_drafts:
                last = _last_of(hidden, spans)
                self._draw(depth, last, draw)
        for again in range(self._num_modules, num_drafts):
            ones = torch.ones_like(lengths)
            last = model.draft(self._num_modules - 1, self._cache, last, lengths + again, ones)
            self._draw(again, last, draw)
        self.known = torch.where(reads, lengths + 1, self.known)

    def keep(self, rows: Tensor) -> None:
        """Keep some rows, int64 [rows kept] on the CPU."""
        self.known = self.known[rows]
        self._origin = None if self._origin is None else self._origin[rows]
        self._carried = [held.index_select(0, rows.to(held.device)) for held in self._carried]

    def _draw(self, position: int, hidden: Tensor, draw: DrawDraft) -> None:
        tokens = draw(position, self._model.logits(hidden))
        self._model.note(self._cache, tokens.unsqueeze(1), behind=1 + position)

    def _join(self, held: int, hidden: Tensor, spans: Tensor, leads: Tensor) -> Tensor:
        """Input of the next module: rows of `hidden`, behind what was carried where `leads` says so."""
        if hidden.shape[0] == 0 or not bool(leads.any()):
            return hidden
        if leads.numel() == 1:
            return torch.cat((self._carried[held], hidden))
        places: list[int] = []
        begin = 0
        for row, (span, led) in enumerate(zip(spans.tolist(), leads.tolist(), strict=True)):
            places += [hidden.shape[0] + row] if led else []
            places += range(begin, begin + span)
            begin += span
        return torch.cat((hidden, self._carried[held]))[places]

    def _carry(self, held: int, hidden: Tensor, starts: Tensor, spans: Tensor) -> None:
        """Keep what a module gave at slot L of each row, where it ran there."""
        ahead = self._cache.lengths - starts
        ran = (ahead >= 0) & (spans > 0)
        if hidden.shape[0] == 0 or not bool(ran.any()):
            return
        places = (spans.cumsum(0) - spans + ahead).clamp(0, hidden.shape[0] - 1)
        found = hidden[places.to(hidden.device)]
        self._carried[held] = torch.where(ran.unsqueeze(1).to(found.device), found, self._carried[held])


def _last_of(packed: Tensor, spans: Tensor) -> Tensor:
    """The last token of each row of packed [tokens, hidden]: [rows, hidden]."""
    if packed.shape[0] == 0 or spans.numel() == packed.shape[0]:
        return packed
    return packed[(spans.cumsum(0) - 1).to(packed.device)]
