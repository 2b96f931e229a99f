"""A stage of our model as a plain module, for pipelines of others: the same blocks under autograd."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.cli.bench_pipeline.exchange import PlainExchange
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.model.loss import head_loss
from moe_runtime.model.phase import Combine, Compute, Dispatch
from moe_runtime.model.transformer import Transformer


class PeerStage(nn.Module):
    """One of `num_stages` equal slices of the model.

    Args:
        config: of the run.
        stage: number of the slice.
        num_stages: how many there are.
        ep_rank: says which experts are held.
        exchange: carries tokens.
    """

    def __init__(
        self, config: RunConfig, stage: int, num_stages: int, ep_rank: int, exchange: PlainExchange
    ) -> None:
        super().__init__()
        if config.model.num_layers % num_stages:
            raise ConfigError(f"{num_stages} stages do not divide {config.model.num_layers} layers")
        layers = config.model.num_layers // num_stages
        local = config.model.num_experts // config.layout.ep
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.chunk = Transformer(
            config.model,
            layers=range(stage * layers, (stage + 1) * layers),
            has_embedding=self.is_first,
            has_head=self.is_last,
            num_local_experts=local,
            first_expert=ep_rank * local,
        )
        self.chunk.init_weights(config.seed)
        self._exchange = exchange
        self._phases = [phase for phase in self.chunk.phases() if phase.name != "loss"]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [sequences, seq_len + 1] or the stream [sequences, seq_len, hidden] -> the stream.

        The last stage norms it; `loss` does the rest.
        """
        state: dict[str, Any] = {"tokens" if self.is_first else "resid": x}
        for phase in self._phases:
            if isinstance(phase, Dispatch):
                tokens = state["ffn_in"].flatten(0, 1)
                state["rows"], route = self._exchange.dispatch(tokens, state["expert_ids"])
                # Gate weights stay at home and are applied there.
                state["row_weights"] = torch.ones(state["rows"].shape[0])
                state["row_counts"], state["route"] = route.row_counts, route
            elif isinstance(phase, Combine):
                routed = self._exchange.combine(state["expert_out"], state["gate_weights"], state["route"])
                state["routed"] = routed.view_as(state["resid"])
            else:
                assert isinstance(phase, Compute)
                outputs = phase.fn(*(state[slot] for slot in phase.inputs))
                state.update(zip(phase.outputs, outputs, strict=True))
        out: Tensor = state["hidden" if self.is_last else "resid"]
        return out

    def loss(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of the last stage's output."""
        return head_loss(hidden, self.chunk.head.weight, tokens[:, 1:])


def held_stages(pp_rank: int, pp: int, chunks: int) -> list[int]:
    """Stages of a pipeline rank: its own, and in a V the one on the way back."""
    return [pp_rank, 2 * pp - 1 - pp_rank] if chunks == 2 else [pp_rank]
