"""A model section and config.json: DeepSeek's own form, and that of transformers 5.

Reading refuses what would change the mathematics: a key with another value than the model here has, and any
key that this version does not know, unless it is off (null, false or empty) or the user says that it does
not matter. Silence about an unknown key is how converters lose a feature.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moe_runtime.checkpoint.hugging_face.rope_form import read_rope, write_rope
from moe_runtime.config.explain import explain
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import CheckpointError

ARCHITECTURE = "DeepseekV3ForCausalLM"
# Ours and theirs, alike in meaning.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn_size": "moe_intermediate_size",
    "num_groups": "n_group",
    "num_groups_kept": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "mtp_depth": "num_nextn_predict_layers",
}
_DEFAULTS = {"n_shared_experts": 0, "initializer_range": 0.02, "num_nextn_predict_layers": 0}
_OTHER_NAMES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
# What the model here always does, by the keys that say otherwise.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    # transformers and DeepSeek's own code norm the latents of attention with 1e-6 whatever this key says.
    "rms_norm_eps": 1e-6,
}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"}
# Says nothing of the mathematics.
_HARMLESS = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "ep_size", "pretraining_tp", "aux_loss_alpha", "seq_aux",
    "quantization_config", "_name_or_path", "name_or_path", "output_router_logits", "return_dict",
    "output_attentions", "output_hidden_states", "id2label", "label2id", "chunk_size_feed_forward",
    "problem_type", "tokenizer_class", "_attn_implementation",
}  # fmt: skip
_MAX_NUMBER = 2**31 - 1  # positions and factors beyond it are mistakes
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_DTYPE_WORDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class HubConfig:
    """What a config.json says.

    Args:
        model: the architecture; `mtp_depth` is what is declared, whether or not weights exist.
        dtype: fp32, bf16 or fp16 as it says, None if it does not.
        context: longest sequence, in tokens; None if it does not say.
        balance_alpha: weight of the sequence-wise balance loss; None if it does not say.
        quantization: its `quantization_config`, or None.
    """

    model: ModelConfig
    dtype: str | None
    context: int | None
    balance_alpha: float | None
    quantization: dict[str, Any] | None


def write_config(
    model: ModelConfig, *, dtype: str, context: int, balance_alpha: float, text_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json in DeepSeek's own form, which transformers 4 and 5, vLLM and SGLang read.

    Args:
        dtype: of most weights, as safetensors calls it.
        context: longest sequence of the training; YaRN's own length wins.
        balance_alpha: weight of the sequence-wise balance loss.
        text_ids: `bos_token_id` and `eos_token_id`.

    Raises:
        CheckpointError: the form cannot express the model.
    """
    check_expressible(model)
    fields: dict[str, Any] = {"architectures": [ARCHITECTURE], **_FIXED}
    fields |= {theirs: getattr(model, ours) for ours, theirs in _KEYS.items()}
    fields |= write_rope(model)
    if fields["rope_scaling"] is not None and model.yarn is not None:
        context = int(model.yarn.factor * model.yarn.original_seq_len)
    return fields | {
        "num_key_value_heads": model.num_heads,
        "max_position_embeddings": context,
        "aux_loss_alpha": balance_alpha,
        "seq_aux": True,
        **text_ids,
        "torch_dtype": _DTYPE_WORDS[dtype],
        "use_cache": True,
    }


def read_config(fields: dict[str, Any], where: str, ignored: Collection[str] = ()) -> HubConfig:
    """The model that a config.json describes.

    Args:
        fields: of config.json.
        where: its path, for messages.
        ignored: keys that the user says do not matter.

    Raises:
        CheckpointError: names the key that is missing, unknown, or has a value that the model here has not.
    """
    fields = _by_one_name(fields, where)
    if fields.get("model_type") is None:
        raise CheckpointError(f"{where}: model_type: expected deepseek_v3, got none")
    _check_fixed(fields, where)
    _check_architectures(fields, where)
    _check_known(fields, where, ignored)
    values = {}
    for ours, theirs in _KEYS.items():
        if theirs not in fields and theirs not in _DEFAULTS:
            raise CheckpointError(f"{where}: {theirs}: expected a value, got none")
        value = fields.get(theirs, _DEFAULTS.get(theirs))
        values[ours] = _DEFAULTS.get(theirs) if value is None else value
    quantization = fields.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{where}: quantization_config: expected an object, got {_word(quantization)}")
    theta, yarn = read_rope(fields, where)
    model = _validated(values | {"rope_theta": theta, "yarn": yarn}, where)
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "").removeprefix("torch.")
    return HubConfig(
        model,
        _DTYPES.get(dtype),
        _number(fields, "max_position_embeddings", True, where),
        _number(fields, "aux_loss_alpha", False, where),
        quantization,
    )


