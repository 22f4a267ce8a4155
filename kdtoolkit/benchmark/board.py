"""The leaderboard as numbers and sentences, read from a run's folder. `report` and `html` only lay it out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kdtoolkit.benchmark import equal_time
from kdtoolkit.benchmark.comparison import Compared, compare
from kdtoolkit.benchmark.over_images import aps_over_images
from kdtoolkit.benchmark.runs import Run, open_run
from kdtoolkit.benchmark.stats import (
    Difference,
    Probability,
    RankRange,
    Spread,
    Verdict,
    p_text,
    paired_difference,
    spread,
)
from kdtoolkit.benchmark.store import CellResult, Store, cell_name
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE, DetectorSection, Suite
from kdtoolkit.words import counted

METRICS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}


@dataclass(frozen=True)
class Row:
    """One row of the board: means over its seeds.

    Differences and `gap_recovered` compare it with the baselines on the same seeds. `gap_interval`: the 95 % interval
    of `gap_recovered`; None if there is none. `p_improvement`: the probability that one training of the row has a
    higher AP than one of the baseline with a different seed; None for fewer than two seeds. `rank`: None for rows that
    are not ranked, because they have different numbers of steps. Times and memory are None if the row's cells were
    measured on different hardware. `init`: "teacher" if the row's students started from the teacher's weights, else
    empty. `aps`: the AP of each seed that has one.
    """

    entry: str
    methods: str
    seeds: tuple[int, ...]
    metrics: dict[str, Spread | None]
    versus_baseline: Difference | None
    versus_equal_time: Difference | None
    gap_recovered: float | None
    steps: float
    step_ms: float | None
    train_seconds: float | None
    peak_memory_mb: float | None
    parameters: int
    init: str = ""
    gap_interval: tuple[float, float] | None = None
    p_improvement: Probability | None = None
    rank: RankRange | None = None
    aps: dict[int, float] = field(default_factory=dict)

    @property
    def ap(self) -> float:
        """Mean AP; -1 if it is undefined."""
        found = self.metrics["ap"]
        return -1.0 if found is None else found.mean


@dataclass(frozen=True)
class Claim:
    """What the numbers say about one entry, compared with one of the two baselines."""

    entry: str
    against: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Board:
    """A leaderboard.

    `rows`: baselines and entries, sorted by AP, highest first. `claims`: sentences. `facts`: settings by name.
    `warnings`: what is wrong or missing. `pairs`: `pairs[a][b]` is the difference in AP of row a minus row b, for the
    baseline and the entries; a pair of rows without a common seed is missing. `summary`: one sentence that says which
    rows are first. `seeds`: how many the suite asks for.
    """

    title: str
    description: str
    facts: dict[str, str]
    rows: tuple[Row, ...]
    teacher: Row | None
    claims: tuple[Claim, ...]
    warnings: tuple[str, ...]
    pairs: dict[str, dict[str, Difference]] = field(default_factory=dict)
    summary: str = ""
    seeds: int = 0


def build_board(root: Path) -> Board:
    """The board of a run's folder, also if the run is unfinished. Raises KDError if the folder holds no run."""
    return board_of(open_run(root))


def board_of(run: Run) -> Board:
    """The board of a run, also if it is unfinished."""
    store, suite, cells, teacher = run.store, run.suite, run.cells.rows, run.cells.teacher
    aps = {row: _aps(results) for row, results in cells.items()}
    teacher_ap = teacher.evaluation["ap"] if teacher else None
    over_images = aps_over_images(store, run.cells, suite.data.max_detections) if suite.seeds == 1 else {}
    comparison = compare(aps, teacher_ap, over_images)
    rows = [_row(suite, row, results, comparison.rows[row]) for row, results in cells.items() if results]
    rows.sort(key=lambda row: -row.ap)
    done = [result for results in cells.values() for result in results] + ([teacher] if teacher else [])
    return Board(
        title=run.root.resolve().name,
        description=suite.description,
        facts=_facts(suite, cells, done),
        rows=tuple(rows),
        teacher=_row(suite, TEACHER, [teacher], Compared()) if teacher else None,
        claims=tuple(_claims(rows)),
        warnings=(*run.cells.left_out, *_warnings(store, suite, cells, teacher)),
        pairs=comparison.pairs,
        summary=_summary(rows),
        seeds=suite.seeds,
    )


def _aps(results: Iterable[CellResult]) -> dict[int, float]:
    return {result.seed: ap for result in results if (ap := result.evaluation["ap"]) is not None}


