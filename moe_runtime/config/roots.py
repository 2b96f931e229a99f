"""Where configs are looked for: here first, then those that come with the code.

In a checkout they stand beside the package; a wheel brings them within it.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def config_roots() -> list[Path]:
    """The folders `configs` that there are, the user's own before ours."""
    ours = [root for root in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if _is_ours(root)]
    return [*([Path("configs")] if Path("configs").is_dir() else []), *ours[:1]]


def _is_ours(root: Path) -> bool:
    # Beside an installed package is whatever other packages put there.
    return (root / "run" / "quickstart.yaml").is_file()


def config_names(kind: str) -> list[str]:
    """The names by which a config of a kind can be given, those here first.

    Args:
        kind: the folder under `configs`: run, model or cluster.
    """
    folders = [root / kind for root in config_roots()]
    files = [(file, folder) for folder in folders for file in sorted(folder.rglob("*.yaml"))]
    # Short names before those in folders of their own.
    files.sort(key=lambda item: len(item[0].relative_to(item[1]).parts))
    names = [file.relative_to(folder).with_suffix("").as_posix() for file, folder in files]
    return list(dict.fromkeys(names))
