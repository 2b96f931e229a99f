"""Ids that begin and end text in a Hugging Face model, whatever its tokenizer says.

config.json and generation_config.json have each their own, one id or a list; a model without a tokenizer ends
by them alone. An import records both files' in the manifest, and an export gives them back as they were.
"""

from pathlib import Path
from typing import Any

from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.hugging_face.json_file import read_object
from moe_runtime.errors import CheckpointError

CONFIG_JSON, GENERATION_JSON = "config.json", "generation_config.json"
STATE_KEY, IDS_KEY = "hugging_face", "text_ids"  # place in the manifest's state
_BOS, _EOS = "bos_token_id", "eos_token_id"

TextIds = dict[str, dict[str, Any]]  # file -> key -> id, list of ids, or None


def read_text_ids(hub: Path) -> TextIds:
    """What the files of a model say of `bos_token_id` and `eos_token_id`; keys that are absent stay absent.

    Raises:
        CheckpointError: a file cannot be read, or an id is no whole number from 0.
    """
    names = [CONFIG_JSON, *([GENERATION_JSON] if (hub / GENERATION_JSON).exists() else [])]
    found: TextIds = {}
    for name in names:
        fields = read_object(hub / name)
        found[name] = {key: fields[key] for key in (_BOS, _EOS) if key in fields}
        for key, value in found[name].items():
            many = value if isinstance(value, list) and key == _EOS else [value]
            if value is not None and not all(_is_id(each) for each in many):
                wanted = "an id or a list of ids" if key == _EOS else "an id"
                raise CheckpointError(f"{hub / name}: {key}: expected {wanted}, got {value!r:.80}")
    return found


def eos_ids_in(ids: TextIds) -> frozenset[int]:
    """All ids that end text, by either file."""
    said = [fields.get(_EOS) for fields in ids.values()]
    lists = [each if isinstance(each, list) else [each] for each in said if each is not None]
    return frozenset(one for each in lists for one in each)


def text_ids_of(checkpoint: Checkpoint) -> TextIds:
    """What an import recorded; empty for a checkpoint that was not imported."""
    ids: TextIds = (checkpoint.manifest.state.get(STATE_KEY) or {}).get(IDS_KEY) or {}
    return ids


def eos_ids_of(checkpoint: Checkpoint) -> frozenset[int]:
    """Ids that end text by the configs of an imported model; a tokenizer's own is not among them."""
    return eos_ids_in(text_ids_of(checkpoint))


def write_text_ids(recorded: TextIds, eos_id: int | None) -> TextIds:
    """The ids that an export writes: as recorded; where nothing is, the tokenizer's `eos_id`.

    A `generation_config.json` that would say nothing is left out.
    """
    config = {_BOS: None, _EOS: eos_id} | _given(recorded.get(CONFIG_JSON, {}))
    generation = _given({_EOS: config[_EOS]}) | _given(recorded.get(GENERATION_JSON, {}))
    return {CONFIG_JSON: config} | ({GENERATION_JSON: generation} if generation else {})


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
