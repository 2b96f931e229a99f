"""The named errors of the runtime: what a user can do wrong, said in one line.

Every message says where, what was expected, what was got and what to do. The command line
prints the message alone and exits with 2; anything else that escapes is a defect of ours.
"""


class MoeRuntimeError(Exception):
    """Base of all errors that are a user's to mend; `str(error)` is what the user reads."""

    exit_code = 2


class ConfigError(MoeRuntimeError):
    """A config file, an override or a layout is wrong; may hold several findings, one a line."""


class ScheduleError(MoeRuntimeError):
    """A pipeline program is incomplete, out of order or would deadlock."""


class DataError(MoeRuntimeError):
    """Token shards are missing, truncated or do not fit the model."""


class CheckpointError(MoeRuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class NumericsError(MoeRuntimeError):
    """A number went wrong: non-finite values, or two norms that must agree do not."""


class AlertStop(NumericsError):
    """An alert ended the run, as the config says; on every rank alike, and never restarted."""

    exit_code = 5


class MemoryEnded(MoeRuntimeError):
    """This rank asked for more memory than there is; another attempt may find more."""

    exit_code = 4


class StateLost(MoeRuntimeError):
    """State of this run was damaged and there is no checkpoint yet; beginning anew loses nothing else."""

    exit_code = 3


class PeerLost(MoeRuntimeError):
    """Another rank died or stopped answering; this rank ends too."""

    exit_code = 3
