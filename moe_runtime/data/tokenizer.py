"""How a name or a file becomes a tokenizer."""

import json
from pathlib import Path

from moe_runtime.data.bpe import JsonTokenizer, deepseek_json
from moe_runtime.data.vocabulary import SPECIALS, ByteTokenizer, Tokenizer
from moe_runtime.errors import DataError

NAMES_EXPECTED = "byte, bpe:N, deepseek or the path of a tokenizer.json"


def bpe_size(name: str) -> int | None:
    """N of the name `bpe:N`, or None for any other name.

    Raises:
        DataError: N is not a number or too small for 256 bytes and the control ids.
    """
    if not name.startswith("bpe:"):
        return None
    least = 256 + len(SPECIALS)
    if not name[4:].isdecimal() or int(name[4:]) < least:
        raise DataError(f"tokenizer {name!r}: expected bpe:N with N at least {least}, such as bpe:8192")
    return int(name[4:])


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name that needs no corpus: byte, deepseek or the path of a tokenizer.json.

    Raises:
        DataError: unknown name, missing file or package, or a tokenizer without an end-of-text token.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "deepseek":
        return JsonTokenizer(deepseek_json(), name)
    if bpe_size(name) is not None:
        raise DataError(
            f"tokenizer {name!r} is trained on a corpus: run `moe-runtime prepare --tokenizer {name}`"
        )
    return load_tokenizer(Path(name), name)


def load_tokenizer(path: Path, name: str | None = None) -> Tokenizer:
    """The tokenizer in a file, or in `tokenizer.json` of a folder of prepared data.

    Args:
        path: file or folder.
        name: what the tokenizer calls itself; the path if None.

    Raises:
        DataError: the file is missing or holds no usable tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"tokenizer {str(path)!r}: {reason}; expected {NAMES_EXPECTED}") from error
    return tokenizer_from_json(text, name or str(path))


def tokenizer_from_json(text: str, name: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote, or any tokenizer.json of Hugging Face `tokenizers`.

    Raises:
        DataError: not JSON, not a tokenizer, or without an end-of-text token.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"tokenizer {name!r}: not JSON (line {error.lineno}: {error.msg})") from error
    if isinstance(content, dict) and content.get("type") == "moe_runtime byte":
        return ByteTokenizer()
    return JsonTokenizer(text, name)
