"""What the server that workers are forked from imports, and nothing else may import: it changes how a process ends."""

import atexit
import os

import kdtoolkit.benchmark.workers  # noqa: F401 - so that each worker has torch already


def _end_at_once(server: int) -> None:
    if os.getpid() == server:  # workers inherit this function
        os._exit(0)


# The server ends with the run. Python would first delete all modules, which takes more than a second with torch.
atexit.register(_end_at_once, os.getpid())
