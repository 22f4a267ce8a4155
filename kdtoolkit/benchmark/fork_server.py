"""What the server that workers are forked from imports, and nothing else may import: it changes how a process ends."""

import atexit
import os
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the run; the parent ends its workers

import kdtoolkit.benchmark.workers  # noqa: E402, F401 - so that each worker has torch already


def _end_at_once(server: int) -> None:
    if os.getpid() == server:  # workers inherit this function
        os._exit(0)


# The server ends with the run. Python would first delete all modules, which takes more than a second with torch.
atexit.register(_end_at_once, os.getpid())
