"""Boards of made-up results, against numbers worked out by hand and a stored board."""

import csv
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.report import View, print_board, to_csv, to_markdown, write_report
from kdtoolkit.benchmark.store import Computed, Store, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE
from kdtoolkit.errors import KDError
from tests.benchmark._suite import made_up, store_result, tiny

GOLDEN = Path(__file__).parent / "golden" / "leaderboard.md"
APS = {
    BASELINE: [20.0, 22.0, 21.0],
    "PKD": [22.0, 24.2, 22.8],  # +2.0, +2.2, +1.8: holds; below the baseline at equal time
    "CrossKD+PKD": [25.0, 21.5, 25.5],  # +5.0, -0.5, +4.5
    EQUAL_TIME: [22.5, 24.5, 23.5],
}


def make_run(folder, aps=APS, *, teacher=31.0, seeds=3, elsewhere=()):
    store = Store(folder / "tiny")
    suite = tiny(("seeds: 2", f"seeds: {seeds}"), ("a few steps", "a <few> | steps"))
    write_atomic(store.suite_path, suite.to_yaml().encode())
    store_result(store.teacher_copy, made_up(TEACHER, 0, teacher, parameters=99999))
    for row, values in aps.items():
        stretch = {"stretch": 2.5, "steps": 250} if row == EQUAL_TIME else {}
        for seed, ap in enumerate(values):
            warnings = ["loss term pkd/feature is exactly zero"] if (row, seed) == ("CrossKD+PKD", 1) else []
            machine = "another machine" if (row, seed) in elsewhere else "a machine"
            result = made_up(row, seed, ap, warnings=warnings, machine=machine, **stretch)
            store_result(store.result_path(row, seed), result)
    return store.root


def test_rows_and_claims_by_hand(tmp_path):
    board = build_board(make_run(tmp_path))
    assert [row.entry for row in board.rows] == ["CrossKD+PKD", EQUAL_TIME, "PKD", BASELINE]
    pkd = board.rows[2]
    assert pkd.metrics["ap"].mean == pytest.approx(23.0)
    assert pkd.versus_baseline.mean == pytest.approx(2.0)
    half = 4.30265 * 0.2 / 3**0.5
    assert (pkd.versus_baseline.low, pkd.versus_baseline.high) == pytest.approx((2 - half, 2 + half))
    assert pkd.gap_recovered == pytest.approx(0.2)  # 2 of the 10 points from 21 to 31
    assert pkd.metrics["ap_small"] is None
    verdicts = {(claim.entry, claim.against): claim.verdict for claim in board.claims}
    assert verdicts == {
        ("PKD", BASELINE): "holds",
        ("CrossKD+PKD", BASELINE): "not shown",
        ("PKD", EQUAL_TIME): "not shown",  # p is 0.035, and 0.069 for two methods
        ("CrossKD+PKD", EQUAL_TIME): "not shown",
    }
    assert board.warnings == ("CrossKD+PKD (seed 1): loss term pkd/feature is exactly zero",)
    assert board.summary == (
        "CrossKD+PKD and PKD share the first rank of 3 rows with equal steps: none of them is shown to be below a "
        "different row. CrossKD+PKD has the highest mean AP, 24.0, +3.0 [-4.6, +10.6] against the baseline."
    )


def test_markdown_is_as_stored(tmp_path):
    assert to_markdown([View.of(make_run(tmp_path))]) == GOLDEN.read_text("utf-8")


def test_the_board_says_how_far_the_baseline_is_from_its_plateau(tmp_path):
    root = make_run(tmp_path)
    assert "plateau" not in build_board(root).facts
    for seed, (early, final, twice) in enumerate(((19.0, 20.0, 23.0), (21.2, 22.0, 25.2), (19.8, 21.0, 23.8))):
        result = made_up(BASELINE, seed, final, ap_at_four_fifths=early)
        store_result(Store(root).result_path(BASELINE, seed), result)
        store_result(Store(root).result_path(TWICE, seed), made_up(TWICE, seed, twice, steps=200, stretch=2.0))
    assert build_board(root).facts["plateau"] == (
        "the last fifth of the baseline's steps adds +1.0 [+0.5, +1.5] AP, twice the steps add +3.0 [+2.5, +3.5] AP"
    )


