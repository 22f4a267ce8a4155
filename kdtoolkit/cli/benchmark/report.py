"""`kd benchmark report`: print and write a leaderboard from stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="A folder that `kd benchmark run` has made.")
    ],
) -> None:
    """Print the leaderboard again, from stored results.

    Its files in RUN_DIR are written again too.
    """
    from rich.console import Console

    from kdtoolkit.benchmark.board import build_board
    from kdtoolkit.benchmark.report import print_board, write_board

    board = build_board(run_dir)
    write_board(board, run_dir)
    print_board(board, Console())
