"""`kd benchmark watch`: look at runs while they work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The folder of a run, or a folder of runs.")
    ] = Path("runs"),
    once: Annotated[bool, typer.Option("--once", help="Show it once, and return.")] = False,
) -> None:
    """Show runs while they work: cells, losses, AP so far, time left.

    It reads files alone, so it works in another terminal, and on another machine that sees the same disk. It ends when
    the run ends, and says so if the run is dead.
    """
    from rich.console import Console

    from kdtoolkit.benchmark.watch import watch as look

    look(folder, console=Console(), once=once)
