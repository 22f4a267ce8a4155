"""Write docs/results/evidence.md from the boards of the evidence suites.

python benchmarks/evidence/page.py                # from the boards in docs/results/evidence
python benchmarks/evidence/page.py --runs runs    # takes the boards of finished and unfinished runs there first
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from kdtoolkit.benchmark.report import View, write_report
from kdtoolkit.benchmark.stats import Difference, judged_together, p_text, paired_difference
from kdtoolkit.words import counted

ROOT = Path(__file__).parents[2]
BOARDS = ROOT / "docs" / "results" / "evidence"
PAGE = ROOT / "docs" / "results" / "evidence.md"
_WORDS = {"holds": "shown"}  # of this page for verdicts that are named differently elsewhere
ENOUGH = 3  # seeds that a row needs before the page judges it
MAIN = ("CrossKD", "PKD", "CrossKD+PKD")
COMBINATION = "CrossKD+PKD"  # the best row of the board on drawn shapes, docs/results/quick
BASELINE, EQUAL_TIME, TWICE = "baseline", "baseline (equal time)", "baseline (twice the steps)"
IN_PAPER = {"CrossKD": 0.74, "CrossKD+PKD": 0.79}  # share of the gap, GFL R101 -> R50 (2306.11369)
OF_SETS = {
    "bccd": "Many red cells at the border or in clumps are not labelled, and some are labelled twice.",
    "playing-cards": (
        "Training and evaluation show the same deck in similar scenes. A student of half width, trained alone, ends "
        "far lower with some seeds than with others; one of full width does not."
    ),
    "chess": "Pieces are small: about 35 pixels in photos of 512.",
    "sketch-ui": "Headings and paragraphs are not told apart sharply, and evaluation has 31 drawings only.",
}

# What was mended since a board was made. A new run of its suite makes the sentence void.
MADE_BEFORE = {
    "bccd-deformable-detr": (
        "CrossKD was run when its gradient still reached the student's query embeddings through the teacher's head "
        "([cross_head.md](../cross_head.md))."
    ),
    "bccd-faster-rcnn-gfl": (
        "ObjectKD was run when boxes by which Faster R-CNN fills gaps between images could still count as predictions "
        "of an object as large as its image."
    ),
}

Board = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """A choice that a user has, and the two rows that differ by nothing else.

    A row is named by what follows the name of the data set in its board's name, and by its entry.
    """

    text: str
    row: tuple[str, str]
    instead_of: tuple[str, str]


CHOICES = (
    Choice("ImageNet weights, not random ones; student alone", ("", BASELINE), ("-scratch", BASELINE)),
    Choice("ImageNet weights, not random ones; CrossKD", ("", "CrossKD"), ("-scratch", "CrossKD")),
    Choice("a teacher one size up (lite1), not two (lite2); CrossKD", ("-lite1", "CrossKD"), ("", "CrossKD")),
    Choice("a student as wide as the teacher, not half as wide; CrossKD", ("-wide", "CrossKD"), ("", "CrossKD")),
    Choice("the teacher's neck and head to begin with; student alone", ("-inherit", BASELINE), ("-wide", BASELINE)),
    Choice("the teacher's neck and head to begin with; CrossKD", ("-inherit", "CrossKD"), ("-wide", "CrossKD")),
    Choice("CrossKD left out in the last tenth of the steps", ("", "CrossKD, stop 0.9"), ("", "CrossKD")),
    Choice("the teacher asked once for each view; CrossKD", ("-cache", "CrossKD"), ("", "CrossKD")),
)

INTRODUCTION = """\
# Evidence on real photographs

Does distillation help on real photographs, with detectors that start from ImageNet weights? These boards answer for
small sets, small images and short schedules, because they were measured mostly on two CPU cores.
`benchmarks/evidence/` has the suites. `python benchmarks/evidence/run.py` runs what is missing in them, and `python
benchmarks/evidence/page.py` writes this page from the boards. No number on it is typed by hand.

Each difference is taken seed by seed, with a 95 % t-interval in brackets. A difference is *shown* if it is above 0, and
if the p of the paired t-test, after Holm's correction, is below 0.05. It *hurts* if it is below 0 with such a p. Else
it is *not shown*. The three main rows (CrossKD, PKD, CrossKD+PKD), which have more seeds by plan, are corrected
together, and so are all other rows of a board. The boards themselves correct all their rows together, and so show less
where they have many rows. A row with fewer than 3 seeds is not judged.
[board.md](../board.md) explains the columns.
"""

NOT_SHOWN = """\
## What these boards do not show