def test_one_seed_has_no_spread_and_says_so(tmp_path):
    aps = {row: values[:1] for row, values in APS.items()}
    board = build_board(make_run(tmp_path, aps, seeds=1))
    pkd = next(row for row in board.rows if row.entry == "PKD")
    assert pkd.metrics["ap"].std is None
    assert pkd.versus_baseline.low is None
    assert any("one seed only" in warning for warning in board.warnings)
    claims = [claim.text for claim in board.claims]
    assert "PKD cannot be told apart from the baseline at equal steps: +2.00 AP (no interval, 1 seed)" in claims


def test_a_teacher_no_better_than_the_baseline_is_a_warning_and_has_no_gap(tmp_path):
    board = build_board(make_run(tmp_path, teacher=20.5))
    assert any("teacher (AP 20.5) is no better than the student's baseline (21.0)" in w for w in board.warnings)
    assert all(row.gap_recovered is None for row in board.rows)


def test_a_difference_without_spread_shows_nothing_and_says_why(tmp_path):
    board = build_board(make_run(tmp_path, {BASELINE: [20.1, 22.1], "PKD": [22.4, 24.4]}, seeds=2))
    claim = next(claim for claim in board.claims if claim.entry == "PKD")
    assert (claim.verdict, claim.text) == (
        "not shown",
        "PKD cannot be told apart from the baseline at equal steps: +2.30 AP "
        "(no interval: the same difference for all seeds, 2 seeds)",
    )


def test_an_unfinished_board_pairs_what_is_there(tmp_path):
    board = build_board(make_run(tmp_path, {BASELINE: [20.0, 22.0, 21.0], "PKD": [21.0]}))
    pkd = next(row for row in board.rows if row.entry == "PKD")
    assert pkd.versus_baseline.mean == pytest.approx(1.0)  # of seed 0, not of the means
    assert pkd.versus_equal_time is None
    assert "PKD: 1 of 3 seeds are done" in board.warnings
    assert "CrossKD+PKD: 0 of 3 seeds are done" in board.warnings


def test_times_of_different_hardware_are_neither_averaged_nor_unnamed(tmp_path):
    root = make_run(tmp_path, elsewhere=[("PKD", 1), *((EQUAL_TIME, seed) for seed in range(3))])
    board = build_board(root)
    rows = {row.entry: row for row in board.rows}
    assert (rows["PKD"].step_ms, rows["PKD"].train_seconds, rows["PKD"].peak_memory_mb) == (None, None, None)
    assert rows["PKD"].versus_baseline.mean == pytest.approx(2.0)
    assert (rows[BASELINE].step_ms, rows[EQUAL_TIME].step_ms) == (200.0, 200.0)
    assert board.warnings[1] == (
        "the cells were measured on different hardware. Compare times and memory only between cells on the same "
        "hardware; rows that mix hardware show none. a machine, 1 thread a cell: "
        "baseline (seed 0, 1, 2), PKD (seed 0, 2), CrossKD+PKD (seed 0, 1, 2), "
        "teacher; another machine, 1 thread a cell: PKD (seed 1), baseline (equal time) (seed 0, 1, 2)"
    )
    write_report([View.of(root)], root)
    text = (root / "leaderboard.md").read_text("utf-8")
    assert "| 3 | 100 | - | - | - | 12,345 |" in text
    assert "different hardware" in text
    assert ",100,,,,12345" in to_csv([View.of(root)])


def test_cells_that_were_computed_in_different_ways_are_named(tmp_path):
    root = make_run(tmp_path)
    assert "computed" not in build_board(root).facts
    computed = Computed(precision="float32", channels_last=True, winograd=True)
    store_result(Store(root).result_path("PKD", 1), made_up("PKD", 1, 24.2, computed=computed))
    board = build_board(root)
    assert "float32, channels last, Winograd: PKD (seed 1)" in board.facts["computed"]
    assert "float32, channels first: baseline (seed 0, 1, 2), PKD (seed 0, 2)" in board.facts["computed"]
    rows = {row.entry: row for row in board.rows}
    assert (rows["PKD"].step_ms, rows[BASELINE].step_ms) == (None, 200.0)


