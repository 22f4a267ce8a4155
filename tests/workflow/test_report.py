from pathlib import Path

import pytest

from kdtoolkit.workflow.report import Report


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({"model": "kdtoolkit/gfl"}, "NEW-FOLDER"),
        ({"model": "owndet:Own"}, "NEW-FOLDER --allow-code"),
        ({"teacher": "runs/train-birds", "student": "owndet:Own"}, "NEW-FOLDER --allow-code"),
    ],
)
def test_the_command_that_repeats_a_run_allows_the_code_of_an_own_detector(given, end):
    report = Report(command="train", title="", folder=Path(), plan={}, given=given, made_of={})
    assert report.repeat == f"kd train run.yaml --out {end}"
