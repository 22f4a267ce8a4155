"""A board with what lies behind it: what one part of a report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdtoolkit.benchmark.board import Board, build_board
from kdtoolkit.benchmark.details import Details
from kdtoolkit.benchmark.pictures import Gallery


@dataclass(frozen=True)
class View:
    """One board, its curves, errors and costs, and its pictures. `gallery`: None while a benchmark runs."""

    board: Board
    details: Details
    gallery: Gallery | None = None

    @classmethod
    def of(cls, root: Path) -> View:
        """What a run's folder holds, also if the run is unfinished. Raises KDError if it holds no run."""
        return cls(build_board(root), Details(curves={}, breakdown={}, costs={}, commands={}, settings={}, limits=()))
