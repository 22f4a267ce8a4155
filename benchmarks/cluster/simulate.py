"""What limits a suite of 1,000 cells on 100 GPUs: a simulation of `kd benchmark run --executor ray`, event by event.

    python benchmarks/cluster/simulate.py [--rows 20 --seeds 50 --slots 100 --baseline 10]

It starts cells as the runner does: in its order, methods once the teacher is trained, the baseline at equal time once
all methods are done. Costs relative to the baseline are those of the board `standard`; the driver's costs were measured
by `driver.py`, the start of a cell by `scaling.py`. The run's own process is one server: it stores results one by one.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Costs:
    """Seconds, but `share`s.

    `methods`: a method's training, relative to the baseline's. `teacher`: the teacher's. `around`: start of a cell's
    process, reading of data, evaluation. `store`: the driver's work for a result, without the board. `board`: to write
    the board of one stored cell; a board of n cells takes n times as long. `board_share`: the part of the driver's time
    that boards may take; None writes one after each cell. `deaths`: the probability that a cell's worker dies, at a
    time that is uniform over the cell.
    """

    baseline: float = 600.0
    methods: tuple[float, ...] = (
        1.0,
        1.18,
        1.43,
        1.52,
        1.62,
        1.69,
    )  # docs/results/standard: ms/step over the baseline's
    teacher: float = 2.2  # 6000 steps of 31 ms to 4000 of 21 ms
    spread: float = 0.05  # standard deviation of a cell's time, as a share of it
    around: float = 15.0
    store: float = 0.05
    board: float = 0.002
    board_share: float | None = 0.05
    deaths: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a run went.

    `seconds`: the whole run. `used`: the share of the slots' time that cells used. `teacher`: seconds until the teacher
    was trained. `equal_time`: seconds from the end of all methods to the end of the run. `driver_busy`: the share of
    the time that the driver worked.
    """

    seconds: float
    used: float
    teacher: float
    equal_time: float
    driver_busy: float


def simulate(rows: int, seeds: int, slots: int, costs: Costs, *, longest_first: bool = False, seed: int = 0) -> Outcome:
    """Run `rows` methods and the baseline with `seeds` each, then the baseline at equal time."""
    draw = random.Random(seed)

    def takes(share: float) -> float:
        whole = costs.around + costs.baseline * share * max(0.2, draw.gauss(1.0, costs.spread))
        lost = 0.0
        while draw.random() < costs.deaths:
            lost += draw.random() * whole
        return whole + lost

    share = {row: costs.methods[row % len(costs.methods)] for row in range(1, rows + 1)}
    pending = [(row, takes(share.get(row, 1.0))) for _ in range(seeds) for row in range(rows + 1)]
    if longest_first:
        pending.sort(key=lambda cell: -cell[1])
    last = [takes(max(share.values())) for _ in range(seeds)]
    needed = takes(costs.teacher) + sum(seconds for _, seconds in pending) + sum(last)

    now, free_from, busy, next_board, stored = 0.0, 0.0, 0.0, 0.0, 0
    running: list[tuple[float, int]] = []  # (end, row); row -1 is the teacher
    trained = False

    def start(row: int, seconds: float) -> None:
        heapq.heappush(running, (now + seconds, row))

    def end() -> int:
        """The next cell that ends is stored by the driver, and its slot is free after that."""
        nonlocal now, free_from, busy, next_board, stored
        finished, row = heapq.heappop(running)
        begins = max(finished, free_from)
        stored += 1
        work = costs.store
        if costs.board_share is None:
            work += costs.board * stored
        elif begins >= next_board:
            board = costs.board * stored
            work += board
            next_board = begins + board / costs.board_share
        busy += work
        now = free_from = begins + work
        return row

    start(-1, takes(costs.teacher))
    teacher_ended = 0.0
    while pending or running:
        while len(running) < slots and (cell := next((cell for cell in pending if trained or cell[0] == 0), None)):
            pending.remove(cell)
            start(*cell)
        if end() == -1:
            trained, teacher_ended = True, now
    barrier = now
    for seconds in last:
        if len(running) == slots:
            end()
        start(0, seconds)
    while running:
        end()
    return Outcome(now, needed / (slots * now), teacher_ended, now - barrier, busy / now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=19, help="methods; with the baseline's 20 rows of 50 seeds are 1,000"
    )
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--slots", type=int, default=100, help="GPUs")
    parser.add_argument("--baseline", type=float, default=10.0, help="minutes that a baseline trains")
    asked = parser.parse_args()
    usual = Costs(baseline=60 * asked.baseline)
    cases = {
        "as it is": usual,
        "a board after each cell": replace(usual, board_share=None),
        "1 in 20 workers dies": replace(usual, deaths=0.05),
        "cells of 1 minute": replace(usual, baseline=60.0),
        "cells of 1 hour": replace(usual, baseline=3600.0),
        "no spread": replace(usual, spread=0.0),
    }
    print("| case | hours | GPUs used | teacher | equal time | driver busy |\n|---|---:|---:|---:|---:|---:|")
    for name, costs in cases.items():
        found = simulate(asked.rows, asked.seeds, asked.slots, costs)
        print(_row(name, found))
    print(_row("longest cells first", simulate(asked.rows, asked.seeds, asked.slots, usual, longest_first=True)))
    for slots in (1, 10, 25, 50, 100, 200, 400):
        print(_row(f"{slots} GPUs", simulate(asked.rows, asked.seeds, slots, usual)))


def _row(name: str, found: Outcome) -> str:
    minutes = [f"{seconds / 60:.0f} min" for seconds in (found.teacher, found.equal_time)]
    return (
        f"| {name} | {found.seconds / 3600:.2f} | {100 * found.used:.0f} % | {' | '.join(minutes)} | "
        f"{100 * found.driver_busy:.1f} % |"
    )


if __name__ == "__main__":
    main()
