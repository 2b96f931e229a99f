"""The oracle of the layout tests: the plain model on one process, autograd and torch AdamW.

Nothing of `moe_runtime.parallel` is used here.
"""

from dataclasses import dataclass

import torch
from moe_comm.local import LocalDispatcher
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_runtime.build import DTYPES
from moe_runtime.config.schema import RunConfig
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.phase import Compute, Phase
from moe_runtime.model.router import update_bias
from moe_runtime.model.transformer import Losses, Transformer


@dataclass
class PlainStep:
    """What one step of the plain model gives."""

    losses: Losses
    grads: dict[str, Tensor]
    norm: float


class PlainModel:
    """The whole model on one process."""

    def __init__(
        self,
        config: RunConfig,
        biases: dict[int, float],
        document_separator: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.config = config
        is_fp8 = config.precision == "fp8"
        self.model = Transformer(
            config.model,
            recompute=config.recompute,
            dtype=DTYPES[config.precision],
            device=device,
            document_separator=document_separator,
            dispatcher=LocalDispatcher(config.model.num_experts, keep_tiles=is_fp8),
        )
        self.model.init_weights(config.seed)
        if is_fp8:
            use_fp8(self.model, Policy(config.fp8), WeightCasts())
        preset_biases(self.model, biases)
        decays = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=optim.peak_lr,
            betas=optim.betas,
            eps=optim.eps,
        )

    def forward_backward(self, tokens: Tensor, mtp_lambda: float) -> PlainStep:
        """Gradients of the objective over all sequences [sequences, seq + 1 + mtp_depth]."""
        self.model.zero_grad()
        phases = tuple(map(self._by_torch, self.model.phases()))
        losses = self.model.run_phases(phases, {"tokens": tokens})
        depth = max(1, self.config.model.mtp_depth)
        alpha = self.config.recipe.balance_alpha
        terms = (losses.loss, mtp_lambda / depth * losses.loss_mtp, alpha * losses.balance)
        sum(term for term in terms if not term.isnan()).backward()
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.model.named_parameters()
        }
        norm = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum().sqrt()
        return PlainStep(losses, grads, float(norm))

    def _by_torch(self, phase: Phase) -> Phase:
        """A loss as torch's cross-entropy has it: a mean over the targets alone, NaN without any."""
        if phase.name != "loss":
            return phase
        shift = 1 if phase.layer == "head" else 2 + int(phase.layer.removeprefix("mtp."))

        def loss(hidden: Tensor, tokens: Tensor) -> tuple[Tensor]:
            targets = tokens[:, shift : shift + hidden.shape[1]].flatten()
            if bool((targets >= 0).all()):  # a mean over all tokens is the same, and rounds as in the layouts
                return phase.fn(hidden, tokens)
            logits = (hidden @ self.model.head.weight.t()).flatten(0, 1)
            high = torch.promote_types(logits.dtype, torch.float32)
            return (cross_entropy(logits.to(high), targets.where(targets >= 0, -100)),)

        return Compute("loss", phase.layer, loss, phase.inputs, phase.outputs)

    def update(self, done: PlainStep, lr: float, gamma: float) -> None:
        """Clip, AdamW, biases."""
        clip = self.config.optim.grad_clip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if clip and done.norm > clip:
            for param in self.model.parameters():
                if param.grad is not None:
                    param.grad.mul_(clip / done.norm)
        self.optimizer.step()
        for (_, moe), counts in zip(self.model.moe_layers(), done.losses.counts, strict=True):
            update_bias(moe.router.bias, counts, gamma)


def preset_biases(model: Transformer, biases: dict[int, float]) -> None:
    """Set the routing bias of single experts in every layer, to idle or flood them."""
    for _, moe in model.moe_layers():
        for expert, bias in biases.items():
            moe.router.bias[expert] = bias
