"""How often the statistics of boards are right, on boards whose truth is known. Writes docs/results/statistics.md.

python benchmarks/statistics/simulate.py             # about 5 minutes on one core
python benchmarks/statistics/simulate.py data_sets   # this part of the page alone
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from kdtoolkit.benchmark.across import critical_difference, friedman_p
from kdtoolkit.benchmark.comparison import Comparison, compare
from kdtoolkit.benchmark.improvement import probability_of_improvement
from kdtoolkit.benchmark.resampling import resampled_aps, resamples
from kdtoolkit.benchmark.stats import LEVEL
from kdtoolkit.benchmark.suite import BASELINE
from kdtoolkit.engine.scoring import Found

PAGE = Path(__file__).parents[2] / "docs" / "results" / "statistics.md"
SEEDS = (3, 5, 10)
ENTRIES = 5
AP, TEACHER = 30.0, 40.0  # of the baseline and of the teacher
Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Floats]

# Each has mean 0 and standard deviation 1.
NOISES: dict[str, Noise] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails (Student's t, 4 degrees)": lambda rng, shape: rng.standard_t(4, shape) / 2**0.5,
    "skewed (exponential)": lambda rng, shape: rng.exponential(size=shape) - 1,
}

INTRODUCTION = """\
# How often the statistics of boards are right

`python benchmarks/statistics/simulate.py` draws boards whose truth is known, computes their statistics with the code
that real boards use, and writes this page. No number on it is typed by hand. [statistics.md](../statistics.md) says
what each statistic is.

A simulated board has a baseline with a true AP of 30, {entries} entries and a teacher with an AP of 40. The AP of a
training is the row's true AP, plus noise that all rows share for a seed, plus noise of the row's own. Both have a
standard deviation of 1 point. There are {boards:,} boards for each line of a table, so a share of 95 % is known to
about {error:.1f} points.
"""

NO_DIFFERENCE = """\
## No entry differs from the baseline

*Covers 0*: the share of all 95 % intervals of *vs baseline* that hold the true difference, 0. *False alarms*: the share
of boards on which at least one entry is said to be above or below the baseline. First by the intervals alone, then by
the verdicts of boards, which Holm's procedure corrects. *Ranks*: the share of boards whose ranges of ranks hold the
true ranks of all rows.

| noise | seeds | covers 0 | false alarms, uncorrected | false alarms, Holm | ranks |
|---|---:|---:|---:|---:|---:|
"""

DIFFERENCES = """\
## Some entries are better

The entries are truly 0, 0, 1, 2 and 4 points above the baseline. *Shown*: the share of boards that say so. *False
alarms*: the share of boards that say of one of the two equal entries that it differs, or of a better one that it is
below the baseline. *Ranks*: as above. *First alone*: the share of boards on which the best entry shares the first rank
with no row.

| seeds | +1 shown | +2 shown | +4 shown | false alarms | ranks | first alone |
|---:|---:|---:|---:|---:|---:|---:|
"""

GAP = """\
## Share of the gap recovered

The share of 95 % intervals of *gap* (Fieller) that hold the true share. Where the baseline is not clearly below the
teacher, the board shows no interval. That is never wrong, and counts as covering; the last column says how often.

| noise | teacher above the baseline | true share | seeds | covers | no interval |
|---|---:|---:|---:|---:|---:|
"""

IMPROVEMENT = """\
## Probability of improvement

*Mean value*: the mean of the numbers on the boards. It should be the true P. *Covers*: the share of 95 % intervals that
hold the true P(X > Y). First those of boards, which invert the exact rank test. Then, for the same rows, percentile
intervals of a bootstrap over seeds, which count pairs of the same seed too. *Seed*: the standard deviation of the noise
that both rows share. *Entry*: that of the entry's own noise; the baseline's own is 1 point. The intervals of boards are
wider than they need be where seeds matter much, and too narrow where the entry is far noisier than the baseline.

| seed | entry | true P | seeds | mean value | covers | mean width | bootstrap covers | mean width |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""

IMAGES = """\
## One seed: intervals over images

Two detectors of equal quality look at the same images, of 1 to 4 objects each. The share of 95 % intervals over images
that hold the true difference in AP, 0, of {count} simulated sets:

| images | covers 0 |
|---:|---:|
"""

DATA_SETS = """\
## Several data sets

No row is better than a different one. *Friedman*: the share of {friedman} simulated comparisons whose p is below 0.05.
*Nemenyi*: the share of {nemenyi} in which two mean ranks differ by the critical difference or more. Both should be at
most 5 %. *Can show*: whether a row that is best on all sets is told apart from one that is worst on all sets.

| data sets | rows | Friedman | Nemenyi | can show |
|---:|---:|---:|---:|---:|
"""


