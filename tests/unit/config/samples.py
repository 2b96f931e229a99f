"""Small runs for the tests of the config, as dicts, files and objects."""

from pathlib import Path
from typing import Any

import yaml

from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_layers": 4,
    "num_dense_layers": 1,
    "ffn_size": 32,
    "num_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_experts": 8,
    "top_k": 2,
    "expert_ffn_size": 8,
}


def values(**sections: Any) -> dict[str, Any]:
    """A sound run as a plain dict; `layout={"pp": 2}` lays keys over a section, other values replace."""
    run: dict[str, Any] = {
        "model": dict(MODEL),
        "batch": {"seq_len": 16, "global_batch_size": 8},
        "data": {"path": "data/none"},
        "train": {"total_steps": 1},
    }
    for name, value in sections.items():
        run[name] = run.get(name, {}) | value if isinstance(value, dict) else value
    return run


def write(path: Path, **sections: Any) -> Path:
    """The same as a YAML file."""
    path.write_text(yaml.safe_dump(values(**sections), sort_keys=False))
    return path


def build(**sections: Any) -> RunConfig:
    """The same as a validated run."""
    return RunConfig.model_validate(values(**sections))


def refusal(path: Path, *overrides: str) -> list[str]:
    """The lines with which a file is refused; the empty list if it loads."""
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return str(error).splitlines()
    return []
