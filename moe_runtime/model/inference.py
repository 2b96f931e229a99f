"""The forward for a few more tokens, with what came before in a latent cache.

`Transformer` runs whole sequences, for training. This is the same mathematics on the same parameters for
sequences that grow: tokens of all rows lie packed one after the other, so that rows of different lengths cost
what they hold, and only attention sees them apart. No tape, no phases; small things are done the short way,
because at one token a pass the number of operations is what costs.

MTP modules run here as drafters. Module d reads its hidden input for slot s at slot s-1 of what comes before
it: the main model for d = 0, module d-1 otherwise. Ref: DSV3 (21)-(23), in the form that `model/mtp.py` says.
"""

import torch
from moe_comm.local import LocalDispatcher
from torch import Tensor

from moe_runtime.model.block import Block
from moe_runtime.model.ffn import gated
from moe_runtime.model.key_value_attention import KeyValueAttention
from moe_runtime.model.latent_attention import LatentAttention, Norm
from moe_runtime.model.latent_cache import LatentCache
from moe_runtime.model.local_experts import LocalExperts, serves
from moe_runtime.model.mha import MHA
from moe_runtime.model.moe import MoE
from moe_runtime.model.mtp import MTP
from moe_runtime.model.product import product, unrounded_product
from moe_runtime.model.reach import Reach
from moe_runtime.model.transformer import Transformer


