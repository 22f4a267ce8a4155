"""Ctrl-C during training: the step that has begun is finished first, so that the run goes on from it exactly."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_TOLD = logging.getLogger("kdtoolkit")


@dataclass
class Interrupt:
    """`asked`: whether the user has pressed Ctrl-C."""

    asked: bool = False


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """A block in which the first Ctrl-C is noted only. The second one raises KeyboardInterrupt at once.

    The block should end as soon as `asked` is true; KeyboardInterrupt is raised at its end. Nothing changes outside of
    the main thread, or if the program handles Ctrl-C itself.
    """
    found, process = Interrupt(), os.getpid()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield found
        return

    def note(number: int, frame: FrameType | None) -> None:
        found.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() == process:  # processes that read images ahead have this handler too
            _TOLD.warning("Ctrl-C: the step that has begun is finished and saved; Ctrl-C again ends at once")

    signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if found.asked:
        raise KeyboardInterrupt
