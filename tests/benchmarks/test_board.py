"""The profile of a board, on a suite of a few steps."""

import sys

import pytest

from benchmarks.speed import board
from tests.benchmark._suite import TINY


@pytest.mark.slow
def test_each_part_of_a_board_has_its_share(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(board, "import_seconds", lambda module: 1.5)
    monkeypatch.setattr(sys, "argv", ["board.py", str(tmp_path / "tiny.yaml"), "--steps", "3"])
    board.main()
    first, *_ = out = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny: ")
    rows = {cells[1].strip(): float(cells[2]) for line in out[3:] if len(cells := line.split("|")) == 5}
    assert {"students", "teacher", "KD", "training of the teacher", "evaluating", "report"} <= rows.keys()
    assert rows["import"] == 3.0
    assert rows["students"] > 0
    shares = [float(line.split("|")[3].strip(" %")) for line in out[3:]]
    assert sum(shares) == pytest.approx(100, abs=1)
