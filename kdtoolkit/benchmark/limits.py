"""What a board does not show, in sentences made from its own numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median

from kdtoolkit.benchmark.cells import Cells
from kdtoolkit.benchmark.stats import paired_difference
from kdtoolkit.benchmark.store import CellResult
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TWICE, Suite
from kdtoolkit.words import counted

MANY_SEEDS = 10
MANY_IMAGES = 5000  # of evaluation, as COCO has them
USUAL_SIZE = 640  # pixels; smaller images are not what most detectors are used on
STILL_RISING = 0.5  # AP; what the last fifth or twice the steps may add to a baseline that is near its plateau


def limits_of(suite: Suite, cells: Cells) -> Iterable[str]:
    """What a board does not show, one sentence or two for each limit."""
    rows = {row: results for row, results in cells.rows.items() if results}
    yield (
        "One data set, one student and one teacher were compared. What holds here need not hold for different images, "
        "detectors or schedules."
    )
    yield from _seeds(rows)
    yield from _images(suite, cells)
    yield from _teacher(suite)
    yield from _plateau(rows)
    yield (
        "Learning rates and the methods' weights are those of the suite. Nobody searched the best ones for each row, "
        "so a row that is low here may be higher with different ones."
    )
    yield from _hardware(rows)


def _seeds(rows: Mapping[str, Sequence[CellResult]]) -> Iterable[str]:
    counts = {len(results) for results in rows.values()}
    if not counts:
        return
    few, most = min(counts), max(counts)
    if most == 1:
        yield "Each row has one seed. Two trainings that differ in the seed alone already differ in AP."
        return
    if few < most:
        yield f"The rows have different numbers of seeds ({few} to {most}), so some are known better than others."
    if few < MANY_SEEDS and (width := _typical_half_width(rows)) is not None:
        yield (
            f"With {counted(most, 'seed')}, a typical interval reaches {width:.1f} AP to each side. Differences that "
            "are much smaller may be real and yet cannot be told from chance; more seeds show smaller ones."
        )


def _typical_half_width(rows: Mapping[str, Sequence[CellResult]]) -> float | None:
    """The median of what the intervals of the methods' differences to the baseline reach to each side."""
    baseline = _aps(rows.get(BASELINE, ()))
    methods = [results for row, results in rows.items() if row not in (BASELINE, EQUAL_TIME, TWICE)]
    found = [paired_difference(_aps(results), baseline) for results in methods]
    widths = [(each.high - each.low) / 2 for each in found if each and each.high is not None and each.low is not None]
    return median(widths) if widths else None


def _images(suite: Suite, cells: Cells) -> Iterable[str]:
    if suite.seeds == 1:
        about = "Intervals are over images, of one training: a second training would change all APs."
    else:
        about = "The intervals are about further seeds, on the same images: different images would change all APs."
    if (count := suite.data.val_images) is not None and count < MANY_IMAGES:
        about = f"AP was measured on at most {count} images. {about}"
    yield about
    if (size := suite.data.image_size) < USUAL_SIZE:
        yield (
            f"No image is larger than {size} px. Small objects have few pixels then, and what helps here need not help "
            "on large images."
        )
    if suite.data.root is None:
        yield "The images are drawn shapes. They show that a method works, not how much it helps on photographs."


def _teacher(suite: Suite) -> Iterable[str]:
    teacher, student = suite.data.teacher_images, suite.data.student_images
    if suite.teacher.train is None:
        yield (
            "The teacher is used with the weights that it came with. If it has seen the images of evaluation, its AP "
            "and the gap are too good."
        )
    elif teacher == student:
        yield (
            "The teacher was trained on the same images as the students. A teacher that has seen more images may teach "
            "more."
        )
    elif student is not None and (teacher is None or student < teacher):
        yield (
            f"The teacher was trained on {'all' if teacher is None else teacher} images, the students on {student} of "
            "them. A part of what methods gain comes from the labels that only the teacher has seen."
        )
    else:
        yield (
            f"The students were trained on {'all' if student is None else student} images, the teacher on {teacher} of "
            "them. A teacher that has seen as many images may teach more."
        )


def _plateau(rows: Mapping[str, Sequence[CellResult]]) -> Iterable[str]:
    baseline, equal = rows.get(BASELINE, ()), rows.get(EQUAL_TIME, ())
    final = _aps(baseline)
    early = {result.seed: ap for result in baseline if (ap := result.ap_at_four_fifths) is not None}
    measured = {
        "twice the steps add": paired_difference(_aps(rows.get(TWICE, ())), final),
        "the last fifth of its steps adds": paired_difference(final, early),
    }
    lengths = [fmean(each.steps for each in row) for row in (baseline, equal) if row]
    if len(lengths) == 2 and (times := lengths[1] / lengths[0]) > 1:
        measured[f"{times:.1f} times the steps (equal time) add"] = paired_difference(_aps(equal), final)
    known = {words: found.mean for words, found in measured.items() if found is not None}
    if not known:
        yield (
            "How far the baseline is from its plateau was not measured (`plateau: true` in the suite). A gain at equal "
            "steps may be no more than a faster start."
        )
    elif max(known.values()) > STILL_RISING:
        added = ", ".join(f"{words} {mean:+.1f} AP" for words, mean in known.items())
        yield (
            f"The baseline is still rising: {added}. A gain at equal steps may be no more than a faster start, and "
            "longer schedules may change the order of the rows."
        )


def _hardware(rows: Mapping[str, Sequence[CellResult]]) -> Iterable[str]:
    results = [result for row in rows.values() for result in row]
    if len({result.hardware for result in results}) > 1:
        yield "The cells ran on different hardware, so rows that mix it have no times."
    if len({tuple(result.versions.items()) for result in results}) > 1:
        yield "The cells were made by different versions of kdtoolkit or its libraries (see the settings)."
    if EQUAL_TIME not in rows:
        yield "No baseline was trained for as long as the slowest method: a gain may be bought with time."
    if any(result.inference is not None for result in results):
        yield (
            "The time of one image is PyTorch's in float32, on this hardware. An exported or quantised model has a "
            "different one."
        )


def _aps(results: Iterable[CellResult]) -> dict[int, float]:
    return {result.seed: ap for result in results if (ap := result.evaluation["ap"]) is not None}
