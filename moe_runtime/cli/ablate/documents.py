"""Tables inside documents: each is made by a command and stands between two marks.

    <!-- ablate balance.yaml -->
    ...what the command makes...
    <!-- end -->

So the prose is written by people and no figure is copied by hand; a test makes every table again.
"""

import re
from collections.abc import Callable
from pathlib import Path

from moe_runtime.errors import ConfigError

_BLOCK = re.compile(r"(<!-- ablate (?P<study>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, table_of: Callable[[str], str]) -> str:
    """A document's text with every table made again.

    Args:
        text: Markdown.
        table_of: from the name of a study's file, as a mark gives it, to its table.

    Raises:
        ConfigError: no mark, or one without an end.
    """
    if not (starts := text.count("<!-- ablate ")) or starts != len(_BLOCK.findall(text)):
        raise ConfigError("expected marks `<!-- ablate STUDY.yaml -->`, each with its `<!-- end -->`")
    return _BLOCK.sub(lambda block: f"{block[1]}\n{table_of(block['study'])}\n\n{block[3]}", text)


def fill(document: Path, table_of: Callable[[str], str]) -> bool:
    """Make the tables of a document again; True if that changed it."""
    before = document.read_text(encoding="utf-8")
    after = filled(before, table_of)
    if after != before:
        document.write_text(after, encoding="utf-8")
    return after != before
