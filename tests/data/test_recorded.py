import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import kdtoolkit.data.recorded as recorded_module
from kdtoolkit import KDError
from kdtoolkit.data import Augmentation, InputSize, ProceduralShapes, batches, open_dataset, open_images
from kdtoolkit.data.dataset import own_ids
from kdtoolkit.data.detections import read_detections
from kdtoolkit.data.recorded import attach, check_images, found_on_files, why_not_seen
from tests.data._coco import write as write_coco
from tests.data._results import entry, write


@pytest.fixture
def data(tmp_path):
    """Images 7 and 9 of 40x30, with the classes ball (3) and cube (8)."""
    return open_dataset(write_coco(tmp_path / "data"), "train")


def read(tmp_path, content, data, name="d.json"):
    return read_detections(write(tmp_path / name, content), own_ids(data))


def recorded(dataset, index):
    return dataset[index][1]["recorded"]


def test_detections_lie_beside_the_labels_in_pixels_of_the_image_that_is_given_out(tmp_path, data):
    file = read(tmp_path, [entry(9, 8, (0, 0, 20, 30), 0.5), entry(7, 3, (10, 6, 10, 12), 0.75)], data)
    found = attach(data, file)
    image, sample = found[0]
    assert torch.equal(image, data[0][0])
    assert torch.equal(sample["boxes"], data[0][1]["boxes"])
    assert sample["recorded"]["boxes"].tolist() == [[10, 6, 20, 18]]
    assert sample["recorded"]["probabilities"].tolist() == [[0.75, 0.0]]
    half = attach(data.resized(20), file)
    assert half[0][0].shape == (3, 15, 20)
    assert recorded(half, 0)["boxes"].tolist() == [[5, 3, 10, 9]]
    assert recorded(half, 1)["boxes"].tolist() == [[0, 0, 10, 15]]


def test_equal_boxes_are_one_detection_with_the_scores_of_several_classes(tmp_path, data):
    box = (10, 6, 10, 12)
    entries = [entry(7, 3, box, 0.75), entry(7, 8, (0, 0, 4, 4), 0.125), entry(7, 8, box, 0.5), entry(9)]
    found = recorded(attach(data, read(tmp_path, entries, data)), 0)
    assert found["boxes"].tolist() == [[10, 6, 20, 18], [0, 0, 4, 4]]
    assert found["probabilities"].tolist() == [[0.75, 0.5], [0.0, 0.125]]


def test_boxes_are_cut_at_the_edge_and_empty_ones_are_left_out(tmp_path, data):
    inside = [entry(9, box=(1, 1, 5, 5))] * 20
    entries = [entry(7, box=(-2, 10, 30, 21)), entry(7, box=(5, 5, 0, 3)), entry(7, box=(41, 2, 5, 5)), *inside]
    assert recorded(attach(data, read(tmp_path, entries, data)), 0)["boxes"].tolist() == [[0, 10, 28, 30]]


def test_an_image_without_detections_has_none(tmp_path, data):
    found = recorded(attach(data, read(tmp_path, [entry(9, 8)], data)), 0)
    assert (found["boxes"].shape, found["probabilities"].shape) == ((0, 4), (0, 2))


def test_the_rest_of_the_data_set_stays_and_the_fingerprint_is_of_both(tmp_path, data):
    one, other = (read(tmp_path, [entry(score=score), entry(9)], data) for score in (0.5, 0.6))
    found = attach(data, one)
    assert (len(found), found.class_names, str(found)) == (2, ("ball", "cube"), str(data))
    assert found.coco() == data.coco()
    assert len({data.fingerprint(), found.fingerprint(), attach(data, other).fingerprint()}) == 3
    assert recorded(found.in_memory(), 0)["boxes"].tolist() == recorded(found, 0)["boxes"].tolist()
    assert attach(found, one) is found


