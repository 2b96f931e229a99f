"""JSON files from anywhere: bounded in size, no key twice, an object at the top."""

import json
from pathlib import Path
from typing import Any

from moe_runtime.checkpoint.manifest import no_key_twice
from moe_runtime.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, too large, not JSON, or no object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, got {size}")
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_key_twice)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a file, got none of that name") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(fields).__name__}")
    return fields


def object_bytes(fields: dict[str, Any]) -> bytes:
    """The bytes of a JSON file."""
    return (json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
