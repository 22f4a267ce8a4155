import gzip
import json

import pytest

from kdtoolkit.benchmark.cells import check_same, read_cells
from kdtoolkit.benchmark.record import state
from kdtoolkit.benchmark.runs import open_run
from kdtoolkit.benchmark.store import FORMAT, Store
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE
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
    assert reasons[0].startswith(f"PKD, seed 2 is left out: it was {told} (changed instead of ")


def test_of_two_equal_groups_the_one_with_the_latest_cell_is_kept():
    old = of("PKD", 0, 20.0, fingerprints={**FINGERPRINTS, "val_data": "old"}, date="2020-01-01T00:00:00+00:00")
    new = of("PKD", 1, 20.0, date="2021-01-01T00:00:00+00:00")
    assert check_same([new, old])[0] == check_same([old, new])[0] == [new]


def test_a_teacher_that_taught_none_of_the_students_is_left_out():
    other = of(TEACHER, 0, 30.0, teacher="of a different training")
    kept, reasons = check_same([other, *alike()[1:]])
    assert kept == alike()[1:]
    assert reasons == [
        "the teacher is left out: it was not the one that taught the students (of a different training instead "
        "of weights)"
    ]


def test_the_images_of_the_teacher_may_differ_from_the_students():
    teacher = of(TEACHER, 0, 30.0, fingerprints={**FINGERPRINTS, "train_data": "more images", "teacher": "weights"})
    assert check_same([teacher, *alike()[1:]])[1] == []


def test_a_result_of_format_1_knows_its_teacher_by_its_key():
    def first_format(key):
        parts = {**of("PKD", 1, 20.0).key_parts, "data": "trained measured", "teacher": key}
        return made_up("PKD", 1, 20.0, key_parts=parts)

    old = first_format("key")
    assert old.fingerprints == FINGERPRINTS
    assert old.teacher_key == "key"
    assert check_same([*alike(), old])[1] == []
    assert (
        "taught by a different teacher (another instead of weights, "
        in check_same([*alike(), first_format("another")])[1][0]
    )


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


def test_a_result_at_the_place_of_a_different_cell_is_left_out_and_named(tmp_path):
    root = store_run(tmp_path / "tiny", *alike())
    store = Store(root)
    copy = store.result_path("PKD", 1)
    copy.write_bytes(store.result_path("PKD", 0).read_bytes())
    cells = read_cells(store, tiny())
    assert [result.seed for result in cells.rows["PKD"]] == [0]
    assert cells.left_out == (
        f"PKD, seed 1 is left out, since {copy} holds the result of a different cell (PKD, seed 0)",
    )
    assert state(open_run(root), "PKD", 1) == "left out"


def test_results_that_the_suite_does_not_ask_for_are_named(tmp_path):
    root = store_run(tmp_path / "tiny", *alike(), of("PKD", 7, 20.0), of("Other", 0, 20.0))
    (words,) = read_cells(Store(root), tiny()).left_out
    assert words.startswith(
        f"Other, seed 0; PKD, seed 7 are left out, since {root / 'suite.yaml'} asks for 2 seeds of "
    )


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"methods": "CrossKD"}, "trained with different settings than its row (methods CrossKD instead of PKD"),
        ({"steps": "99"}, "trained for a different number of steps (99 instead of unknown"),
        ({"max_detections": "300"}, "evaluated with a different max_detections (300 instead of as COCO has it"),
        ({"weights": "a digest"}, "trained with different settings (weights a digest instead of "),
        ({"teacher": "key, images scaled by 0.5"}, "taught in a different way (teacher images scaled by 0.5 instead"),
        ({"class_map": "{}"}, "taught in a different way"),
    ],
)
def test_a_cell_with_different_settings_is_left_out_and_named(parts, told):
    changed = of("PKD", 2, 20.0)
    changed = changed.model_copy(update={"key_parts": {**changed.key_parts, **parts}})
    kept, (reason,) = check_same([*alike(), changed])
    assert kept == alike()
    assert reason.startswith(f"PKD, seed 2 is left out: it was {told}")


def test_precision_may_differ_where_the_hardware_chooses_it():
    changed = of("PKD", 2, 20.0)
    changed = changed.model_copy(update={"key_parts": {**changed.key_parts, "precision": "bfloat16"}})
    assert check_same([*alike(), changed], any_precision=True)[1] == []
    assert len(check_same([*alike(), changed])[1]) == 1


def test_baselines_with_longer_schedules_have_their_own_steps():
    longer = [of(row, 0, 20.0) for row in (EQUAL_TIME, TWICE)]
    longer = [cell.model_copy(update={"key_parts": {**cell.key_parts, "steps": "99"}}) for cell in longer]
    assert check_same([*alike(), *longer])[1] == []


@pytest.mark.parametrize("name", ["val_data", "train_data", "unlabelled"])
def test_a_cell_that_does_not_say_its_images_is_not_mixed_with_those_that_do(name):
    cells = [cell.model_copy(update={"fingerprints": {**cell.fingerprints, name: "known"}}) for cell in alike()]
    silent = of("PKD", 2, 20.0)
    silent = silent.model_copy(
        update={"fingerprints": {key: found for key, found in silent.fingerprints.items() if key != name}}
    )
    kept, (reason,) = check_same([*cells, silent])
    assert kept == cells
    assert "unknown instead of known" in reason


def test_the_stored_teacher_and_ground_truth_decide_which_of_the_cells_are_right(tmp_path):
    teacher, right = of(TEACHER, 0, 30.0), of("PKD", 0, 20.0)
    foreign = of("PKD", 1, 20.0, teacher="of a different training", date="2021-01-01T00:00:00+00:00")
    kept, (reason,) = check_same([teacher, right, foreign])
    assert kept == [teacher, right]
    assert "most cells" not in reason

    fields = {"fingerprints": {**FINGERPRINTS, "val_data": "different"}, "date": "2021-01-01T00:00:00+00:00"}
    root = store_run(tmp_path / "tiny", of(BASELINE, 0, 20.0), of(BASELINE, 1, 20.0, **fields))
    assert [cell.seed for cell in read_cells(Store(root), tiny()).rows[BASELINE]] == [1]  # the latest
    document = json.dumps({"fingerprint": "measured", "truth": {}})
    Store(root).ground_truth_path.write_bytes(gzip.compress(document.encode()))
    assert [cell.seed for cell in read_cells(Store(root), tiny()).rows[BASELINE]] == [0]