# Changes of images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"flip": 1.0},
        {"flip": 0.5, "zoom": (0.5, 2.0)},
        {"mosaic": 1.0, "flip": 0.5, "zoom": (0.7, 1.4)},
        {"mixup": 1.0, "flip": 0.5},
        {"mosaic": 0.5, "mixup": 0.5, "colour": 0.3, "photometric": 0.5},
    ],
    ids=lambda changes: "+".join(changes),
)
@pytest.mark.parametrize(
    "input_size", [None, InputSize(short=(64, 96), long=160, crop=0.7, crop_short=(64,), crop_sides=(40, 64))]
)
def test_detections_that_are_the_labels_stay_the_labels(tmp_path, data, changes, input_size):
    """A teacher that finds exactly the objects finds exactly the objects of the changed image."""
    objects = [each for each in data.coco()["annotations"] if not each["iscrowd"]]
    entries = [entry(each["image_id"], each["category_id"], each["bbox"], 0.5) for each in objects]
    file = read(tmp_path, entries, data)
    options = {"batch_size": 2, "steps": 12, "seed": 3, "augment": Augmentation(**changes), "input_size": input_size}
    seen = 0
    for plain, laden in zip(batches(data, **options), batches(attach(data, file), **options), strict=True):
        for image, target, other, carried in zip(*plain[:2], *laden[:2], strict=True):
            assert torch.equal(image, other)
            assert torch.equal(target["boxes"], carried["boxes"])
            assert torch.equal(target["labels"], carried["labels"])
            found = carried["recorded"]
            ours = zip(found["boxes"].tolist(), found["probabilities"].tolist(), strict=True)
            theirs = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
            expected = [(box, [0.5 * (label == own) for own in range(2)]) for box, label in theirs]
            assert sorted(ours) == sorted(expected)
            seen += len(expected)
    assert seen > 10


# Which image is meant ------------------------------------------------------------------------------------------------


def test_yolo_data_is_named_by_files_or_by_numbers_that_are_file_names(tmp_path):
    root = tmp_path / "yolo"
    for name in ("0007", "12"):
        (root / "images" / "train").mkdir(parents=True, exist_ok=True)
        (root / "labels" / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / f"images/train/{name}.png")
        (root / f"labels/train/{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [ball]\n")
    data = open_dataset(root, "train")
    assert own_ids(data) is None
    for one, two in ((7, 12), ("0007", "12.png"), ("train/0007.png", "images/train/12.png"), ("./0007.png", 12)):
        entries = [entry(one, 0, (1, 2, 3, 4), category="ball"), entry(two, 0, category="ball")]
        found = attach(data, read(tmp_path, entries, data))
        assert recorded(found, 0)["boxes"].tolist() == [[1, 2, 4, 6]]
    assert "has no detection on 2 of the 2" in why_not_seen(
        read(tmp_path, [entry("val/12.png", category="ball")], data), data
    )


def test_images_without_labels_are_named_by_their_files_alone(tmp_path, data):
    images = open_images(tmp_path / "data" / "images")
    assert why_not_seen(read(tmp_path, [entry("7.png")], data), images) is None
    assert "has no detection on 2 of the 2" in why_not_seen(read(tmp_path, [entry(7)], data), images)


def test_names_that_fit_several_images_are_refused(tmp_path, data):
    for folder in ("a", "b"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "photos" / folder / "1.png")
    images = open_images(tmp_path / "photos")
    with pytest.raises(KDError, match=r"on the image '1.png', which may be .*a/1.png or .*b/1.png: give its entries a"):
        attach(images, read(tmp_path, [entry("1.png")], data))
    file = read(tmp_path, [entry("b/1.png")], data)
    assert len(recorded(attach(images, file), 1)["boxes"]) == 1


