from kdtoolkit.benchmark.cells import Cells
from kdtoolkit.benchmark.limits import limits_of
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TWICE, change
from tests.benchmark._suite import made_up, tiny


def said(suite=None, rows=None):
    rows = {BASELINE: [20.0, 21.0], "PKD": [22.0, 23.5]} if rows is None else rows
    cells = {row: [made_up(row, seed, ap) for seed, ap in enumerate(aps)] for row, aps in rows.items()}
    return " ".join(limits_of(suite or tiny(), Cells(cells, None, ())))


def test_seeds_are_told_with_what_they_can_show():
    assert "a typical interval reaches 3.2 AP to each side" in said()  # 12.7 * 0.354 / sqrt(2)
    assert "Each row has one seed." in said(rows={BASELINE: [20.0], "PKD": [22.0]})
    assert "different numbers of seeds (1 to 2)" in said(rows={BASELINE: [20.0, 21.0], "PKD": [22.0]})
    many = {BASELINE: [20.0 + seed for seed in range(10)], "PKD": [21.0 + seed for seed in range(10)]}
    assert "typical interval" not in said(rows=many)


def test_images_are_told_by_number_size_and_kind(tmp_path):
    assert "at most 4 images" in said()
    assert "No image is larger than 64 px" in said()
    assert "drawn shapes" in said()
    photos = change(tiny(), data={"root": tmp_path, "image_size": 800, "val_images": None})
    text = said(photos)
    assert not any(words in text for words in ("at most", "larger than", "drawn shapes"))
    assert "different images would change all APs" in text
    one_seed = said(change(tiny(), seeds=1))
    assert "over images, of one training: a second training would change all APs" in one_seed
    assert "different images would change" not in one_seed


def test_what_the_teacher_has_seen_is_told(tmp_path):
    assert "The teacher was trained on 8 images, the students on 4 of them" in said()
    assert "on the same images as the students" in said(change(tiny(), data={"student_images": 8}))
    fewer = said(change(tiny(), data={"teacher_images": 4, "student_images": 8}))
    assert "The students were trained on 8 images, the teacher on 4 of them" in fewer
    assert "on the same images as the students" not in fewer
    used = change(tiny(), teacher={"model": "kdtoolkit/gfl", "weights": str(tmp_path / "w.pth")})
    assert "used with the weights that it came with" in said(used)
    some = change(tiny(), data={"root": tmp_path, "teacher_images": None})
    assert "The teacher was trained on all images, the students on 4 of them" in said(some)
    whole = change(tiny(), data={"root": tmp_path, "student_images": None})
    assert "The students were trained on all images, the teacher on 8 of them" in said(whole)
    both = change(tiny(), data={"root": tmp_path, "teacher_images": None, "student_images": None})
    assert "The teacher was trained on the same images as the students" in said(both)


def test_the_distance_from_the_plateau_is_told():
    assert "was not measured (`plateau: true` in the suite)" in said()
    rising = {BASELINE: [20.0, 21.0], TWICE: [22.0, 24.0], "PKD": [22.0, 23.0]}
    assert "still rising: twice the steps add +2.5 AP" in said(rows=rising)
    longer = made_up(EQUAL_TIME, 0, 22.0, steps=2 * made_up(BASELINE, 0, 20.0).steps)
    cells = Cells({BASELINE: [made_up(BASELINE, 0, 20.0)], EQUAL_TIME: [longer]}, None, ())
    assert "still rising: 2.0 times the steps (equal time) add +2.0 AP" in " ".join(limits_of(tiny(), cells))
    flat = {BASELINE: [20.0, 21.0], TWICE: [20.1, 21.1], "PKD": [22.0, 23.0]}
    assert not any(words in said(rows=flat) for words in ("rising", "plateau"))


def test_circumstances_of_times_are_told():
    assert "No baseline was trained for as long" in said()
    assert "No baseline was trained for as long" not in said(rows={BASELINE: [20.0], EQUAL_TIME: [20.5]})
    elsewhere = made_up("PKD", 0, 22.0, machine="a different machine", versions={"kdtoolkit": "9"})
    cells = Cells({BASELINE: [made_up(BASELINE, 0, 20.0)], "PKD": [elsewhere]}, None, ())
    text = " ".join(limits_of(tiny(), cells))
    assert "ran on different hardware" in text
    assert "different versions of kdtoolkit" in text
