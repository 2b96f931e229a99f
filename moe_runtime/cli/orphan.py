"""A rank whose launcher was killed must not train on unseen: it saves and ends (see `train/stopping.py`)."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def stop_with_parent() -> None:
    """Ask the kernel for SIGHUP when the process that started this one dies; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() == 1:  # it was dead before we asked
        os.kill(os.getpid(), signal.SIGHUP)
