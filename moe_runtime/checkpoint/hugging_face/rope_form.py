"""Rotary positions in config.json: DeepSeek's `rope_scaling` and `rope_parameters` of transformers 5.

Ours turns unit pairs and multiplies the softmax scale by (0.1 mscale ln s + 1)^2. transformers and
DeepSeek's own code have two numbers for that: `mscale_all_dim` is our mscale, and
(0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1) lengthens the pairs of the rotary part alone. Only where
that ratio is 1 is there a model of ours with the same numbers; DeepSeek-V3 has both at 1. Ref: DSV3 §4.3.
"""

import math
from typing import Any

from pydantic import ValidationError

from moe_runtime.config.explain import explain
from moe_runtime.config.schema import ModelConfig, YarnConfig
from moe_runtime.errors import CheckpointError

DEFAULT_THETA = 10000.0
_SHARED = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
_YARN_ONLY = {*_YARN, "mscale", "mscale_all_dim", "attention_factor", "truncate"}


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json, in DeepSeek's own form.

    Raises:
        CheckpointError: a YaRN section that other programs would read otherwise.
    """
    yarn = model.yarn
    if yarn is None or yarn.factor <= 1.0:
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    _check_range("model.yarn", yarn)
    scaling: dict[str, Any] = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale,
    }
    if yarn.mscale == 0.0:  # 0 reads as "not given", and then the pairs would be lengthened
        scaling["attention_factor"] = 1.0
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling}


def read_rope(fields: dict[str, Any], where: str) -> tuple[float, YarnConfig | None]:
    """(theta, YaRN) of a config.json in either form.

    Args:
        fields: of config.json.
        where: its path, for messages.

    Raises:
        CheckpointError: rotary positions that the model here does not have; names the key.
    """
    name, section = _section(fields, where)
    place = f"{where}: {name}"
    theta = section.get("rope_theta")
    top = fields.get("rope_theta")
    if theta is not None and top is not None and theta != top:
        raise CheckpointError(f"{place}.rope_theta: expected rope_theta {top} as at the top, got {theta}")
    theta = top if theta is None else theta
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"{place}: rope_type: expected default or yarn, got {kind!r}")
    known = _SHARED | (_YARN_ONLY if kind == "yarn" else set())
    for key, value in section.items():
        if key not in known and value is not None:
            raise CheckpointError(
                f"{place}.{key}: expected no such key under rope_type {kind}, got {value!r}"
            )
    if section.get("partial_rotary_factor") not in (None, 1):
        got = section["partial_rotary_factor"]
        raise CheckpointError(f"{place}.partial_rotary_factor: expected 1, got {got!r}")
    yarn = _read_yarn(section, fields, place) if kind == "yarn" else None
    return DEFAULT_THETA if theta is None else theta, yarn


def _section(fields: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    given = {name: fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name)}
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise CheckpointError(f"{where}: expected rope_parameters or rope_scaling, got both, and they differ")
    name, section = next(iter(given.items()), ("rope_parameters", {}))
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: {name}: expected an object, got {section!r}")
    return name, section


def _read_yarn(section: dict[str, Any], fields: dict[str, Any], place: str) -> YarnConfig:
    values = {ours: section[theirs] for theirs, ours in _YARN.items() if section.get(theirs) is not None}
    values.setdefault("original_seq_len", fields.get("max_position_embeddings"))
    if "factor" not in values:
        raise CheckpointError(f"{place}.factor: expected a number, got none")
    if section.get("truncate") not in (None, True):
        raise CheckpointError(f"{place}.truncate: expected true, got {section['truncate']!r}")
    try:
        yarn = YarnConfig.model_validate(
            values | {"mscale": section.get("mscale_all_dim") or 0.0}, strict=True
        )
        lengthens = _lengthens_pairs(section, yarn.factor)
    except ValidationError as error:
        found = explain(error)[0]
        theirs = next((key for key, ours in _YARN.items() if ours == found.key.strip(".")), "mscale_all_dim")
        raise CheckpointError(f"{place}.{theirs}: {found.text}") from None
    except (TypeError, ValueError):
        raise CheckpointError(f"{place}: expected numbers for mscale and attention_factor") from None
    if lengthens:
        got = ", ".join(
            f"{key} {section.get(key)}" for key in ("mscale", "mscale_all_dim", "attention_factor")
        )
        raise CheckpointError(
            f"{place}: expected mscale and mscale_all_dim alike and not 0, or attention_factor 1, got {got}: "
            "these lengthen the rotary part, which the model here does not do"
        )
    if yarn.factor < 1.0:
        raise CheckpointError(f"{place}.factor: expected at least 1, got {yarn.factor:g}")
    _check_range(place, yarn)
    return yarn


def _lengthens_pairs(section: dict[str, Any], factor: float) -> bool:
    """True if cosines and sines are multiplied by anything but 1."""
    if factor <= 1.0 and section.get("attention_factor") is None:
        return False
    if section.get("attention_factor") is not None:
        return float(section["attention_factor"]) != 1.0
    mscale, all_dim = section.get("mscale"), section.get("mscale_all_dim")
    return not (mscale and all_dim and float(mscale) == float(all_dim))


def _check_range(place: str, yarn: YarnConfig) -> None:
    """Where not even the fastest pair turns as often as beta_slow says, published codes part ways."""
    least = math.ceil(2 * math.pi * yarn.beta_slow)
    if yarn.original_seq_len < least:
        raise CheckpointError(
            f"{place}: expected an original context of at least 2 pi beta_slow = {least} tokens, "
            f"got {yarn.original_seq_len}"
        )
