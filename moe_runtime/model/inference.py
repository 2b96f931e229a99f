"""The forward for a few more tokens, with what came before in a latent cache.

`Transformer` runs whole sequences, for training. This is the same mathematics on the same parameters for
sequences that grow: tokens of all rows lie packed one after the other, so that rows of different lengths cost
what they hold, and only attention sees them apart. No tape, no phases; small things are done the short way,
because at one token a pass the number of operations is what costs.

MTP modules run here as drafters. Module d reads its hidden input for slot s at slot s-1 of what comes before
it: the main model for d = 0, module d-1 otherwise. Ref: DSV3 (21)-(23), in the form that `model/mtp.py` says.
"""

import torch
from torch import Tensor

from moe_comm.local import LocalDispatcher
from moe_runtime.model.block import Block
from moe_runtime.model.ffn import SwiGLU, gated
from moe_runtime.model.few_rows import few_rows, serves
from moe_runtime.model.latent_attention import LatentAttention, Reach, norm
from moe_runtime.model.latent_cache import LatentCache
from moe_runtime.model.moe import MoE
from moe_runtime.model.mtp import MTP
from moe_runtime.model.product import product
from moe_runtime.model.transformer import Transformer


class InferenceModel:
    """A whole model, experts perhaps on several ranks, that reads tokens into a latent cache.

    With experts on several ranks every rank has sequences of its own, perhaps none, and all ranks make the
    same calls in the same order.

    Args:
        model: has embedding and head; its parameters are used as they are at each call.
    """

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self._model = model
        self._rotary = model.blocks()[0].attn.rotary
        self._attention = [LatentAttention(block.attn) for block in model.blocks()]
        self._drafters = [module for module in model.mtp.values() if isinstance(module, MTP)]
        self._local = isinstance(model.dispatcher, LocalDispatcher)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self._model.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters, activations and latents."""
        return self._model.head.weight.dtype

    @property
    def spans_ranks(self) -> bool:
        """Whether experts lie on several ranks, which then have to make the same calls."""
        return not self._local

    def new_cache(self, rows: int, slots: int) -> LatentCache:
        """An empty cache for `rows` sequences of up to `slots` tokens, more if need be."""
        return LatentCache(self.config, rows, slots, self.dtype, self.device)

    @torch.no_grad()
    def read(self, cache: LatentCache, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Append tokens to the rows of a cache.

        Args:
            tokens: int64 [rows, new].
            counts: int64 [rows] on the CPU, how many of them each row has, from the left; None: all.

        Returns:
            The stream after the final norm, [tokens there, hidden], row after row.
        """
        new = tokens.shape[1]
        starts = cache.lengths
        counts = torch.full_like(starts, new) if counts is None else counts
        cache.reserve(_highest(starts + counts) + (new if cache.rows > 1 else 0))
        self.note(cache, tokens)
        reach = self._reach(cache, starts, counts, 0)
        resid = self._model.embed(reach.pack(tokens))
        for number, block in enumerate(self._model.layers.values()):
            assert isinstance(block, Block)
            resid = self._block(block, self._attention[number], resid, cache.latents[number], reach)
        cache.lengths = starts + counts
        return norm(self._model.norm, resid)

    @staticmethod
    def note(cache: LatentCache, tokens: Tensor, behind: int = 0) -> None:
        """Write tokens [rows, new] behind each row's end, `behind` slots further on; nothing is appended."""
        if cache.rows == 1:
            begin = int(cache.lengths[0]) + behind
            cache.tokens[:, begin : begin + tokens.shape[1]] = tokens
            return
        steps = torch.arange(behind, behind + tokens.shape[1])
        slots = (cache.lengths.unsqueeze(1) + steps).to(tokens.device)
        cache.tokens.scatter_(1, slots, tokens)

    @torch.no_grad()
    def draft(self, depth: int, cache: LatentCache, hidden: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
        """Run MTP module `depth` at slots whose tokens the cache holds; latents there are written.

        Args:
            hidden: [tokens, hidden], row after row, for each slot what stands one slot before it: the stream
                after the final norm for module 0, what `draft` gave for the module before otherwise.
            starts, counts: int64 [rows] on the CPU, first slot and number of slots of each row.

        Returns:
            [tokens, hidden], normed: `logits` of it are those of the token after each slot.
        """
        mtp = self._drafters[depth]
        reach = self._reach(cache, starts, counts, 1 + depth)
        window = reach.slots.clamp_max(cache.slots - 1)
        embedded = self._model.embed(reach.pack(cache.tokens.gather(1, window)))
        joined = torch.cat((norm(mtp.enorm, embedded), norm(mtp.hnorm, hidden)), dim=1)
        resid = product(joined, mtp.eh_proj.weight.t())
        number = self.config.num_layers + depth
        resid = self._block(mtp.block, self._attention[number], resid, cache.latents[number], reach)
        return norm(mtp.norm, resid)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden], normed -> [tokens, vocab]."""
        return product(hidden, self._model.head.weight.t())

    def _block(
        self, block: Block, attention: LatentAttention, resid: Tensor, latents: Tensor, reach: Reach
    ) -> Tensor:
        if resid.shape[0]:
            resid = resid + attention(norm(block.attn_norm, resid), latents, reach)
        x = norm(block.ffn_norm, resid)
        if block.moe is None:
            assert block.ffn is not None, f"{block.name} has no FFN"
            return resid + _ffn(block.ffn, x)
        if block.moe.shared is not None:
            resid = resid + _ffn(block.moe.shared, x)
        return resid + self._routed(block.moe, x)

    def _routed(self, moe: MoE, x: Tensor) -> Tensor:
        high = torch.promote_types(x.dtype, torch.float32)
        logits = torch.mm(x.to(high), moe.router.weight.to(high).t())
        weights, expert_ids, _ = moe.router.choose(logits)
        if self._local and serves(x, expert_ids):
            return few_rows(moe.experts, x, weights, expert_ids)
        dispatcher = self._model.dispatcher
        received = dispatcher.dispatch(x, weights, expert_ids).wait()
        rows = moe.experts(received.rows, received.row_weights, received.row_counts)
        return dispatcher.combine(rows, received.handle).wait()

    def _reach(self, cache: LatentCache, starts: Tensor, counts: Tensor, shift: int) -> Reach:
        """Where tokens at slots starts..starts+counts stand in a layer whose slots are `shift` late."""
        device, new = cache.tokens.device, _highest(counts)
        stops = starts + counts
        stop = _highest(stops)
        steps = torch.arange(new)
        even = bool((counts == new).all())
        slots = (starts.unsqueeze(1) + steps).to(device)
        valid = None if even else (steps < counts.unsqueeze(1)).to(device)
        high = torch.promote_types(self.dtype, torch.float32)
        table = self._rotary.table(max(stop, 1), high, device)
        reach = Reach(slots, valid, table[:0], shift, stop, None)
        turns = table.index_select(0, reach.pack(slots))
        separator = self._model.document_separator
        plain = separator is None
        if plain and even and new == 1 and bool((stops == stop).all()):
            return Reach(slots, valid, turns, shift, stop, None)
        reached = torch.arange(shift, max(stop, shift), device=device)
        mask = reached <= slots.unsqueeze(2)
        if separator is not None:
            mask &= reached >= _document_starts(cache.tokens, separator, slots - shift).unsqueeze(2) + shift
        causal = plain and bool((starts == shift).all())
        return Reach(slots, valid, turns, shift, stop, mask, causal)


def _highest(numbers: Tensor) -> int:
    return int(numbers.max()) if numbers.numel() else 0


def _ffn(ffn: SwiGLU, x: Tensor) -> Tensor:
    return product(gated(product(x, ffn.gate_up.weight.t())), ffn.down.weight.t())


def _document_starts(tokens: Tensor, separator: int, positions: Tensor) -> Tensor:
    """First position of the document that each position is in; a separator belongs to the one it ends.

    Args:
        tokens: int64 [rows, slots]; positions: int64 [rows, new].
    """
    behind = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    starts = torch.where(tokens == separator, behind, 0).cummax(dim=1).values
    starts = torch.nn.functional.pad(starts, (1, 0))
    return starts.gather(1, positions.clamp(0, tokens.shape[1]))