class InferenceModel:
    """A whole model, experts perhaps on several ranks, that reads tokens into a latent cache.

    With experts on several ranks every rank has sequences of its own, perhaps none, and all ranks make the
    same calls in the same order.

    Args:
        model: has embedding and head; its parameters are read where they lie.

    Attributes:
        spans_ranks: experts lie on several ranks, which then have to make the same calls.
    """

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self._dispatcher, self._separator = model.dispatcher, model.document_separator
        local = isinstance(model.dispatcher, LocalDispatcher)
        self.spans_ranks = not local
        self._embedding, self._head = model.embed.weight.detach(), model.head.weight.detach().t()
        self._norm, self._rotary = Norm(model.norm), model.blocks()[0].attn.rotary
        self._layers = [_Layer(block, local) for block in model.layers.values() if isinstance(block, Block)]
        self._drafters = [_Drafter(mtp, local) for mtp in model.mtp.values() if isinstance(mtp, MTP)]
        self._high = torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self._head.device

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters, activations and latents."""
        return self._head.dtype

    def new_cache(self, rows: int, slots: int) -> LatentCache:
        """An empty cache for `rows` sequences of up to `slots` tokens, more if need be."""
        return LatentCache(self.config, rows, slots, self.dtype, self.device)

    def read(self, cache: LatentCache, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Append tokens to the rows of a cache.

        Args:
            tokens: int64 [rows, new].
            counts: int64 [rows] on the CPU, how many of them each row has, from the left; None: all.

        Returns:
            The stream after the final norm, [tokens there, hidden], row after row.
        """
        starts = cache.lengths
        if counts is None:
            counts = torch.full_like(starts, tokens.shape[1])
        else:
            tokens = tokens[:, : _highest(counts)]
        cache.reserve(_highest(starts) + tokens.shape[1])
        self.note(cache, tokens)
        reach = self._reach(cache, starts, counts, 0)
        resid = self._embedding.index_select(0, reach.pack(tokens))
        for number, layer in enumerate(self._layers):
            resid = self._block(layer, resid, cache.latents[number], reach)
        cache.lengths = starts + counts
        return self._norm(resid)

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

    def draft(self, depth: int, cache: LatentCache, hidden: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
        """Run MTP module `depth` at slots whose tokens the cache holds; latents there are written.

        Args:
            hidden: [tokens, hidden], row after row, for each slot what stands one slot before it: the stream
                after the final norm for module 0, what `draft` gave for the module before otherwise.
            starts, counts: int64 [rows] on the CPU, first slot and number of slots of each row.

        Returns:
            [tokens, hidden], normed: `logits` of it are those of the token after each slot.
        """
        drafter = self._drafters[depth]
        reach = self._reach(cache, starts, counts, 1 + depth)
        if cache.rows == 1:
            tokens = cache.tokens[0, reach.stop - reach.slots.shape[1] : reach.stop]
        else:
            tokens = reach.pack(cache.tokens.gather(1, reach.slots.clamp_max(cache.slots - 1)))
        embedded = self._embedding.index_select(0, tokens)
        joined = torch.cat((drafter.enorm(embedded), drafter.hnorm(hidden)), dim=1)
        latents = cache.latents[self.config.num_layers + depth]
        return drafter.norm(self._block(drafter.layer, product(joined, drafter.eh_proj), latents, reach))

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden], normed -> [tokens, vocab]."""
        return product(hidden, self._head)

    def _block(self, layer: "_Layer", resid: Tensor, latents: Tensor, reach: Reach) -> Tensor:
        if resid.shape[0]:  # a rank without sequences runs the exchanges alone
            resid = resid + layer.attention(layer.attn_norm(resid), latents, reach)
        x = layer.ffn_norm(resid)
        if layer.ffn is not None:  # of a dense layer, or the shared experts
            resid = resid + product(gated(product(x, layer.ffn[0])), layer.ffn[1])
        return resid if layer.moe is None else resid + self._routed(layer, layer.moe, x)

    def _routed(self, layer: "_Layer", moe: MoE, x: Tensor) -> Tensor:
        logits = unrounded_product(x, layer.router, self._high)
        weights, expert_ids, _ = moe.router.choose(logits)
        if layer.experts is not None:
            return layer.experts(x, weights, expert_ids)
        with torch.no_grad():
            received = self._dispatcher.dispatch(x, weights, expert_ids).wait()
            rows = moe.experts(received.rows, received.row_weights, received.row_counts)
            return self._dispatcher.combine(rows, received.handle).wait()

    def _reach(self, cache: LatentCache, starts: Tensor, counts: Tensor, shift: int) -> Reach:
        """Where tokens at slots starts..starts+counts stand in a layer whose slots are `shift` late."""
        if cache.rows == 1:
            return self._reach_of_one(cache, int(starts[0]), int(counts[0]), shift)
        device, new = cache.tokens.device, _highest(counts)
        stop = _highest(starts + counts)
        steps = torch.arange(new)
        even = bool((counts == new).all())
        slots = (starts.unsqueeze(1) + steps).to(device)
        valid = None if even else (steps < counts.unsqueeze(1)).to(device)
        there = slots.flatten() if valid is None else slots[valid]
        turns = self._turns(stop).index_select(0, there)
        alike = even and new == 1 and bool((starts == starts[:1]).all())
        plain = self._separator is None
        causal = plain and bool((starts == shift).all())
        begins = self._begins(cache, slots, shift)
        return Reach(slots, valid, turns, shift, stop, begins, not (alike and plain), causal)

    def _reach_of_one(self, cache: LatentCache, start: int, count: int, shift: int) -> Reach:
        """The same for one row, with less ado."""
        stop = start + count
        slots = torch.arange(start, stop, device=cache.tokens.device).unsqueeze(0)
        plain = self._separator is None
        turns, begins = self._turns(stop)[start:stop], self._begins(cache, slots, shift)
        limited = not (plain and count == 1)
        return Reach(slots, None, turns, shift, stop, begins, limited, plain and start == shift)

    def _turns(self, stop: int) -> Tensor:
        """Rotary turns of all slots below `stop`, and perhaps of more."""
        return self._rotary.table(max(stop, 1), self._high, self.device)

    def _begins(self, cache: LatentCache, slots: Tensor, shift: int) -> Tensor | None:
        """First slot of the document of each token at `slots` [rows, new], where documents are apart."""
        if self._separator is None:
            return None
        return _document_starts(cache.tokens, self._separator, slots - shift) + shift


class _Layer:
    """A block's weights as a pass reads them: detached, so that nothing is taped, and transposed."""

    def __init__(self, block: Block, local: bool) -> None:
        self.attn_norm, self.ffn_norm = Norm(block.attn_norm), Norm(block.ffn_norm)
        attn = block.attn
        self.attention = KeyValueAttention(attn) if isinstance(attn, MHA) else LatentAttention(attn)
        self.moe = block.moe
        ffn = block.ffn if block.moe is None else block.moe.shared
        self.ffn = None if ffn is None else (ffn.gate_up.weight.detach().t(), ffn.down.weight.detach().t())
        self.experts: LocalExperts | None = None
        if block.moe is not None:
            self.router = block.moe.router.weight.detach().t()
            experts = block.moe.experts
            self.experts = LocalExperts(experts) if local and serves(experts) else None


class _Drafter:
    """An MTP module's weights in the same way."""

    def __init__(self, mtp: MTP, local: bool) -> None:
        self.enorm, self.hnorm, self.norm = Norm(mtp.enorm), Norm(mtp.hnorm), Norm(mtp.norm)
        self.eh_proj = mtp.eh_proj.weight.detach().t()
        self.layer = _Layer(mtp.block, local)


def _highest(numbers: Tensor) -> int:
    return int(numbers.max()) if numbers.numel() else 0


def _document_starts(tokens: Tensor, separator: int, positions: Tensor) -> Tensor:
    """First position of the document that each position is in; a separator belongs to the one it ends.

    Args:
        tokens: int64 [rows, slots]; positions: int64 [rows, new].
    """
    behind = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    starts = torch.where(tokens == separator, behind, 0).cummax(dim=1).values
    starts = torch.nn.functional.pad(starts, (1, 0))
    return starts.gather(1, positions.clamp(0, tokens.shape[1]))