def _row(suite: Suite, entry: str, results: list[CellResult], compared: Compared) -> Row:
    def cost(name: str) -> float | None:
        if len({(result.hardware, result.way) for result in results}) > 1:
            return None
        found = spread(getattr(result, name) for result in results)
        return None if found is None else found.mean

    uses = (use.name + (f"({_arguments(use.args)})" if use.args else "") for use in suite.methods(entry))
    return Row(
        entry=entry,
        methods=" + ".join(uses),
        seeds=tuple(result.seed for result in results),
        metrics={name: spread(result.evaluation[name] for result in results) for name in METRICS},
        versus_baseline=compared.versus_baseline,
        versus_equal_time=compared.versus_equal_time,
        gap_recovered=compared.gap_recovered,
        steps=statistics.fmean(result.steps for result in results),
        step_ms=cost("cost_ms"),
        train_seconds=cost("train_seconds"),
        peak_memory_mb=cost("peak_memory_mb"),
        parameters=results[0].parameters,
        init="teacher" if any(result.inherited for result in results) else "",
        gap_interval=compared.gap_interval,
        p_improvement=compared.p_improvement,
        rank=compared.rank,
        aps=_aps(results),
    )


def _arguments(args: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in args.items())


def _claims(rows: Iterable[Row]) -> Iterable[Claim]:
    methods = sorted((row for row in rows if row.methods), key=lambda row: -row.ap)
    for row in methods:
        yield from _claim(row, BASELINE, row.versus_baseline)
    for row in methods:
        yield from _claim(row, EQUAL_TIME, row.versus_equal_time)


def _claim(row: Row, against: str, difference: Difference | None) -> Iterable[Claim]:
    if difference is None:
        return
    words = {"holds": "is above", "not shown": "cannot be told apart from", "hurts": "is below"}
    budget = "at equal steps" if against == BASELINE else "at equal time"
    if difference.low is None:
        known = ["no interval" if difference.pairs == 1 else "no interval: the same difference for all seeds"]
    else:
        over = " over images" if difference.over == "images" else ""
        known = [f"95 % interval{over} {difference.low:+.2f} to {difference.high:+.2f}"]
    if difference.p is not None:
        known.append(f"p {p_text(difference.p)}")
    if difference.p_holm is not None:
        known.append(f"after Holm's correction {p_text(difference.p_holm)}")
    known.append(counted(difference.pairs, "seed"))
    text = (
        f"{row.entry} {words[difference.verdict]} the baseline {budget}: {difference.mean:+.2f} AP ({', '.join(known)})"
    )
    yield Claim(row.entry, against, difference.verdict, text)


def _summary(rows: Iterable[Row]) -> str:
    """Which rows are first, in words. `rows`: the highest AP first."""
    ranked = [row for row in rows if row.rank is not None]
    first = [row.entry for row in ranked if row.rank is not None and row.rank.low == 1]
    if not ranked:
        return "The rows have no ranks yet: ranks need two rows with two seeds in common."
    best = ranked[0]
    gain = "" if best.versus_baseline is None else f", {best.versus_baseline.text} against the baseline"
    if len(first) == 1:
        return f"{best.entry} is first of {len(ranked)} rows with equal steps: AP {best.ap:.1f}{gain}."
    return (
        f"{_listed(first)} share the first rank of {len(ranked)} rows with equal steps: none of them is shown to be "
        f"below a different row. {best.entry} has the highest mean AP, {best.ap:.1f}{gain}."
    )


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _facts(suite: Suite, cells: Mapping[str, list[CellResult]], done: list[CellResult]) -> dict[str, str]:
    def distinct(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values)) or "-"

    def training(detector: DetectorSection) -> str:
        train = detector.train
        if train is None:
            return f"{detector.model}, used as it is"
        return (
            f"{detector.model}, {train.steps} steps of {train.batch_size} images, {train.optimizer}, lr {train.lr:g}, "
            f"{train.schedule}"
        )

    facts = {
        "data": distinct(result.data for result in done),
        "seeds": f"{suite.seeds} (rows are compared seed by seed: same first weights, same order of images)",
        "AP": f"COCO's; in each image the best {suite.data.max_detections} detections of a class count",
        "student": training(suite.student),
        "teacher": training(suite.teacher),
        "precision": distinct(result.key_parts.get("precision", suite.student.train.precision) for result in done),
    }
    if ways := _ways(cells):
        facts["computed"] = ways
    if equal := cells[EQUAL_TIME]:
        steps = distinct(str(result.steps) for result in equal)
        stretch = distinct(f"{result.stretch:.2f}" for result in equal)
        facts[EQUAL_TIME] = (
            f"{steps} steps: the schedule times {stretch}, so that it takes as long as the slowest method"
        )
    if cached := _cached(done):
        facts["teacher cache"] = cached
    if plateau := _plateau(cells):
        facts["plateau"] = plateau
    if inherited := distinct(result.inherited for result in done if result.inherited) if suite.init else "":
        facts["init"] = inherited
    threads = distinct(f"{counted(result.threads, 'thread')} a cell" for result in done)
    facts["machine"] = f"{distinct(result.machine for result in done)}; {threads}"
    facts["device"] = distinct(result.device for result in done)
    facts["versions"] = distinct(", ".join(f"{k} {v}" for k, v in result.versions.items()) for result in done)
    dates = sorted(result.date for result in done)
    facts["run"] = f"{dates[0]} to {dates[-1]}" if dates else "-"
    return facts