def test_failed_cells_are_on_the_board(tmp_path):
    root = make_run(tmp_path, {**APS, "PKD": [22.0, 24.2]})
    for cell in ("teacher", "cells/PKD/seed1", "cells/PKD/seed2", "cells/PKD/seed3", "cells/LD/seed0"):
        (root / cell).parent.mkdir(exist_ok=True)
        (root / f"{cell}.error").write_text("out of luck\ndetails\n")
    told = [warning for warning in build_board(root).warnings if "failed" in warning]
    assert told == ["PKD, seed 2 failed: out of luck"]  # the others have a result, or are not in the suite


def test_csv_and_json_hold_the_numbers(tmp_path):
    root = make_run(tmp_path)
    view = View.of(root)
    write_report([view], root)
    rows = {row["entry"]: row for row in csv.DictReader(io.StringIO(to_csv([view])))}
    assert float(rows["PKD"]["ap_mean"]) == pytest.approx(23.0)
    assert float(rows["PKD"]["versus_equal_time_mean"]) == pytest.approx(-0.5)
    assert rows["PKD"]["ap_small_mean"] == ""
    assert rows["CrossKD+PKD"]["methods"] == "CrossKD + PKD(weight=3.0)"
    stored = json.loads((root / "leaderboard.json").read_text("utf-8"))
    assert stored["teacher"]["metrics"]["ap"]["mean"] == 31.0
    assert len(stored["claims"]) == 4


class Page(HTMLParser):
    """Texts of a page by tag; complains where tags do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], {}

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert found.get("href", "#").startswith("#")
        assert found.get("src", "data:").startswith("data:")  # nothing is loaded from elsewhere
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_html_is_well_formed_and_complete(tmp_path):
    root = make_run(tmp_path)
    write_report([View.of(root)], root)
    page = Page()
    page.feed((root / "leaderboard.html").read_text("utf-8"))
    assert page.open == []
    assert "a <few> | steps on a few images" in page.texts["p"]
    assert {"teacher", "PKD", "CrossKD+PKD", BASELINE, EQUAL_TIME} <= set(page.texts["th"])
    assert "23.0 ± 1.1" in page.texts["td"]
    assert len([text for text in page.texts["li"] if "the baseline at equal" in text]) == 4


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_rows_claims_and_warnings(tmp_path, width):
    console = Console(width=width, file=io.StringIO())
    print_board(build_board(make_run(tmp_path)), console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for part in ("23.0 ± 1.1", "+2.0 [+1.5, +2.5]", "is above", "WARNING"):
        assert part in text
    assert ("12,345" in text) == (width == 200)


def test_a_narrow_terminal_cuts_no_entry(tmp_path):
    name = "CrossKD+PKD+FGD+LD+FitNet+CWD"
    board = build_board(make_run(tmp_path))
    board = replace(board, rows=tuple(replace(row, entry=name) for row in board.rows))
    console = Console(width=80, file=io.StringIO())
    print_board(board, console)
    rows = console.file.getvalue().splitlines()
    start = next(i for i, row in enumerate(rows) if row.strip().startswith("CrossKD"))
    assert "".join(row.split()[0] for row in rows[start : start + 2]) == name
    assert not any("…" in row for row in rows)


def test_what_users_wrote_is_no_markup(tmp_path):
    root = make_run(tmp_path)
    suite = Store(root).suite_path
    suite.write_text(suite.read_text().replace("a <few> | steps", "a [red]few[/] [/x]:dog:steps"))
    path = Store(root).result_path("CrossKD+PKD", 2)
    store_result(path, made_up("CrossKD+PKD", 2, 25.5, warnings=["class [/cat] :cat: is never found"]))
    console = Console(width=200, file=io.StringIO())
    print_board(build_board(root), console)
    assert "a [red]few[/] [/x]:dog:steps" in console.file.getvalue()
    assert "class [/cat] :cat: is never found" in console.file.getvalue()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(KDError, match="is not a folder of `kd benchmark run`"):
        build_board(tmp_path)


def test_a_broken_result_is_named_and_left_out(tmp_path):
    root = make_run(tmp_path)
    broken = root / "cells" / "PKD" / "seed0.json"
    broken.write_text('{"entry": "PKD"')
    board = build_board(root)
    assert f"PKD, seed 0 is left out, since {broken} is damaged: `kd benchmark run` trains the cell again" in (
        board.warnings
    )
    assert next(row for row in board.rows if row.entry == "PKD").seeds == (1, 2)