def boards(
    rng: np.random.Generator,
    count: int,
    seeds: int,
    noise: str = "normal",
    gains: Sequence[float] = (0.0,) * ENTRIES,
    teacher: float = TEACHER,
    shared: float = 1.0,
    last: float = 1.0,
) -> Iterator[tuple[dict[str, dict[int, float]], Comparison]]:
    """Simulated boards: the APs of each row by seed, and what the toolkit says about them.

    `shared`: the standard deviation of the noise that all rows share for a seed. `last`: that of the last entry's own.
    """
    names = (BASELINE, *(f"entry {place}" for place in range(len(gains))))
    means = AP + np.array([0.0, *gains])
    for _ in range(count):
        own = NOISES[noise](rng, (len(names), seeds))
        own[-1] *= last
        aps = means[:, None] + shared * NOISES[noise](rng, (1, seeds)) + own
        rows = {name: dict(enumerate(row)) for name, row in zip(names, aps.tolist(), strict=True)}
        yield rows, compare(rows, teacher)


def without_difference(rng: np.random.Generator, count: int) -> Iterator[str]:
    yield NO_DIFFERENCE.rstrip()
    noisier = "normal, the last entry 4 times as noisy"
    for name, noise, last in (*((noise, noise, 1.0) for noise in NOISES), (noisier, "normal", 4.0)):
        for seeds in SEEDS:
            covers, alone, together, ranks = [], [], [], []
            for _, found in boards(rng, count, seeds, noise, last=last):
                all_rows = [row.versus_baseline for row in found.rows.values() if row.versus_baseline is not None]
                inside = [each.low is None or each.high is None or each.low <= 0 <= each.high for each in all_rows]
                covers.append(statistics.fmean(inside))
                alone.append(not all(inside))
                together.append(any(each.verdict != "not shown" for each in all_rows))
                ranks.append(all(row.rank is not None and row.rank.low == 1 for row in found.rows.values()))
            yield f"| {name} | {seeds} | {' | '.join(percent(x) for x in (covers, alone, together, ranks))} |"
    yield ""


def with_differences(rng: np.random.Generator, count: int) -> Iterator[str]:
    gains = (0.0, 0.0, 1.0, 2.0, 4.0)
    yield DIFFERENCES.rstrip()
    truth = {BASELINE: 4, "entry 0": 4, "entry 1": 4, "entry 2": 3, "entry 3": 2, "entry 4": 1}
    for seeds in SEEDS:
        shown: dict[str, list[bool]] = {name: [] for name in ("entry 2", "entry 3", "entry 4")}
        wrong, ranks, alone = [], [], []
        for _, found in boards(rng, count, seeds, gains=gains):
            verdicts = {name: row.versus_baseline.verdict for name, row in found.rows.items() if row.versus_baseline}
            for name, told in shown.items():
                told.append(verdicts[name] == "holds")
            nothing = [verdicts[name] != "not shown" for name in ("entry 0", "entry 1")]
            wrong.append(any(nothing) or "hurts" in verdicts.values())
            known = {name: row.rank for name, row in found.rows.items() if row.rank is not None}
            ranks.append(all(rank.low <= truth[name] <= rank.high for name, rank in known.items()))
            alone.append(known["entry 4"].high == 1)
        yield f"| {seeds} | {' | '.join(percent(x) for x in (*shown.values(), wrong, ranks, alone))} |"
    yield ""


def gap(rng: np.random.Generator, count: int) -> Iterator[str]:
    yield GAP.rstrip()
    for noise, above, share in (
        ("normal", 10.0, 0.0),
        ("normal", 10.0, 0.6),
        ("normal", 3.0, 0.6),
        ("skewed (exponential)", 10.0, 0.6),
        ("skewed (exponential)", 3.0, 0.6),
    ):
        for seeds in SEEDS:
            covers, missing = [], []
            for _, found in boards(rng, count, seeds, noise, gains=(share * above,), teacher=AP + above):
                interval = found.rows["entry 0"].gap_interval
                missing.append(interval is None)
                covers.append(interval is None or interval[0] <= share <= interval[1])
            told = f"{above:.0f} points | {100 * share:.0f} % | {seeds} | {percent(covers)} | {percent(missing)}"
            yield f"| {noise} | {told} |"
    yield ""


def improvement(rng: np.random.Generator, count: int) -> Iterator[str]:
    yield IMPROVEMENT.rstrip()
    alike = [(shared, 1.0, truth) for shared in (0.0, 1.0, 10.0) for truth in (0.5, 0.7, 0.9)]
    for shared, last, truth in (*alike, (0.0, 4.0, 0.5), (0.0, 4.0, 0.7), (0.0, 20.0, 0.5)):
        noise = (2 * shared**2 + last**2 + 1) ** 0.5  # of the difference of two trainings with different seeds
        shift = noise * float(norm.ppf(truth))
        for seeds in SEEDS:
            values, ours, theirs = [], [], []
            for rows, _ in boards(rng, count, seeds, gains=(shift,), shared=shared, last=last):
                x, y = rows["entry 0"], rows[BASELINE]
                found = probability_of_improvement(x, y)
                assert found is not None
                values.append(found.value)
                ours.append((found.low, found.high))
                theirs.append(bootstrap(rng, np.array([*x.values()]), np.array([*y.values()])))
            told = (f"{coverage(each, truth)} | {width(each)}" for each in (ours, theirs))
            mean = f"{statistics.fmean(values):.3f}"
            yield f"| {shared:g} | {last:g} | {truth} | {seeds} | {mean} | {' | '.join(told)} |"
    yield ""


