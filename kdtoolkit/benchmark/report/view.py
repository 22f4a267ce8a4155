"""A board with what lies behind it: what one part of a report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdtoolkit.benchmark.board import Board, board_of
from kdtoolkit.benchmark.details import Details, details
from kdtoolkit.benchmark.pictures import Gallery, gallery
from kdtoolkit.benchmark.runs import Run, open_run
from kdtoolkit.errors import KDError


@dataclass(frozen=True)
class View:
    """One board, its curves, errors and costs, and its pictures. `gallery`: None while a benchmark runs."""

    board: Board
    details: Details
    gallery: Gallery | None = None

    @classmethod
    def of(cls, root: Path, *, pictures: bool = False) -> View:
        """What a run's folder holds, also if the run is unfinished.

        `pictures`: whether to make the gallery, which may take some seconds. Raises KDError if the folder holds no run.
        """
        run = open_run(root)
        return cls(board_of(run), details(run), _gallery(run) if pictures else None)


def _gallery(run: Run) -> Gallery:
    """The pictures. What is wrong with them stops no board: it is a note in their place."""
    try:
        return gallery(run)
    except KDError as error:
        return Gallery(note=f"There are no pictures: {error}.")
