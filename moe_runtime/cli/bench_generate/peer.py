"""transformers' cached `generate` on the same weights."""

from typing import Any

import torch
from torch import nn

from moe_runtime.cli.bench_train import copy_weights, open_peer
from moe_runtime.errors import ConfigError
from moe_runtime.model.transformer import Transformer


class Peer:
    """transformers' model with the weights of ours, MTP modules left out.

    Raises:
        ConfigError: transformers is not installed, or the model has YaRN, which is not compared here, or no
            latents.
    """

    def __init__(self, model: Transformer) -> None:
        if model.config.yarn is not None:
            raise ConfigError(
                "bench generate: expected a model without YaRN to compare with transformers, got one"
            )
        if not self.knows(model):
            raise ConfigError("bench generate: transformers has no DeepSeek-V3 with model.attention mha")
        weight = model.head.weight
        self._model: nn.Module = open_peer(model.config, weight.dtype, weight.device).eval()
        copy_weights(model, self._model)
        generation: Any = self._model.generation_config
        generation.eos_token_id = generation.bos_token_id = None  # as many tokens as asked for
        generation.pad_token_id = 0

    @staticmethod
    def knows(model: Transformer) -> bool:
        """Whether transformers has such attention."""
        return model.config.attention == "mla"

    def generate(self, prompt: list[int], tokens: int) -> Any:
        """`tokens` more after a prompt, greedily, with its cache; transformers' own result."""
        ids = torch.tensor([prompt], device=next(self._model.parameters()).device)
        options = {"do_sample": False, "use_cache": True, "return_dict_in_generate": True}
        model: Any = self._model
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)

    def tokens(self, prompt: list[int], tokens: int) -> list[int]:
        """The new tokens alone."""
        new: list[int] = self.generate(prompt, tokens).sequences[0, len(prompt) :].tolist()
        return new


def bytes_of_cache(cache: Any) -> tuple[int, int]:
    """(bytes, slots) of what transformers keeps of one sequence: 5.23 keeps latents and rotary keys too."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return sum(keys.nbytes + values.nbytes for keys, values in layers), layers[0][0].shape[-2]