def bootstrap(rng: np.random.Generator, x: Floats, y: Floats, count: int = 500) -> tuple[float, float]:
    """The percentile interval of P(X > Y), of samples of the trainings of each row."""
    xs, ys = (each[rng.integers(len(each), size=(count, len(each)))] for each in (x, y))
    shares = (xs[:, :, None] > ys[:, None, :]).mean((1, 2))
    low, high = np.quantile(shares, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def images(rng: np.random.Generator, count: int) -> Iterator[str]:
    count //= 5  # they take long
    yield IMAGES.format(count=count).rstrip()
    for size in (30, 100):
        covers = []
        for _ in range(count):
            truth, one, two = detections(rng, size)
            counts = resamples(size, 400, seed=int(rng.integers(2**31)))
            difference = resampled_aps(truth, one, counts) - resampled_aps(truth, two, counts)
            low, high = np.nanquantile(difference, (LEVEL / 2, 1 - LEVEL / 2))
            covers.append(low <= 0 <= high)
        yield f"| {size} | {percent(covers)} |"
    yield ""


def detections(rng: np.random.Generator, size: int) -> tuple[dict[str, Any], Found, Found]:
    """A ground truth of one class, and the detections of two detectors that are equally good."""
    counts = rng.integers(1, 5, size)
    images = np.repeat(np.arange(size), counts)
    boxes = np.column_stack([rng.uniform(0, 60, (len(images), 2)), rng.uniform(20, 40, (len(images), 2))])
    annotations = [
        {"id": number, "image_id": image + 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (image, box) in enumerate(zip(images.tolist(), boxes.tolist(), strict=True), 1)
    ]
    truth = {
        "images": [{"id": number, "width": 100, "height": 100} for number in range(1, size + 1)],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": annotations,
    }
    hard = rng.random(len(images)) < 0.3  # for both

    def detector() -> Found:
        wrong = np.where(hard, 6.0, 2.0)[:, None] * rng.normal(size=boxes.shape)
        nothing = rng.integers(size, size=len(images))
        false = np.column_stack([rng.uniform(0, 60, (len(images), 2)), rng.uniform(20, 40, (len(images), 2))])
        return Found(
            np.concatenate([images, nothing]),
            np.zeros(2 * len(images), np.int64),
            np.concatenate([(boxes + wrong).clip(1), false]),
            np.concatenate([rng.beta(4, 2, len(images)), rng.beta(2, 4, len(images))]),
        )

    return truth, detector(), detector()


def data_sets(rng: np.random.Generator, count: int) -> Iterator[str]:
    yield DATA_SETS.format(friedman=count // 2, nemenyi=4 * count).rstrip()
    for rows in (3, 6):
        for sets in (2, 3, 4, 5, 10):
            aps = rng.normal(size=(4 * count, sets, rows))
            means = np.argsort(np.argsort(-aps, axis=2), axis=2).mean(axis=1)
            least = critical_difference(rows, sets)
            far = percent(np.ptp(means, axis=1) >= least)
            rejected = percent([(friedman_p(each) or 1.0) < LEVEL for each in aps[: count // 2]])
            yield f"| {sets} | {rows} | {rejected} | {far} | {'yes' if rows - 1 >= least else 'no'} |"
    yield ""


def percent(values: Iterable[float]) -> str:
    return f"{100 * float(np.mean(list(values))):.1f} %"


def coverage(intervals: Sequence[tuple[float, float]], truth: float) -> str:
    return percent([low <= truth <= high for low, high in intervals])


def width(intervals: Sequence[tuple[float, float]]) -> str:
    return f"{statistics.fmean(high - low for low, high in intervals):.2f}"


PARTS = (without_difference, with_differences, gap, improvement, data_sets, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to run: " + ", ".join(p.__name__ for p in PARTS))
    parser.add_argument("--boards", type=int, default=1000, help="simulated boards for each line of a table")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write; parts that are not run stay")
    options = parser.parse_args()
    sections = [""] * len(PARTS)
    if options.parts:
        sections = options.out.read_text("utf-8").split("\n## ")[1:]
    for place, part in enumerate(PARTS):
        if not options.parts or part.__name__ in options.parts:
            start = time.monotonic()
            text = "\n".join(part(np.random.default_rng(place), options.boards))
            sections[place] = text.removeprefix("## ").rstrip() + "\n"
            print(f"{part.__name__}: {time.monotonic() - start:.0f} s", flush=True)
    error = 196 * (0.95 * 0.05 / options.boards) ** 0.5
    introduction = INTRODUCTION.format(entries=ENTRIES, boards=options.boards, error=error)
    options.out.write_text("\n## ".join([introduction, *sections]), "utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
