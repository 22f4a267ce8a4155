"""A suite whose teacher shows features alone."""

import pytest

from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.plan import check_methods
from kdtoolkit.benchmark.report import View, to_markdown
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.errors import KDError
from tests._foundation import DINOV3, write_weights
from tests.benchmark._suite import TINY
from tests.benchmark.test_runner import run

TEACHER = TINY[TINY.index("teacher:\n") : TINY.index("student:\n")]
ENTRIES = TINY[TINY.index("entries:") :]


def suite_in(folder, teacher, entries="  Cosine: [Cosine]\n", more="teacher_scale: 0.5\n"):
    arguments = TEACHER[TEACHER.index("    backbone:") : TEACHER.index("  train:")]
    text = TINY.replace("seeds: 2", "seeds: 1").replace(TEACHER, f"teacher:\n{teacher}")
    text = text.replace("args: *detector\n", f"args:\n{arguments}").replace(ENTRIES, f"{more}entries:\n{entries}")
    (folder / "suite.yaml").write_text(text)
    return load_suite(str(folder / "suite.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("foundation")
    write_weights(root / "vit.safetensors")
    return root


NAMED = f"  model: '{DINOV3}'\n  weights: vit.safetensors\n"


def test_the_board_says_that_the_teacher_has_no_ap(folder):
    suite = suite_in(folder, NAMED)
    run(suite, folder / "runs" / "tiny")
    board = build_board(folder / "runs" / "tiny")
    assert board.teacher.metrics["ap"] is None
    (warning,) = (warning for warning in board.warnings if "teacher" in warning)
    assert (
        warning
        == "teacher: the AP is unknown: timm/vit_small_patch16_dinov3.lvd1689m shows features alone and detects nothing"
    )
    (row,) = (row for row in board.rows if row.entry == "Cosine")
    assert row.gap_recovered is None
    assert row.metrics["ap"] is not None
    assert "| teacher | - |" in to_markdown([View.of(folder / "runs" / "tiny")])


@pytest.mark.parametrize(
    ("teacher", "entries", "more", "message"),
    [
        (NAMED + "  train: {steps: 3, batch_size: 2}\n", "  A: [Cosine]\n", "", "can only teach"),
        (NAMED, "  A: [CrossKD]\n", "", "A: CrossKD .*which the teacher"),
        (NAMED, "  A: [Cosine]\n", "class_map: {disc: ball}\n", "has no classes: delete class_map"),
        (f"  model: '{DINOV3}'\n", "  A: [Cosine]\n", "", "has random weights: give it `weights`"),
    ],
)
def test_wrong_suites_are_one_sentence(folder, teacher, entries, more, message):
    suite = suite_in(folder, teacher, entries, more)
    with pytest.raises(KDError, match=message):
        check_methods(suite, load_data(suite.data), suite.entries)
