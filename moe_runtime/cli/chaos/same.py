"""Are the final states of two runs equal to the bit?"""

from pathlib import Path

from moe_runtime.checkpoint.folder import open_checkpoint


def differences(faulty: Path, clean: Path) -> list[str]:
    """What differs between the newest checkpoints of two run folders of one layout; empty if nothing does.

    Weights, masters, moments as they are stored and averages are files whose SHA-256 the manifest has.

    Raises:
        CheckpointError: a folder has no good checkpoint.
    """
    ours, theirs = (open_checkpoint(folder).manifest for folder in (faulty, clean))
    found = []
    for what in ("step", "tokens", "layout", "layouts", "partitions"):
        if getattr(ours, what) != getattr(theirs, what):
            found.append(f"{what} of the checkpoint")
    for name in sorted({*ours.files, *theirs.files}):
        digests = [
            manifest.files[name].sha256 if name in manifest.files else None for manifest in (ours, theirs)
        ]
        if digests[0] != digests[1]:
            found.append(name)
    return found