def check_expressible(model: ModelConfig) -> None:
    """Refuse a model that the form has no words for.

    Raises:
        CheckpointError: names the key.
    """
    if model.attention != "mla":
        raise CheckpointError(
            f"model.attention: expected mla, got {model.attention}: Hugging Face's form of DeepSeek-V3 has "
            "latents; such a model is for comparison and is not exported"
        )
    if model.rms_norm_eps != _FIXED["rms_norm_eps"]:
        raise CheckpointError(
            f"model.rms_norm_eps: expected 1e-06, got {model.rms_norm_eps:g}: Hugging Face's form has no "
            "other epsilon for the norms of the latents"
        )
    if model.num_experts < 2:
        raise CheckpointError(
            "model.num_experts: expected at least 2, got 1: groups are scored by their two best"
        )


def _by_one_name(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields with one spelling of each key."""
    fields = dict(fields)
    for other, name in _OTHER_NAMES.items():
        if other in fields:
            value = fields.pop(other)
            if fields.setdefault(name, value) != value:
                raise CheckpointError(
                    f"{where}: {other}: expected {fields[name]} as {name} says, got {value}"
                )
    return fields


def _check_fixed(fields: dict[str, Any], where: str) -> None:
    for key, wanted in _FIXED.items():
        got = fields.get(key)
        if got is not None and got != wanted:
            raise CheckpointError(
                f"{where}: {key}: expected {_word(wanted)}, got {_word(got)}: the model here has nothing else"
            )
    derived = {
        "num_key_value_heads": (fields.get("num_attention_heads"),),
        "qk_head_dim": (_sum(fields, "qk_nope_head_dim", "qk_rope_head_dim"),),
        "head_dim": (fields.get("qk_rope_head_dim"), _sum(fields, "qk_nope_head_dim", "qk_rope_head_dim")),
    }
    for key, choices in derived.items():
        if fields.get(key) is not None and fields[key] not in choices:
            raise CheckpointError(f"{where}: {key}: expected {choices[0]}, got {fields[key]}")


def _check_architectures(fields: dict[str, Any], where: str) -> None:
    got = fields.get("architectures")
    if got not in (None, [], [ARCHITECTURE]):
        raise CheckpointError(f"{where}: architectures: expected [{ARCHITECTURE!r}], got {_word(got)}")


def _check_known(fields: dict[str, Any], where: str, ignored: Collection[str]) -> None:
    known = {*_KEYS.values(), *_FIXED, *_ROPE, *_HARMLESS, *ignored}
    known |= {"num_key_value_heads", "qk_head_dim", "head_dim"}
    for key, value in fields.items():
        if key not in known and value not in (None, False, [], {}):
            raise CheckpointError(
                f"{where}: {key}: expected no such key, got {_word(value)}: it may change the mathematics; "
                f"if it does not, say --ignore {key}"
            )


def _validated(values: dict[str, Any], where: str) -> ModelConfig:
    dense, layers = values["num_dense_layers"], values["num_layers"]
    if isinstance(dense, int) and isinstance(layers, int):
        values["num_dense_layers"] = min(dense, layers)
    try:
        return ModelConfig.model_validate(values, strict=True)  # "128" and 4.0 are no widths
    except ValidationError as error:
        found = explain(error)[0]
        key = found.key.removeprefix(".")  # of a rule between keys
        raise CheckpointError(f"{where}: {_KEYS.get(key, key)}: {found.text}") from None


def _number(fields: dict[str, Any], key: str, is_whole: bool, where: str) -> Any:
    value = fields.get(key)
    if value is None:
        return None
    kinds = int if is_whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= _MAX_NUMBER:
        said = "a whole number" if is_whole else "a number"
        raise CheckpointError(f"{where}: {key}: expected {said} from 0 to {_MAX_NUMBER}, got {_word(value)}")
    return value if is_whole else float(value)


def _sum(fields: dict[str, Any], *keys: str) -> int | None:
    values = [fields.get(key) for key in keys]
    return sum(values) if all(isinstance(value, int) for value in values) else None  # type: ignore[arg-type]


def _word(value: object) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool) else repr(value)
    return str(text) if len(str(text)) <= 80 else f"{str(text)[:80]}..."
