"""A rank whose launcher was killed must not train on unseen: it saves and ends, as after SIGTERM."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def stop_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process that started this one dies; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # it was dead before we asked
        os.kill(os.getpid(), signal.SIGTERM)
