import json

import pytest

from kdtoolkit.benchmark.cells import check_same, read_cells
from kdtoolkit.benchmark.store import FORMAT, Store
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER
from kdtoolkit.errors import KDError
from tests.benchmark._runs import FINGERPRINTS, of, store_run
from tests.benchmark._suite import made_up, tiny


def alike():
    return [of(TEACHER, 0, 30.0), *(of(row, seed, 20.0) for row in (BASELINE, "PKD") for seed in (0, 1))]


def test_cells_of_the_same_data_and_teacher_are_kept():
    assert check_same(alike()) == (alike(), [])
    assert check_same([]) == ([], [])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("val_data", "evaluated on different images"),
        ("train_data", "trained on different images"),
        ("teacher", "taught by a different teacher"),
    ],
)
def test_a_cell_that_differs_is_left_out_and_named(name, told):
    changed = of("PKD", 2, 20.0)
    changed = changed.model_copy(update={"fingerprints": {**changed.fingerprints, name: "changed"}})
    kept, reasons = check_same([*alike(), changed])
    assert kept == alike()
    assert len(reasons) == 1
    assert reasons[0].startswith(f"PKD, seed 2 is left out: it was {told} (changed; most cells: ")


def test_of_two_equal_groups_the_one_with_the_latest_cell_is_kept():
    old = of("PKD", 0, 20.0, fingerprints={**FINGERPRINTS, "val_data": "old"}, date="2020-01-01T00:00:00+00:00")
    new = of("PKD", 1, 20.0, date="2021-01-01T00:00:00+00:00")
    assert check_same([new, old])[0] == check_same([old, new])[0] == [new]


def test_a_teacher_that_taught_none_of_the_students_is_left_out():
    other = of(TEACHER, 0, 30.0, teacher="of a different training")
    kept, reasons = check_same([other, *alike()[1:]])
    assert kept == alike()[1:]
    assert reasons == [
        "the teacher is left out: it was not the one that taught the students (of a different training; the students': "
        "weights)"
    ]


def test_the_images_of_the_teacher_may_differ_from_the_students():
    teacher = of(TEACHER, 0, 30.0, fingerprints={**FINGERPRINTS, "train_data": "more images", "teacher": "weights"})
    assert check_same([teacher, *alike()[1:]])[1] == []


def test_a_result_of_format_1_knows_its_teacher_by_its_key():
    def first_format(key):
        parts = {"data": "trained measured", "teacher": f"{key}, images scaled by 0.5"}
        return made_up("PKD", 1, 20.0, key_parts=parts)

    old = first_format("key")
    assert old.fingerprints == FINGERPRINTS
    assert old.teacher_key == "key"
    assert check_same([*alike(), old])[1] == []
    assert "taught by a different teacher (another; " in check_same([*alike(), first_format("another")])[1][0]


def test_results_without_any_fingerprint_are_kept():
    assert check_same([made_up("PKD", 0, 20.0, key_parts={})])[1] == []


def test_a_damaged_result_is_left_out_and_a_newer_one_is_an_error(tmp_path):
    root = store_run(tmp_path / "tiny", *alike())
    store = Store(root)
    broken = store.result_path("PKD", 1)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    cells = read_cells(store, tiny())
    assert [result.seed for result in cells.rows["PKD"]] == [0]
    assert cells.rows[EQUAL_TIME] == []
    assert cells.teacher == alike()[0]
    assert cells.left_out == (
        f"PKD, seed 1 is left out, since {broken} is damaged: `kd benchmark run` trains the cell again",
    )
    broken.write_text(json.dumps({**json.loads(whole), "format": FORMAT + 1, "entry": {"of": "a new kind"}}))
    with pytest.raises(KDError, match=r"seed1\.json was made by a newer kdtoolkit, in format 3; .* pip install -U"):
        read_cells(store, tiny())
