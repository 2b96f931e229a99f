"""The slice under training: one set of weights and moments, multiplied in BF16 or in FP8.

Both precisions share everything that fills memory, so that both are measured with as many experts as fit,
in turn and in one process. A step is what a rank of a run does: several microbatches whose gradients are
summed in FP32, AdamW on FP32 masters with FP8 moments, and the new BF16 weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from moe_comm.dispatcher import Dispatcher
from moe_comm.local import LocalDispatcher
from torch import Tensor, nn

from moe_runtime.config.schema import ModelConfig
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.transformer import Transformer
from moe_runtime.optim.adamw import AdamW
from moe_runtime.parallel.weight_grad import WeightGradSink, ensure_accumulator

PRECISIONS = ("bf16", "fp8")
BALANCE_ALPHA = 1e-4


@dataclass(frozen=True)
class Form:
    """A precision: what each layer computes with, and what carries tokens to experts."""

    layers: list[tuple[nn.Module, str, Any]]
    dispatcher: Dispatcher


class Subject:
    """A model that trains in either precision.

    Args:
        config: of the slice.
        device: where it is.
        seed: of the weights, which are drawn on the device.
    """

    def __init__(self, config: ModelConfig, device: torch.device, seed: int = 1) -> None:
        self.model = Transformer(config, dtype=torch.bfloat16, device=device)
        self._casts = WeightCasts()
        draw_weights(self.model, config.init_std, seed)
        plain = _attributes(self.model)
        use_fp8(self.model, Policy(), self._casts)
        replaced = [
            (module, name, before, after)
            for (module, name, before), (_, _, after) in zip(plain, _attributes(self.model), strict=True)
            if before is not after
        ]
        self._forms = {
            "bf16": Form([entry[:3] for entry in replaced], LocalDispatcher(config.num_experts)),
            "fp8": Form(
                [(module, name, after) for module, name, _, after in replaced],
                LocalDispatcher(config.num_experts, keep_tiles=True),
            ),
        }
        self._params: list[Tensor] = list(self.model.parameters())
        WeightGradSink().install(self.model.parameters())
        self._masters: list[Tensor] = [nn.Parameter(param.detach().float()) for param in self._params]
        self._grads = [ensure_accumulator(param) for param in self.model.parameters()]
        self._optimizer = AdamW(self._masters, lr=1e-4, moments="fp8")
        for master, grad in zip(self._masters, self._grads, strict=True):
            master.grad = grad
        self.use("bf16")

    def use(self, precision: str) -> None:
        """Multiply in that precision from now on."""
        form = self._forms[precision]
        for module, name, value in form.layers:
            setattr(module, name, value)
        self.model.dispatcher = form.dispatcher
        self._casts.drop()

    def add_gradients(self, tokens: Tensor) -> Tensor:
        """Forward and backward of one microbatch, int64 [sequences, seq_len + 1]; gives its loss."""
        losses = self.model.losses(tokens)
        (losses.loss + BALANCE_ALPHA * losses.balance).backward()
        return losses.loss.detach()

    @torch.no_grad()
    def loss(self, tokens: Tensor) -> Tensor:
        """The loss of one microbatch, without gradients."""
        return self.model.losses(tokens).loss

    @torch.no_grad()
    def update(self) -> None:
        """AdamW, the BF16 weights anew, gradients back to zero."""
        self._optimizer.step()
        torch._foreach_copy_(self._params, self._masters)
        torch._foreach_zero_(self._grads)
        self._casts.drop()


def _attributes(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(module, name, value) of every attribute of every layer; the policy replaces some."""
    return [(module, name, value) for module in model.modules() for name, value in vars(module).items()]


@torch.no_grad()
def draw_weights(model: nn.Module, std: float, seed: int) -> None:
    """Normal matrices, gains of one, drawn where they live; `init_weights` would draw for minutes."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            param.fill_(1.0)
        else:
            param.normal_(0.0, std, generator=generator)
    for buffer in model.buffers():
        buffer.zero_()