- **Large data and published schedules.** Students see 30 to 74 labelled photos of 160 or 192 pixels, for 300 steps.
  Nothing here replaces a run on COCO.
- **The plateau.** Each board says how much the baseline still gains with more steps. Where that is much, a gain at
  equal steps is partly a faster start. The row at equal time answers for it, at one budget.
- **A gain on playing-cards where the student trains well alone.** At half width it fails with some seeds, which methods
  prevent. So a part of their gain there is a safer training. The student of full width does not fail
  (playing-cards-wide): CrossKD's gain is far smaller there, and not shown.
- **Other splits.** All seeds of a set use the same photos for training and for evaluation. The intervals cover first
  weights and the order of images, and not the choice of photos. Sets for evaluation are small (31 to 87 photos), so a
  different one may rank close rows differently.
- **Tuned methods.** All methods have their defaults, which were published for large images. A method that does not
  help here may help with weights that fit.
- **One board of many.** The verdicts are corrected for the number of methods of a board, and not for the number of
  boards. Of twenty boards without any true difference, one is expected to show one.
- **A student with all labels.** The teacher has about four times the labels of the student. So part of a gain is what
  the teacher knows from photos whose labels the student never sees. Where the student has them too, gains may be
  smaller.
- **One teacher a set.** All rows of a set have the same teacher, of one seed. A better or worse teacher may change
  the order of the methods.