@pytest.mark.parametrize(("ours", "theirs"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_may_be_composed_in_different_ways(tmp_path, ours, theirs):
    name = "höhe/é.png"
    file = read_detections(write(tmp_path / "d.json", [entry(unicodedata.normalize(theirs, name), category="ball")]))
    _, places = found_on_files(file, {tmp_path / unicodedata.normalize(ours, name): (40, 30)}, "photos")
    assert places.tolist() == [0]


def test_frames_of_many_videos_are_found_at_once(tmp_path, monkeypatch):
    names = [f"video{video}/img/{frame:04}.png" for video in range(60) for frame in range(20)]
    file = read_detections(write(tmp_path / "d.json", [entry(name, category="ball") for name in names]))
    calls = []
    monkeypatch.setattr(recorded_module, "_stem", lambda name: calls.append(name) or name.removesuffix(".png"))
    sizes = {tmp_path / name: (40, 30) for name in reversed(names)}
    _, places = found_on_files(file, sizes, "videos")
    assert places.tolist() == list(reversed(range(len(names))))
    assert len(calls) < 5 * len(names)


def test_each_image_of_a_file_must_be_in_the_data_once(tmp_path, data):
    opened = []

    def others():
        opened.append(True)
        return {"test": data.subset(1, 0)}

    assert check_images(read(tmp_path, [entry(), entry(9)], data), {"train": data}, others) == ()
    assert not opened
    with pytest.raises(
        KDError, match=r"d.json: detection 1 \(counted from 0\) is on the image 99, and the data has no"
    ):
        check_images(read(tmp_path, [entry(), entry(99)], data), {"train": data}, dict)
    both = {"train": data, "val": open_dataset(write_coco(tmp_path / "more"), "train")}
    with pytest.raises(KDError, match=r"detection 0 .* is on the image 7, and there is one in train and in val: give"):
        check_images(read(tmp_path, [entry(), entry(9)], data), both, others)


def test_the_same_image_may_be_in_several_parts(tmp_path, data):
    file = read(tmp_path, [entry(), entry("9.png")], data)
    files = [tmp_path / "data" / "images" / "9.png"]
    assert check_images(file, {"train": data, "photos": files}, dict) == ()


def test_a_file_may_be_of_more_images_than_the_data(tmp_path, data):
    file = read(tmp_path, [entry(), entry("a.png"), entry("b.png")], data)
    (note,) = check_images(file, {"train": data}, dict)
    assert "does not have 2 of the 3 images of" in note
    assert "d.json, such as 'a.png'" in note


def test_a_file_of_different_images_is_refused(tmp_path, data):
    with pytest.raises(KDError, match=r"has no detection on 2 of the 2 images of .*train.json, such as .*7.png. Run"):
        attach(data, read(tmp_path, [entry(1)], data))
    listed = {"images": [{"id": 1, "file_name": "7.png"}], "annotations": [entry(1)]}
    with pytest.raises(KDError, match=r"does not list 1 of the 2 images of .*, such as .*9.png, under `images`: run"):
        attach(data, read(tmp_path, listed, data))
    listed["images"].append({"id": 2, "file_name": "9.png"})
    assert len(attach(data, read(tmp_path, listed, data))) == 2


def test_few_images_without_detections_are_usual(tmp_path, data):
    attach(data, read(tmp_path, [entry(7)], data))


def test_boxes_in_different_pixels_are_refused(tmp_path, data):
    entries = [entry(), entry(9, box=(20, 10, 40, 25))]
    with pytest.raises(
        KDError, match=r"1 of 2 boxes reach far beyond .*detection 1 .*\[20.0, 10.0, 40.0, 25.0\] on an"
    ):
        attach(data, read(tmp_path, entries, data))


def test_boxes_in_pixels_of_a_smaller_image_are_refused(tmp_path):
    data = ProceduralShapes(12, image_size=64, seed=0)
    objects = data.coco()["annotations"]
    assert len(objects) >= 20
    found = [entry(a["image_id"], a["category_id"], [0.25 * side for side in a["bbox"]]) for a in objects]
    with pytest.raises(
        KDError, match=rf"only \d of the {len(objects)} labelled objects of .* have a detection on them"
    ):
        attach(data, read(tmp_path, found, data))
    right = [entry(a["image_id"], a["category_id"], a["bbox"]) for a in objects[:4]]
    attach(data, read(tmp_path, found + right, data))
    unknown = [each | {"category_id": 0, "category": "ship"} for each in found]  # nobody expects them on the objects
    attach(data, read(tmp_path, unknown, data))


def test_image_files_alone_have_detections_too(tmp_path, data):
    paths = [tmp_path / "data" / "images" / name for name in ("7.png", "9.png")]
    file = read(tmp_path, [entry("9.png"), entry("other.png"), entry("images/7.png")], data)
    rows, places = found_on_files(file, dict.fromkeys(paths, (40, 30)), "photos")
    assert (rows.tolist(), places.tolist()) == ([0, 2], [1, 0])
    with pytest.raises(KDError, match="has no detection on 1 of the 1 images of photos"):
        found_on_files(file, {tmp_path / "none.png": (40, 30)}, "photos")
    with pytest.raises(KDError, match=r"2 of 2 boxes reach far beyond their images of photos\. .*on an image of 10x8"):
        found_on_files(file, dict.fromkeys(paths, (10, 8)), "photos")
    assert np.issubdtype(rows.dtype, np.integer)
