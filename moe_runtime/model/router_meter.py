"""What a router's choices look like: sums over tokens, taken where the logits are at hand.

Logits, biased affinities and chosen experts are in memory for a moment in the forward pass; keeping them
for later would cost [tokens, experts] a layer and microbatch. So what is wanted of them is summed there, on
the device, into a small table that is read once a step: nothing waits for a GPU. Sums rather than means, so
that those of microbatches, lanes and mirrored rows add up to that of the global batch.

Only a forward pass that trains counts: without gradients (evaluation, samples) nothing is added, and a
forward pass that is run again begins with an empty table.
"""

import time

import torch
from torch import Tensor

QUANTITIES = ("logit_square", "z_loss", "top_k_margin", "nodes")  # columns of the table


class RouterMeter:
    """Sums of one MoE layer.

    Args:
        sums: FP64 [len(QUANTITIES)], added to; a row of the table of all layers.
        node_of: int64 [experts], the node of each expert; None where all are on one.
        spent: `spent.append(seconds)` hears what the measuring took on the host.

    The columns are sums over tokens: of the squares of a token's logits; of (ln sum exp logits)^2; of the
    distance in biased affinity between the last expert chosen and the first one not chosen, of those that
    could be; of the nodes that hold the token's experts.

    Few operations rather than small ones: what an operation costs is to be started, on a GPU and, between
    large products that have the caches to themselves, on a CPU too.
    """

    def __init__(self, sums: Tensor, node_of: Tensor | None, spent: list[float]) -> None:
        self._sums, self._node_of, self._spent = sums, node_of, spent
        self._num_nodes = 1 if node_of is None else int(node_of.max()) + 1
        self.tokens = 0  # of which the node is known without looking, and which are not in the sums

    @torch.no_grad()
    def add(self, logits: Tensor, biased: Tensor, expert_ids: Tensor) -> None:
        """Count the tokens of one forward pass.

        Args:
            logits: [tokens, experts].
            biased: affinities with their bias [tokens, experts], -inf for experts of groups left out.
            expert_ids: int64 [tokens, top_k].
        """
        begun = time.perf_counter()
        # Not logsumexp, which takes twice as many operations: a logit of 88, where this ends, is past mending.
        flat, log_sums = logits.reshape(-1), logits.exp().sum(dim=-1).log()
        last_chosen = biased.gather(1, expert_ids).amin(dim=-1)
        first_left = biased.scatter(1, expert_ids, float("-inf")).amax(dim=-1)
        found = [torch.dot(flat, flat), torch.dot(log_sums, log_sums), (last_chosen - first_left).sum()]
        if self._node_of is None:
            self.tokens += len(expert_ids)
        else:
            found.append(self._nodes(self._node_of[expert_ids], found[0].dtype))
        self._sums[: len(found)] += torch.stack(found)
        self._spent.append(time.perf_counter() - begun)

    def _nodes(self, nodes: Tensor, dtype: torch.dtype) -> Tensor:
        """How many different ones of `nodes` [tokens, top_k] a token has, summed over tokens."""
        reached = torch.zeros(len(nodes), self._num_nodes, dtype=dtype, device=nodes.device)
        return reached.scatter_(1, nodes, 1.0).sum()