def _ways(cells: Mapping[str, list[CellResult]]) -> str:
    """In which ways the cells were computed, if these differ between the cells or between their teachers' caches."""
    found: dict[str, dict[str, list[str]]] = {}
    for row, results in cells.items():
        for result in results:
            found.setdefault(result.way, {}).setdefault(row, []).append(str(result.seed))
    taught = {result.way for results in cells.values() for result in results if result.teacher_key}
    if len({result.computed for results in cells.values() for result in results}) < 2 and len(taught) < 2:
        return ""
    return "in different ways. " + "; ".join(
        f"{way}: " + ", ".join(f"{row} (seed {', '.join(seeds)})" for row, seeds in at.items())
        for way, at in found.items()
    )


def _cached(done: Iterable[CellResult]) -> str:
    """How often the cells asked their teacher, in words; empty if they had no teacher cache."""
    found = [result.cached for result in done if result.cached is not None]
    if not found:
        return ""
    asked, shown = sum(each.misses for each in found), sum(each.misses + each.hits for each in found)
    return (
        f"{counted(len(found), 'cell')} asked the teacher about {asked:,} of {shown:,} images, and found the rest. The "
        "cost of each cell has the teacher's pass over each of its views once, whichever cell made it"
    )


def _plateau(cells: Mapping[str, list[CellResult]]) -> str:
    """How far the baseline is from its plateau, in words; empty if it was not measured."""
    final = _aps(cells[BASELINE])
    early = {result.seed: ap for result in cells[BASELINE] if (ap := result.ap_at_four_fifths) is not None}
    found = {
        "the last fifth of the baseline's steps adds": paired_difference(final, early),
        "twice the steps add": paired_difference(_aps(cells[TWICE]), final),
    }
    return ", ".join(f"{words} {added.text} AP" for words, added in found.items() if added is not None)


def _warnings(
    store: Store, suite: Suite, cells: Mapping[str, list[CellResult]], teacher: CellResult | None
) -> Iterable[str]:
    silent: dict[tuple[str, str], list[str]] = {}
    for row, results in cells.items():
        for result in results:
            for warning in result.warnings:
                silent.setdefault((row, warning), []).append(str(result.seed))
    for (row, warning), seeds in silent.items():
        yield f"{row} (seed {', '.join(seeds)}): {warning}"
    baseline = spread(result.evaluation["ap"] for result in cells[BASELINE])
    if teacher is not None and teacher.evaluation["ap"] is None:
        yield from (f"teacher: {warning}" for warning in teacher.warnings)
    elif teacher is not None and baseline is not None and (teacher.evaluation["ap"] or 0.0) <= baseline.mean:
        yield (
            f"the teacher (AP {teacher.evaluation['ap'] or 0.0:.1f}) is no better than the student's baseline "
            f"({baseline.mean:.1f}), so the student has nothing to learn from it. Train the teacher longer or on more "
            "images, or take a larger one."
        )
    yield from _mixed_hardware(cells, teacher)
    yield from equal_time.warnings(cells)
    places = {TEACHER: store.teacher_copy}
    places |= {cell_name(row, seed): store.result_path(row, seed) for row in cells for seed in range(suite.seeds)}
    for name, path in places.items():
        error = path.with_suffix(".error")
        if error.exists() and not path.exists():  # a cell that failed here may have come from elsewhere since
            yield f"{name} failed: {error.read_text('utf-8').splitlines()[0]}"
    for row in (BASELINE, *suite.entries):
        if len(cells[row]) < suite.seeds:
            yield f"{row}: {len(cells[row])} of {suite.seeds} seeds are done"
    if suite.seeds == 1:
        yield (
            "there is one seed only, so any difference may be chance. An interval over images shows what different "
            "images for evaluation would change, and not what a second training would change: run --seeds 3 or more"
        )


def _mixed_hardware(cells: Mapping[str, list[CellResult]], teacher: CellResult | None) -> Iterable[str]:
    """A warning if the board's times were not all measured on the same hardware."""
    found: dict[str, dict[str, list[str]]] = {}
    for row, results in {**cells, TEACHER: [teacher] if teacher else []}.items():
        for result in results:
            found.setdefault(result.hardware, {}).setdefault(row, []).append(str(result.seed))
    if len(found) > 1:
        rows = (
            f"{hardware}: "
            + ", ".join(row if row == TEACHER else f"{row} (seed {', '.join(s)})" for row, s in at.items())
            for hardware, at in found.items()
        )
        yield (
            "the cells were measured on different hardware. Compare times and memory only between cells on the same "
            f"hardware; rows that mix hardware show none. {'; '.join(rows)}"
        )