"""


def verdicts(board: Board, against: str) -> dict[str, str]:
    """`shown`, `not shown` or `hurts` for each method of a board, or empty if it has too few seeds.

    The main rows are corrected together, and all other rows together.
    """
    found = {
        row["entry"]: Difference(**row[against])
        for row in _methods(board)
        if row[against] is not None and row[against]["pairs"] >= ENOUGH
    }
    main = judged_together({entry: each for entry, each in found.items() if entry in MAIN})
    others = judged_together({entry: each for entry, each in found.items() if entry not in MAIN})
    judged = {entry: _WORDS.get(each.verdict, each.verdict) for entry, each in (main | others).items()}
    return {row["entry"]: judged.get(row["entry"], "") for row in _methods(board)}


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """`+1.2 [+0.3, +2.1]`, or `-`."""
    return "-" if difference is None else Difference(**difference).text


def spread_text(spread: Mapping[str, Any] | None) -> str:
    """`31.2 ± 0.4`, or `-`."""
    if spread is None:
        return "-"
    return f"{spread['mean']:.1f}" + ("" if spread["std"] is None else f" ± {spread['std']:.1f}")


def gap_text(row: Row) -> str:
    """`62 %`, or `-`."""
    return "-" if row["gap_recovered"] is None else f"{100 * row['gap_recovered']:.0f} %"


def page(boards: Mapping[str, Board]) -> str:
    """The page, from boards by the name of their folder."""
    parts = [INTRODUCTION, *_summary(boards), *_combination(boards), *_choices(boards), *_pairs(boards)]
    for name, board in boards.items():
        parts.append("\n".join(_section(name, board)))
    return "\n".join([*parts, NOT_SHOWN])


def _methods(board: Board) -> list[Row]:
    return [row for row in board["rows"] if row["methods"]]


def _named(board: Board, entry: str) -> Row | None:
    return next((row for row in board["rows"] if row["entry"] == entry), None)


def _summary(boards: Mapping[str, Board]) -> Iterator[str]:
    """How often each entry is above the baselines, over all boards."""
    entries = dict.fromkeys([*MAIN, *(row["entry"] for board in boards.values() for row in _methods(board))])
    judged = {
        against: {name: verdicts(board, against) for name, board in boards.items()}
        for against in ("versus_baseline", "versus_equal_time")
    }
    yield "## In short\n"
    yield "| entry | at equal steps: shown | not shown | hurts | at equal time: shown | not shown | hurts |"
    yield "|---|---|---|---|---|---|---|"
    for entry in entries:
        cells = []
        for found in judged.values():
            for word in ("shown", "not shown", "hurts"):
                names = [name for name, each in found.items() if each.get(entry) == word]
                cells.append(f"{len(names)}: {', '.join(names)}" if names else "-")
        if set(cells) != {"-"}:
            yield f"| {entry} | {' | '.join(cells)} |"
    yield ""


def _combination(boards: Mapping[str, Board]) -> Iterator[str]:
    """The combination against each single method, on the boards that have both with enough seeds."""
    lines: list[str] = []
    of_boards: dict[str, list[str]] = {}
    for name, board in boards.items():
        for row in _methods(board):
            found = board.get("pairs", {}).get(COMBINATION, {}).get(row["entry"])
            if found is not None and found["p"] is not None and found["pairs"] >= ENOUGH:
                verdict = "above" if found["low"] > 0 else "below" if found["high"] < 0 else "not shown"
                of_boards.setdefault(name, []).append(verdict)
                cells = (name, row["entry"], difference_text(found), p_text(found["p"]), str(found["pairs"]), verdict)
                lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return
    yield f"## {COMBINATION} against each single method\n"
    yield (
        f"{COMBINATION} was chosen on drawn shapes, where it is the best row of [quick](quick/leaderboard.md), before "
        "any of these boards was run. Its verdict here is that of one 95 % interval, and p is that of one paired "
        "t-test: neither is corrected for the number of lines. To say that it is above *every* method of a board needs "
        "no correction, since all lines must show it. "
        f"It is: {_above_all(of_boards)}.\n"
    )
    yield f"| board | method | {COMBINATION} minus the method | p | seeds | verdict |"
    yield "|---|---|---:|---:|---:|---|"
    yield from lines
    yield ""


def _above_all(of_boards: Mapping[str, Sequence[str]]) -> str:
    """`on bccd (6 of 6 methods), not on chess (2 of 3 methods)`."""
    told = []
    for name, each in of_boards.items():
        above = each.count("above")
        where = "on" if above == len(each) else "not on"
        told.append(f"{where} {name} ({above} of {counted(len(each), 'method')})")
    return ", ".join(told)


def _choices(boards: Mapping[str, Board]) -> Iterator[str]:
    """What each choice adds on each set, of those whose two rows have enough seeds in common."""
    compared: dict[tuple[str, str], tuple[float, float]] = {}
    differences: dict[tuple[str, str], Difference] = {}
    for choice in CHOICES:
        for name in OF_SETS:
            with_it, without = (_aps(boards, name + end, entry) for end, entry in (choice.row, choice.instead_of))
            difference = paired_difference(with_it, without)
            if difference is not None and difference.pairs >= ENOUGH:
                both = with_it.keys() & without.keys()
                first, second = (fmean(aps[seed] for seed in both) for aps in (with_it, without))
                compared[choice.text, name] = first, second
                differences[choice.text, name] = difference
    if not compared:
        return
    yield "## Weights to begin with, teacher, and schedule\n"
    yield (
        "Each line compares two rows that differ by one choice, over the seeds that both have. All lines are corrected "
        "together: *above* and *below* have a p below 0.05 after Holm's correction.\n"
    )
    yield "| choice | set | AP | AP without it | difference | p | seeds | verdict |"
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    words = {"holds": "above", "not shown": "not shown", "hurts": "below"}
    for (text, name), found in judged_together(differences).items():
        aps = (f"{ap:.1f}" for ap in compared[text, name])
        p = "-" if found.p is None else p_text(found.p)
        yield f"| {' | '.join((text, name, *aps, found.text, p, str(found.pairs), words[found.verdict]))} |"
    yield ""


def _aps(boards: Mapping[str, Board], name: str, entry: str) -> dict[int, float]:
    """The AP of a row for each seed; empty if there is no such board or row."""
    row = _named(boards[name], entry) if name in boards else None
    return {} if row is None else {int(seed): ap for seed, ap in row["aps"].items()}


def _pairs(boards: Mapping[str, Board]) -> Iterator[str]:
    """One method on all boards: what teacher, first weights and kind of detector change."""
    yield "## One method, all pairs of detectors\n"
    yield (
        "CrossKD needs heads that fit each other; where they do not, ObjectKD stands in for it. ObjectKD weighs a "
        "prediction by its box. This was chosen by two seeds of bccd. Two of its boards have five seeds, and the last "
        "two were added after the first three had been seen. So the boards of bccd say a little too much for it.\n"
    )
    yield "| board | teacher | baseline | method | AP | vs baseline | gap recovered | seeds |"
    yield "|---|---:|---:|---|---:|---:|---:|---:|"
    for name, board in boards.items():
        row, baseline = _named(board, "CrossKD") or _named(board, "ObjectKD"), _named(board, BASELINE)
        if row is None or baseline is None or board["teacher"] is None:
            continue
        aps = [spread_text(each["metrics"]["ap"]) for each in (board["teacher"], baseline, row)]
        cells = (f"[{name}](#{name})", *aps[:2], row["entry"], aps[2], difference_text(row["versus_baseline"]))
        yield f"| {' | '.join(cells)} | {gap_text(row)} | {len(row['seeds'])} |"
    yield ""


def _section(name: str, board: Board) -> Iterator[str]:
    teacher = board["teacher"]
    yield f"## {name}\n"
    yield f"{board['description']}. [The whole board](evidence/{name}/leaderboard.md).\n"
    yield "| row | AP | vs baseline | vs equal time | gap recovered | in the paper | seeds | steps |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    if teacher is not None:
        yield f"| teacher | {spread_text(teacher['metrics']['ap'])} | - | - | - | - | 1 | {teacher['steps']:.0f} |"
    for row in board["rows"]:
        paper = f"{100 * IN_PAPER[row['entry']]:.0f} %" if _is_gfl(board) and row["entry"] in IN_PAPER else "-"
        cells = (
            row["entry"],
            spread_text(row["metrics"]["ap"]),
            *(difference_text(row[against]) for against in ("versus_baseline", "versus_equal_time")),
            gap_text(row),
            paper,
            str(len(row["seeds"])),
            f"{row['steps']:.0f}",
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield from _claims(board)
    yield f"- Plateau: {_plateau(board)}."
    yield f"- Data: {board['facts']['data']}. {OF_SETS.get(_set_of(name), '')}".rstrip()
    few = [f"{row['entry']} ({len(row['seeds'])})" for row in _methods(board) if len(row["seeds"]) < ENOUGH]
    if few:
        yield f"- Not judged yet, with fewer than {ENOUGH} seeds: {'; '.join(few)}."
    if (equal := _named(board, EQUAL_TIME)) is None or len(equal["seeds"]) < ENOUGH:
        yield "- The baseline at equal time has not been run with enough seeds, so nothing is said at equal time."
    yield from (
        f"- Warning: {warning.rstrip('.')}." for warning in board["warnings"] if not warning.endswith("seeds are done")
    )
    if name in MADE_BEFORE:
        yield f"- {MADE_BEFORE[name]}"
    yield f"- Versions: {board['facts']['versions']}."
    yield ""


def _claims(board: Board) -> Iterator[str]:
    """What is shown on this board and what is not, a line for each verdict."""
    for against, budget in (("versus_baseline", "equal steps"), ("versus_equal_time", "equal time")):
        found = verdicts(board, against)
        words = {"shown": "Above the baseline", "not shown": "Not shown", "hurts": "Below the baseline"}
        for word, text in words.items():
            if names := [entry for entry, judged in found.items() if judged == word]:
                yield f"- {text} at {budget}: {'; '.join(names)}."


def _plateau(board: Board) -> str:
    """How far the baseline is from its plateau, in words: what its last steps add, and what further ones would."""
    known = [board["facts"]["plateau"]] if "plateau" in board["facts"] else []
    baseline, equal = _named(board, BASELINE), _named(board, EQUAL_TIME)
    if baseline is not None and equal is not None and equal["steps"] > baseline["steps"]:
        added = difference_text(equal["versus_baseline"])
        known.append(f"{equal['steps'] / baseline['steps']:.1f} times the steps (equal time) add {added} AP")
    return ", ".join(known) or "not measured on this board"


def _is_gfl(board: Board) -> bool:
    return all(board["facts"][role].startswith("kdtoolkit/gfl") for role in ("teacher", "student"))


def _set_of(name: str) -> str:
    """The data set of a board: the longest known one that its name begins with."""
    return max((known for known in OF_SETS if name.startswith(known)), key=len, default="")


def stored(folder: Path) -> dict[str, Board]:
    """The boards below a folder: those of the four sets first, then all others by name."""
    names = sorted(path.parent.name for path in folder.glob("*/leaderboard.json"))
    names.sort(key=lambda name: (name not in OF_SETS, list(OF_SETS).index(name) if name in OF_SETS else 0))
    return {name: json.loads((folder / name / "leaderboard.json").read_text("utf-8")) for name in names}


def take(runs: Path, folder: Path) -> Iterable[str]:
    """Write the boards of the evidence runs below `runs` into `folder`; their names."""
    for suite in sorted(runs.glob("evidence-*/suite.yaml")):
        name = suite.parent.name.removeprefix("evidence-")
        view = View.of(suite.parent)
        if view.board.rows:
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_report([view], folder / name)
            yield name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="a folder of `kd benchmark run`: its boards are taken first")
    options = parser.parse_args(arguments)
    if options.runs is not None:
        print("boards taken:", ", ".join(take(options.runs, BOARDS)) or "none")
    PAGE.write_text(page(stored(BOARDS)), "utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
