"""Which checkpoints stay: the newest good ones; and what a killed save left behind goes."""

from pathlib import Path

from moe_runtime.checkpoint.disk import remove
from moe_runtime.checkpoint.folder import OLD_PREFIX, TMP_PREFIX, list_steps, step_of, verify_checkpoint
from moe_runtime.errors import CheckpointError


def remove_leftovers(checkpoints_dir: Path) -> None:
    """Undo what a killed save left: half-written folders go, a folder about to be replaced returns."""
    if not checkpoints_dir.is_dir():
        return
    for path in checkpoints_dir.iterdir():
        original = checkpoints_dir / path.name.removeprefix(OLD_PREFIX)
        if path.name.startswith(OLD_PREFIX) and not original.exists() and step_of(original.name) is not None:
            path.rename(original)
        elif path.name.startswith((TMP_PREFIX, OLD_PREFIX)):
            remove(path)


def remove_all(checkpoints_dir: Path) -> None:
    """Remove every checkpoint."""
    for path in list_steps(checkpoints_dir):
        remove(path)


def prune(
    checkpoints_dir: Path, keep: int, known_bad: set[str] | None = None, with_hash: bool = False
) -> list[Path]:
    """Remove every checkpoint older than the newest `keep` good ones.

    A damaged checkpoint newer than those kept stays where it is, so that the next start says so again;
    it goes once it is older than they are, or when the run reaches its step and replaces it.

    Args:
        checkpoints_dir: the folder that holds `step_*` folders.
        keep: how many good ones stay, at least 1.
        known_bad: folder names that failed verification.
        with_hash: compare SHA-256 too; otherwise manifest and sizes only.

    Returns:
        What was removed.

    Raises:
        OSError: something cannot be removed.
    """
    num_good = 0
    removed = []
    for path in list_steps(checkpoints_dir):
        if num_good >= max(1, keep):
            remove(path)
            removed.append(path)
        elif path.name not in (known_bad or ()):
            num_good += _is_good(path, with_hash)
    return removed


def _is_good(path: Path, with_hash: bool) -> bool:
    try:
        verify_checkpoint(path, with_hash=with_hash)
    except CheckpointError:
        return False
    return True
