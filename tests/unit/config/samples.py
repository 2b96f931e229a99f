"""Small runs for the tests of the config, as dicts, files and objects."""

import random
from pathlib import Path
from typing import Any

import yaml

from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.suggest import section_at
from moe_runtime.errors import ConfigError

_LETTERS = "abcdefghijklmnopqrstuvwxyz_0123456789"
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


def slips_of(word: str, draw: random.Random) -> set[str]:
    """Words that are one slip away: each letter lost, swapped, wrong, too many, or twice."""
    slips = {word[:i] + word[i + 1 :] for i in range(len(word))}
    slips |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    for i in range(len(word)):
        slips.add(word[:i] + draw.choice(_LETTERS) + word[i + 1 :])
        slips.add(word[:i] + draw.choice(_LETTERS) + word[i:])
        slips.add(word[:i] + word[i] + word[i:])
    return slips - {"", word}


def typos_of(path: tuple[str, ...]) -> list[str]:
    """A dozen words one slip away from a key, which are no other keys of its section."""
    section = section_at(path[:-1])
    assert section is not None
    draw = random.Random(path[-1])
    choices = sorted(slips_of(path[-1], draw) - set(section.model_fields))
    return draw.sample(choices, min(12, len(choices)))
