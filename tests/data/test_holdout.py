"""What is held out of a data set that comes in one part."""

import pytest

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.data.holdout import held_out, left
from kdtoolkit.data.opening import locate, splits_of
from tests.data import _layouts

NAMES = [f"{i}.jpg" for i in range(100)]


def test_a_fifth_is_held_out_whatever_the_order():
    chosen = set(held_out(NAMES))
    assert len(chosen) == 20
    assert chosen == set(held_out(NAMES[::-1]))
    assert set(left(NAMES)) == set(NAMES) - chosen
    assert len(chosen - set(held_out([*NAMES, "new.jpg"]))) <= 1
    assert len(held_out(["a", "b"])) == 1


def test_copies_of_an_image_stay_together():
    names = [f"{i}_jpg.rf.{copy}.jpg" for i in range(10) for copy in "abc"]
    chosen = held_out(names)
    assert len(chosen) == 6
    assert not {name.split(".rf.")[0] for name in chosen} & {name.split(".rf.")[0] for name in left(names)}
    assert 0 < len(held_out(["a.rf.1", *(f"b.rf.{i}" for i in range(9))])) < 10


def test_one_image_cannot_be_held_out(tmp_path):
    _layouts.write(tmp_path / "result.json", _layouts.coco([1]))
    _layouts.picture(tmp_path / "1.png", 1)
    with pytest.raises(
        KDError, match=r"one part of 1 images, of which none can be held out for val; add images, or name"
    ):
        open_dataset(tmp_path, "train")
    assert len(open_dataset(tmp_path, "all")) == 1


def test_a_part_of_no_split_beside_splits_is_not_guessed_at(tmp_path):
    _layouts.cvat_coco_subsets(tmp_path)
    _layouts.write(tmp_path / "annotations/instances_default.json", _layouts.coco([1]))
    with pytest.raises(KDError, match="has the split train, and images of no split beside it; give those a split in"):
        splits_of(tmp_path)


def test_annotations_of_other_images_are_no_faults(tmp_path):
    """Those of no image at all are."""
    _layouts.cvat_coco(tmp_path)
    form, place = locate(tmp_path)
    assert [form.read(place, split, lambda *_: None).faults for split in ("train", "val")] == [[], []]
    document = _layouts.coco(_layouts.EVERY)
    document["annotations"][0]["image_id"] = 99
    document["images"].append([])
    _layouts.write(tmp_path / "annotations/instances_default.json", document)
    with pytest.raises(KDError, match=r"no image has the id 99"):
        open_dataset(tmp_path, "val")
