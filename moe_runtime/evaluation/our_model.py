"""Our models as evaluation asks for them: ragged batches over a latent cache.

Choices of one item mostly have the same context. It is read once, its row of the cache is copied for each
choice, and only the choices are read on: for four short answers to a long question that is nearly four times
less
    work.
The first token of a continuation is predicted by the last of the context, so reading stops one token early,
and a continuation of one token costs nothing more.

Batches are made of rows of like length; what bounds them is slots of cache, not rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.data.vocabulary import Tokenizer, decode_bytes
from moe_runtime.evaluation.language_model import Pair, Prompt
from moe_runtime.generate.engine import Engine
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.generate.text import TextStream
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.latent_cache import LatentCache
from moe_runtime.model.loss import token_losses
from moe_runtime.model.transformer import Transformer

BATCH_SLOTS = 16 * 1024
BATCH_ROWS = 64


@dataclass(frozen=True)
class _Group:
    """Continuations of one context: their places among the pairs."""

    context: tuple[int, ...]
    places: list[int]


class OurModel:
    """A model of ours on one device.

    Args:
        name: where it comes from.
        model: the whole model.
        tokenizer: its own.
        context: tokens that it sees at most, such as those of its training sequences.
        stop_ids: end a text besides the tokenizer's.
        batch_slots, batch_rows: largest batch; other sizes give the same figures but for rounding.
    """

    def __init__(
        self,
        name: str,
        model: Transformer,
        tokenizer: Tokenizer,
        context: int,
        stop_ids: frozenset[int] = frozenset(),
        batch_slots: int = BATCH_SLOTS,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        self.name, self.context, self.start_id = name, context, tokenizer.eos_id
        self._model, self._tokenizer, self._head = (
            InferenceModel(model),
            tokenizer,
            model.head.weight.detach(),
        )
        self._stop_ids = stop_ids | {tokenizer.eos_id}
        self._slots, self._rows = batch_slots, batch_rows

    def encode(self, text: str, at_start: bool) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def spell(self, ids: Sequence[int]) -> bytes:
        return decode_bytes(self._tokenizer, ids)

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[float]:
        groups: dict[tuple[int, ...], _Group] = {}
        for place, pair in enumerate(pairs):
            groups.setdefault(pair.context, _Group(pair.context, [])).places.append(place)
        found = [0.0] * len(pairs)
        for batch in self._batches(list(groups.values()), pairs):
            places = [place for group in batch for place in group.places]
            for place, value in zip(places, self._scored(batch, [pairs[one] for one in places]), strict=True):
                found[place] = value
        return found

    def continue_texts(self, prompts: Sequence[Prompt]) -> list[str]:
        engine, texts = Engine(self._model), [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].context))
        for first in range(0, len(order), self._rows):
            places = order[first : first + self._rows]
            streams = [TextStream(self._tokenizer.id_bytes, prompts[place].stop) for place in places]
            requests = [
                Request(
                    prompts[place].context,
                    prompts[place].max_tokens,
                    SamplingParams(temperature=0.0),
                    self._stop_ids,
                    stream,
                )
                for place, stream in zip(places, streams, strict=True)
            ]
            engine.generate(requests)
            for place, stream in zip(places, streams, strict=True):
                texts[place] = stream.take(finish=True)
        return texts

    @torch.no_grad()
    def token_nats(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in windows]
        for places in self._alike([len(window) - 1 for window in windows]):
            batch = [windows[place] for place in places]
            cache = self._model.new_cache(len(batch), max(map(len, batch)))
            nats = self._nats(self._read(cache, [one[:-1] for one in batch]), [one[1:] for one in batch])
            for place, one in zip(places, nats, strict=True):
                found[place] = one.tolist()
        return found

    def _batches(self, groups: list[_Group], pairs: Sequence[Pair]) -> Iterator[list[_Group]]:
        """Groups of like length, in batches that the cache has room for once contexts are copied."""
        groups.sort(key=lambda group: -len(group.context))
        batch: list[_Group] = []
        rows = slots = 0
        for group in groups:
            longest = len(group.context) + max(len(pairs[place].continuation) for place in group.places)
            wide, many = max(slots, longest), rows + len(group.places)
            if batch and (many * wide > self._slots or many > self._rows):
                yield batch
                batch, wide, many = [], longest, len(group.places)
            batch.append(group)
            rows, slots = many, wide
        if batch:
            yield batch

    def _scored(self, batch: list[_Group], pairs: list[Pair]) -> list[float]:
        """Log-likelihoods of the pairs of some groups, in the order of the groups."""
        counts = torch.tensor([len(group.context) for group in batch])
        cache = self._model.new_cache(len(batch), int(counts.max()))
        hidden = self._read(cache, [group.context for group in batch])
        last = torch.stack([row[-1] for row in hidden])
        copies = torch.tensor([row for row, group in enumerate(batch) for _ in group.places])
        first = last.index_select(0, copies.to(last.device)).split(1)
        rest = [pair.continuation[:-1] for pair in pairs]
        if any(rest):
            cache.keep(copies)
            first = [torch.cat(both) for both in zip(first, self._read(cache, rest), strict=True)]
        nats = self._nats(list(first), [pair.continuation for pair in pairs])
        return [-float(one.double().sum()) for one in nats]

    def _read(self, cache: LatentCache, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append ids to each row; what comes out of the final norm at each, [ids, hidden] a row."""
        counts = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(counts.max()), dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        hidden = self._model.read(cache, tokens.to(self._model.device), counts)
        return list(hidden.split(counts.tolist()))

    def _nats(self, hidden: list[Tensor], targets: Sequence[Sequence[int]]) -> list[Tensor]:
        """Cross-entropy of each row's targets, where each has as many as there are outputs."""
        ids = [token for row in targets for token in row]
        wanted = torch.tensor(ids, dtype=torch.int64, device=self._model.device)
        flat = token_losses(torch.cat(hidden), self._head, wanted)
        return list(flat.cpu().split([len(row) for row in targets]))

    def _alike(self, lengths: list[int]) -> Iterator[list[int]]:
        """Places in batches of like length, longest first."""
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        while order:
            rows = min(self._rows, max(1, self._slots // max(1, lengths[order[0]])))
            yield order[:rows]
            order = order[rows:]
