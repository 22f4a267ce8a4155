"""Detectors that misbehave in workers."""

import multiprocessing
import os
import signal
from pathlib import Path

from kdtoolkit.detectors import GFL


def fragile(num_classes, *, flag, **args):
    """GFL; the worker that takes the file `flag` away is killed at once."""
    if multiprocessing.parent_process() is not None and Path(flag).exists():
        Path(flag).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return GFL(num_classes, **args)
