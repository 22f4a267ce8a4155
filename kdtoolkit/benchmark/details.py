"""What lies behind a board: curves, errors, costs, and how to repeat each row."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from kdtoolkit.engine.breakdown import Breakdown


class Curve(BaseModel):
    """How a number went while a row's students were trained.

    `steps` are the steps of training. At each of them, `mean` is the mean over the row's seeds. `low` and `high` are
    the smallest and the largest value of a seed.
    """

    model_config = ConfigDict(frozen=True)

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class RowCost(BaseModel):
    """What a row costs: means over its seeds, medians for `latency_ms`. A value is None where it is not known.

    `train_seconds`, `step_ms`: of training, as on the board. `latency_ms`: of one image alone. `gflops`: of one image.
    `parameters`: of the detector.
    """

    model_config = ConfigDict(frozen=True)

    train_seconds: float | None
    step_ms: float | None
    latency_ms: float | None
    gflops: float | None
    parameters: int | None


class Details(BaseModel):
    """What lies behind a board. The keys are the board's rows, and "teacher".

    Attributes:
        curves: for each row, curves by the name of what they show: the loss terms and metrics of `history`, "eval/ap".
        breakdown: for each row, means over its seeds.
        costs: for each row, what training and one image cost.
        commands: for each row, the command that repeats it.
        settings: for each row, its resolved configuration as YAML.
        limits: what the board does not show, one sentence each.
    """

    model_config = ConfigDict(frozen=True)

    curves: dict[str, dict[str, Curve]]
    breakdown: dict[str, Breakdown]
    costs: dict[str, RowCost]
    commands: dict[str, str]
    settings: dict[str, str]
    limits: tuple[str, ...]
