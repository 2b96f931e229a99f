"""Exported names against those that the MTP loaders of vLLM and SGLang look for.

Read from their source: vLLM, vllm/model_executor/models/deepseek_mtp.py at 4f7c1440 and deepseek_v2.py at
002d6073; SGLang, python/sglang/srt/models/deepseek_nextn.py at c28bdc90 and deepseek_v2.py at 00114aef. Both
take tensors of `model.layers.{L}` and above, keep the MTP module's own ones, and read all others as those of
a decoder block, whose names are those of every other layer. vLLM wants embedding and head in each MTP layer;
SGLang skips them and uses the model's.
"""

import pytest

from moe_runtime.checkpoint.hugging_face.names import parameters_of
from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.transformer import Transformer
from tests.unit.hugging_face.models import BASE

OWN = {"embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"}
SKIPPED_BY_SGLANG = {"embed_tokens", "shared_head.head"}
QUERY = {True: {"q_a_proj", "q_a_layernorm", "q_b_proj"}, False: {"q_proj"}}
KEYS = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
SWIGLU = {"gate_proj", "up_proj", "down_proj"}


def block_names(model: ModelConfig) -> set[str]:
    """Tensors of a MoE decoder block, below its layer."""
    attention = {f"self_attn.{name}" for name in QUERY[model.q_lora_rank is not None] | KEYS}
    experts = {f"mlp.experts.{expert}.{name}" for expert in range(model.num_experts) for name in SWIGLU}
    shared = {f"mlp.shared_experts.{name}" for name in SWIGLU}
    norms = {"input_layernorm", "post_attention_layernorm"}
    weights = {f"{name}.weight" for name in norms | attention | experts | shared | {"mlp.gate"}}
    return weights | {"mlp.gate.e_score_correction_bias"}


def exported(model: ModelConfig) -> set[str]:
    return {name for each in parameters_of(model) for name in (*each.parts, *each.copies)}


@pytest.mark.parametrize("q_lora_rank", [16, None])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_mtp_layers_have_the_names_that_vllm_and_sglang_load(depth: int, q_lora_rank: int | None) -> None:
    model = ModelConfig.model_validate(BASE | {"mtp_depth": depth, "q_lora_rank": q_lora_rank})
    names = exported(model)
    for layer in range(model.num_layers, model.num_layers + depth):
        prefix = f"model.layers.{layer}."
        found = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        vllm = {f"{name}.weight" for name in OWN} | block_names(model)
        sglang = vllm - {f"{name}.weight" for name in SKIPPED_BY_SGLANG}
        assert found == vllm
        assert found - {f"{name}.weight" for name in SKIPPED_BY_SGLANG} == sglang
    assert not {name for name in names if f"layers.{model.num_layers + depth}." in name}


def test_the_table_names_every_tensor_of_a_model_once_with_its_shape() -> None:
    from moe_runtime.checkpoint.weights import split_experts

    for changes in (
        {},
        {"q_lora_rank": None, "num_shared_experts": 2, "mtp_depth": 2, "num_dense_layers": 0},
    ):
        model = ModelConfig.model_validate(BASE | changes)
        state = split_experts(Transformer(model, device="meta").state_dict())
        table = {each.name: each.shape for each in parameters_of(model)}
        assert table == {name: tuple(tensor.shape) for name, tensor in state.items()}
        parts = [name for each in parameters_of(model) for name in (*each.parts, *each.copies)]
        assert len(parts) == len(set(parts))
