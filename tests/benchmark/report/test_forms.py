"""The forms of one and of several boards, and the page without a browser."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from kdtoolkit.benchmark.across import across
from kdtoolkit.benchmark.details import Details
from kdtoolkit.benchmark.report import (
    View,
    print_across,
    print_board,
    sections,
    to_csv,
    to_html,
    to_json,
    to_latex,
    to_markdown,
    write_report,
)
from kdtoolkit.benchmark.report.looks import looks_of
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER
from tests.benchmark.report._views import GAINS, made_up_view


@pytest.fixture(scope="module")
def views():
    return [made_up_view("cells"), made_up_view("cards", chance=2, level=41, seeds=5)]


def test_a_report_of_one_board_and_of_several(views, tmp_path):
    assert write_report(views[:1], tmp_path / "one") == tmp_path / "one" / "leaderboard.html"
    page = write_report(views, tmp_path / "two", across([view.board for view in views]))
    assert page == tmp_path / "two" / "report.html"
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        f"report.{ending}" for ending in ("html", "md", "csv", "json", "tex")
    }
    assert page.stat().st_size < 2_000_000


def test_json_holds_everything_and_has_a_format(views):
    one = json.loads(to_json(views[:1]))
    assert one["format"] == 2
    assert {row["entry"] for row in one["rows"]} == {BASELINE, EQUAL_TIME, *GAINS}
    curve = one["details"]["curves"]["PKD"]["task/box"]
    assert len(curve["steps"]) == len(curve["mean"]) == 100
    ranking = across([view.board for view in views])
    text = to_json(views, ranking)
    both = json.loads(text)
    assert [board["title"] for board in both["boards"]] == ["cells", "cards"]
    assert [row["entry"] for row in both["across"]["rows"]] == [row.entry for row in ranking.rows]
    assert len(max(text.splitlines(), key=len)) > 500  # lists of numbers take one line


def test_json_stays_json_whatever_the_numbers_are(views):
    costs = {"PKD": views[0].details.costs["PKD"].model_copy(update={"step_ms": math.nan, "latency_ms": math.inf})}
    view = View(views[0].board, views[0].details.model_copy(update={"costs": costs}))

    def refuse(word):
        raise ValueError(word)

    found = json.loads(to_json([view]), parse_constant=refuse)
    assert (found["details"]["costs"]["PKD"]["step_ms"], found["details"]["costs"]["PKD"]["latency_ms"]) == (None, None)


def test_csv_has_a_row_for_each_row_of_each_board(views):
    rows = list(csv.DictReader(io.StringIO(to_csv(views))))
    assert len(rows) == 2 * (len(GAINS) + 3)
    pkd = next(row for row in rows if (row["board"], row["entry"]) == ("cards", "PKD"))
    board = views[1].board
    found = next(row for row in board.rows if row.entry == "PKD")
    assert float(pkd["versus_baseline_low"]) == pytest.approx(found.versus_baseline.low, rel=1e-5)
    assert (pkd["rank_low"], pkd["seeds"], pkd["latency_ms"]) == (str(found.rank.low), "5", "11.5")


def test_latex_is_escaped_and_bold_where_a_row_may_be_the_best(views):
    board = replace(views[0].board, title="50% of {a_b} & #1")
    text = to_latex([View(board, views[0].details), views[1]])
    assert r"\caption{50\% of \{a\_b\} \& \#1: " in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2
    first = next(row for row in board.rows if row.rank and row.rank.low == 1)
    assert rf"\textbf{{{first.entry}}} & \textbf{{" in text
    tables = re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.S)
    lines = [line for table in tables for line in table.splitlines() if line.startswith(("Cross", "PKD", "base"))]
    assert {line.count(" & ") for line in lines} == {6}


def test_markdown_of_several_boards_begins_with_the_ranking(views):
    text = to_markdown(views, across([view.board for view in views]))
    assert text.index("# Over all data sets") < text.index("# cells") < text.index("# cards")
    assert "## What this board does not show" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("| CrossKD |")} == {5, 17}


def test_a_terminal_of_80_characters_has_the_most_important_columns(views):
    console = Console(width=80, file=io.StringIO())
    print_board(views[0].board, console)
    print_across(across([view.board for view in views]), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    head = next(line for line in lines if "entry" in line)
    assert head.split() == ["entry", "rank", "AP", "vs", "baseline", "gap"]
    assert any(line.split()[:2] == ["entry", "mean"] for line in lines)


def test_one_seed_without_detections_has_no_verdict():
    view = made_up_view(seeds=1, pictures=False)
    lines = [line for _, own in sections.differences(view.board, looks_of([view.board])) for line in own.lines]
    assert {line.cells[-1] for line in lines if line.name in GAINS} == {"one seed"}


def test_a_board_with_nothing_behind_it_has_a_page():
    view = made_up_view(pictures=False)
    empty = Details(curves={}, breakdown={}, costs={}, commands={}, settings={}, limits=())
    board = replace(view.board, teacher=None, rows=view.board.rows[:1], claims=(), warnings=(), pairs={}, summary="")
    page = to_html([View(replace(board, rows=()), empty), View(board, empty)])
    assert "Where gains come from" not in page
    assert "There are no differences yet" in page


def test_rows_look_the_same_on_all_boards_and_different_from_each_other(views):
    looks = looks_of([view.board for view in views])
    assert len({(look.colour, look.mark, look.dash) for look in looks.values()}) == len(looks)
    assert looks["PKD"] == looks_of([view.board for view in reversed(views)])["PKD"]
    assert looks[TEACHER].colour == "teacher"
    many = made_up_view(gains={f"method {number}": 1.0 for number in range(25)}, pictures=False)
    named = [look for name, look in looks_of([many.board]).items() if name.startswith("method")]
    assert len({(look.colour, look.mark, look.dash) for look in named}) == 25


def test_the_page_says_what_won_and_what_cannot_be_told_apart(views):
    page = to_html(views[:1])
    assert views[0].board.summary in page
    assert "≈ cannot be told apart" in page
    assert "▲ helps" in page
    assert "▼ hurts" in page
    assert "<code>kd benchmark run suite.yaml --only &#39;CrossKD+PKD&#39; --seeds 3</code>" in page
