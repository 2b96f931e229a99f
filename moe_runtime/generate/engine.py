"""Decoding of a batch over a latent cache, with or without drafts; one loop for both.

    prefill    prompts are read, in pieces that all end together; what a prefix store has is not read again
    pass       [token not yet read, k drafts] is read at once; drafts that stand, and one token more, are new
    drafts     MTP modules read the main model's outputs for what is new and draft k tokens again

Without drafts k is 0 and a pass gives one token. Refused drafts leave nothing: their slots lie beyond the
row's length and are written again. Tokens that come out are distributed as the main model alone has it
(`rejection.py`); greedily they are the same tokens, for each logit depends on the tokens before it alone.

Rows finish at different times; a finished row is dropped from the batch at once. With experts on several
ranks each rank runs its own requests, and all go on, with no rows if need be, until the last has finished.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_runtime.generate.drafter import Drafter
from moe_runtime.generate.draws import Draws
from moe_runtime.generate.rejection import verify
from moe_runtime.generate.request import Continuation, Request
from moe_runtime.generate.sampling import Filters, pick
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.latent_cache import LatentCache


class PrefixStore(Protocol):
    """Keeps latents of prompts: `prefix_cache.py`."""

    def find(self, tokens: Sequence[int]) -> Tensor | None:
        """Latents [layers, count, width] of the longest beginning of `tokens` that is known."""
        ...

    def store(self, tokens: Sequence[int], latents: Tensor) -> None:
        """Keep latents [layers, at least len(tokens), width] of these tokens."""
        ...


@dataclass(frozen=True)
class Piece:
    """New tokens of one request; `finished` once it has ended."""

    request: int
    tokens: list[int]
    finished: bool


class Engine:
    """Continues requests.

    Args:
        model: what continues them.
        num_drafts: tokens drafted a pass; 0: none. Needs MTP modules.
        store: where latents of prompts are looked up and kept; None: nowhere.
        prefill: tokens of each prompt read at a time.
        highest: of a number on this rank, the highest over the ranks that share the experts.
    """

    def __init__(
        self,
        model: InferenceModel,
        num_drafts: int = 0,
        store: PrefixStore | None = None,
        prefill: int = 1024,
        highest: Callable[[int], int] = lambda number: number,
    ) -> None:
        if num_drafts and not model.config.mtp_depth:
            raise ValueError("expected a model with MTP modules to draft with, got mtp_depth 0")
        self.model, self.num_drafts, self.store = model, num_drafts, store
        self.prefill, self.highest = prefill, highest

    @property
    def bytes_per_token(self) -> int:
        """What the latent cache takes for one token, over all layers."""
        return self.model.new_cache(0, 0).bytes_per_token

    def start(self, requests: Sequence[Request]) -> "Decoding":
        """Begin; iterating what is returned gives new tokens as they are made."""
        return Decoding(self, requests)

    def generate(self, requests: Sequence[Request]) -> list[Continuation]:
        """All new tokens at once."""
        decoding = self.start(requests)
        for _ in decoding:
            pass
        return decoding.results


class Decoding:
    """Some requests on their way: iterate over it for pieces.

    Attributes:
        results: what came of each request so far.
        alive: the request of each row that is still going on.
        cache: latents of these rows.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._model, self._requests = engine, engine.model, list(requests)
        self.results = [Continuation() for _ in requests]
        self.alive = list(range(len(self._requests)))
        longest = max((len(request.tokens) for request in self._requests), default=0)
        params = [request.params for request in self._requests]
        self._filters = Filters.of(params, self._model.device) if params else Filters(0.0, 0, 1.0)
        self._draws = Draws([one.seed for one in params], self._model.device)
        self._drawn = torch.zeros(len(params), dtype=torch.int64)  # new tokens of each row so far
        depth = self._model.config.mtp_depth
        modules = depth if engine.store is not None else min(depth, engine.num_drafts)
        self._ahead = 1 + max(modules, engine.num_drafts)  # slots behind a row's end that are written
        self.cache: LatentCache = self._model.new_cache(len(params), longest + self._ahead)
        self._drafter = Drafter(self._model, modules, self.cache) if modules else None
        self.draft_probs: list[Tensor] = []

    def __iter__(self) -> Iterator[Piece]:
        if not self._engine.highest(len(self.alive)):
            return
        hidden, counts = self._read_prompts()
        tokens = self._first_tokens(hidden, counts)
        yield from self._give([[token] for token in tokens.tolist()], None)
        drafted = self._engine.store is not None
        if drafted:
            self._draft(tokens, hidden, counts)
            self._store(range(len(self.alive)))
        rows, hidden, counts = self._drop_finished(hidden, counts)
        tokens = tokens[rows.to(tokens.device)]
        self.draft_probs = [probs[rows.to(probs.device)] for probs in self.draft_probs]
        while self._engine.highest(len(self.alive)):
            with self._without_tape():
                if not drafted:
                    self._draft(tokens, hidden, counts)
                drafted = False
                window, hidden, accepted, tokens = self._pass()
            counts = accepted + 1
            new = zip(window.tolist(), accepted.tolist(), tokens.tolist(), strict=True)
            yield from self._give([[*row[1 : 1 + stood], last] for row, stood, last in new], accepted)
            rows, hidden, counts = self._drop_finished(hidden, counts)
            tokens = tokens[rows.to(tokens.device)]

    def _without_tape(self) -> AbstractContextManager[Any]:
        """Each operation is a sixth cheaper so; not where exchanges look at versions of their inputs."""
        return torch.no_grad() if self._model.spans_ranks else torch.inference_mode()

    def _pass(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read the pending token and the drafts of each row.

        Returns:
            what was read [rows, drafts + 1], outputs at what stood, packed, how many drafts stood, on the
            CPU, and the next token [rows].
        """
        model, cache, num_drafts = self._model, self.cache, self._engine.num_drafts
        ahead = torch.arange(num_drafts + 1)
        if cache.rows == 1:
            begin = int(cache.lengths[0])
            window = cache.tokens[:, begin : begin + num_drafts + 1]
        else:
            window = cache.tokens.gather(1, (cache.lengths.unsqueeze(1) + ahead).to(cache.tokens.device))
        hidden = model.read(cache, window)
        if not self.alive:
            return window, hidden, cache.lengths, window[:, 0]
        logits = model.logits(hidden).view(*window.shape, -1)
        index = self._drawn.unsqueeze(1) + ahead
        pick_u = self._draws.at("pick", index)
        if num_drafts:
            draft = torch.stack(self.draft_probs, dim=1)
            accept_u = self._draws.at("accept", index[:, :-1])
            accepted, tokens = verify(self._filters.probs(logits), draft, window[:, 1:], accept_u, pick_u)
            if cache.rows == 1:
                hidden = hidden[: int(accepted[0]) + 1]
            else:
                hidden = hidden.view(*window.shape, -1)[(ahead <= accepted.unsqueeze(1)).to(hidden.device)]
        else:
            tokens = pick(self._filters.probs(logits.squeeze(1)), pick_u.squeeze(1))
            accepted = torch.zeros_like(cache.lengths)
        cache.lengths = cache.lengths - num_drafts + accepted
        self._drawn = self._drawn + accepted + 1
        return window, hidden, accepted, tokens

    def _draft(self, tokens: Tensor, hidden: Tensor, counts: Tensor) -> None:
        """Write the pending tokens [rows] behind each row, and drafts behind them."""
        self.cache.reserve(int(self.cache.lengths.max()) + self._ahead if self.alive else 0)
        self._model.note(self.cache, tokens.unsqueeze(1))
        self.draft_probs = []
        if self._drafter is not None:
            self._drafter.propose(hidden, counts, self._engine.num_drafts, self.draw_draft)

    def draw_draft(self, position: int, logits: Tensor) -> Tensor:
        if not self.alive:
            return logits.new_zeros(0, dtype=torch.int64)
        self.draft_probs.append(self._filters.probs(logits))
        return pick(self.draft_probs[-1], self._draws.at("draft", self._drawn + position))

    def _first_tokens(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """A token behind each prompt: int64 [rows]."""
        if not self.alive:
            return self.cache.tokens[:, 0]
        last = hidden[(counts.cumsum(0) - 1).to(hidden.device)]
        probs = self._filters.probs(self._model.logits(last))
        tokens = pick(probs, self._draws.at("pick", self._drawn))
        self._drawn = self._drawn + 1
        return tokens

    def _read_prompts(self) -> tuple[Tensor, Tensor]:
        """Read all prompts; outputs of the last piece, packed, and its length in each row."""
        lengths = torch.tensor([len(request.tokens) for request in self._requests], dtype=torch.int64)
        for row, request in enumerate(self._requests):
            self.begin(row, list(request.tokens))
        piece = self._engine.prefill
        rest = lengths - self.cache.lengths
        pieces = self._engine.highest(-(-int(rest.max()) // piece) if self.alive else 0)
        hidden = torch.empty(0)
        counts = rest
        for left in reversed(range(pieces)):  # they end together: a short prompt waits for the last piece
            counts = (lengths - left * piece - self.cache.lengths).clamp(min=0)
            new = int(counts.max()) if self.alive else 0
            slots = (self.cache.lengths.unsqueeze(1) + torch.arange(new)).clamp(max=self.cache.slots - 1)
            window = self.cache.tokens.gather(1, slots.to(self.cache.tokens.device))
            hidden = self._model.read(self.cache, window, counts)
            if left and self._drafter is not None:
                self._drafter.propose(hidden, counts, 0, self.draw_draft)
        return hidden, counts

    def begin(self, row: int, tokens: list[int]) -> None:
        """Put a prompt's tokens into the cache, and latents that the store has."""
        result, store = self.results[row], self._engine.store
        found = store.find(tokens) if store is not None else None
        hit = 0 if found is None else min(found.shape[1], len(tokens) - 1)
        here = self.cache.tokens.device
        self.cache.tokens[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device=here)
        if found is not None:
            self.cache.fill(row, found[:, :hit], torch.tensor(tokens[:hit], dtype=torch.int64))
            # Drafting needs the outputs of the last tokens too, which are not kept: they are read again.
            self.cache.lengths[row] = max(0, hit - self._model.config.mtp_depth)
        result.prompt_cache_hit_tokens, result.prompt_cache_miss_tokens = hit, len(tokens) - hit

    def _give(self, new: list[list[int]], accepted: Tensor | None) -> Iterator[Piece]:
        """Hand new tokens of each row to its request."""
        for row, (number, tokens) in enumerate(zip(list(self.alive), new, strict=True)):
            result = self.results[number]
            if accepted is not None:
                result.count_drafts(self._engine.num_drafts, int(accepted[row]))
            given = result.take(self._requests[number], tokens)
            yield Piece(number, given, result.finish_reason is not None)

    def _drop_finished(self, hidden: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drop rows whose request has ended; which are left, and what is left of packed outputs."""
        going = torch.tensor(
            [self.results[one].finish_reason is None for one in self.alive], dtype=torch.bool
        )
        rows = going.nonzero().squeeze(1)
        if bool(going.all()):
            return rows, hidden, counts
        if self._engine.store is not None:
            self._store((~going).nonzero().squeeze(1).tolist())
        hidden = hidden[going.repeat_interleave(counts).to(hidden.device)]
        self.alive = [self.alive[row] for row in rows.tolist()]
        self.cache.keep(rows)
        self._filters = self._filters.keep(rows.to(self._model.device))
        self._draws = self._draws.keep(rows.tolist())
        self._drawn = self._drawn[rows]
        if self._drafter is not None:
            self._drafter.keep(rows)
        return rows, hidden, counts[rows]

    def _store(self, rows: Iterable[int]) -> None:
        """Keep what is known of some rows: latents of the main model and of all MTP modules."""
        assert self._engine.store is not None
        for row in rows:
            known = int(self.cache.lengths[row])
            if self._drafter is not None:
                known = min(known, int(self._drafter.known[row]))
            tokens = self.cache.tokens[row, :known].tolist()
            self._engine.store.store(tokens, self.cache.latents[:, row, :known])
