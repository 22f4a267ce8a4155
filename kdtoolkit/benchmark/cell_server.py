"""How the processes of cells start: forked from a server that has imported torch once; spawned where there is no fork.

This file imports nothing heavy, so that the server can start to import while its run still does.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext


def context() -> BaseContext:
    """The context in which processes of cells are made."""
    if not _has_server():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["kdtoolkit.benchmark.fork_server"])
    return found


def start() -> None:
    """Start the server, if cells are forked from one. It imports torch beside this process, which goes on."""
    if _has_server():
        from multiprocessing import forkserver  # not on all systems

        context()
        forkserver.ensure_running()


def _has_server() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()
