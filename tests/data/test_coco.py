import contextlib
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdtoolkit import KDError
from kdtoolkit.data import Augmentation, CocoDetection, check_same_classes, photos
from kdtoolkit.data.pictures import decode
from tests.data._coco import document, pixels, write

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")


def test_images_and_boxes_are_those_of_the_files(tmp_path):
    data = CocoDetection(write(tmp_path), "train")
    assert data.class_names == ("ball", "cube")  # in the order of ids
    assert len(data) == 2
    image, sample = data[0]
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(7))
    assert sample["boxes"].dtype == torch.float32
    assert sample["boxes"].tolist() == [[2.5, 4, 12.5, 24.25]]  # not the crowd
    assert sample["labels"].tolist() == [0]
    assert (sample["image_id"], sample["original_size"]) == (7, (30, 40))
    assert data[1][1]["labels"].tolist() == [1]


def test_what_is_marked_to_be_ignored_is_a_crowd(tmp_path):
    doc = document()
    for annotation, ignore in zip(doc["annotations"], (1, None, 0), strict=True):
        annotation["ignore"] = ignore
    data = CocoDetection(write(tmp_path, doc), "train")
    assert [a["iscrowd"] for a in data.coco()["annotations"]] == [1, 1, 0]
    assert data[0][1]["boxes"].tolist() == []


def test_a_fault_names_few_of_many_categories(tmp_path):
    doc = document()
    doc["categories"] += [{"id": number, "name": f"class {number}"} for number in range(10, 1000)]
    doc["annotations"][0]["category_id"] = "8"
    with pytest.raises(KDError, match=r"no category has the id '8', only 3, 8, 10, 11(, \d\d){8}, \.\.\.; correct it"):
        CocoDetection(write(tmp_path, doc), "train")


def test_ground_truth_keeps_ids_areas_and_crowds(tmp_path):
    truth = CocoDetection(write(tmp_path), "train", max_size=20).coco()
    assert truth["categories"] == [{"id": 3, "name": "ball"}, {"id": 8, "name": "cube"}]
    assert [i["id"] for i in truth["images"]] == [7, 9]
    assert [(a["id"], a["bbox"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [
        (1, [2.5, 4, 10, 20.25], 202.5, 0),
        (2, [20, 0, 20, 30], 123.0, 1),
        (3, [0, 0, 40, 30], 77.5, 0),
    ]


def test_larger_images_are_scaled_down_with_their_boxes_and_none_is_enlarged(tmp_path):
    image, sample = CocoDetection(write(tmp_path), "train", max_size=20)[0]
    assert image.shape == (3, 15, 20)
    assert sample["boxes"].tolist() == [[1.25, 2, 6.25, 12.125]]
    assert sample["original_size"] == (30, 40)
    assert CocoDetection(tmp_path, "train", max_size=400)[0][0].shape == (3, 30, 40)


def test_scaling_down_is_antialiased(tmp_path):
    write(tmp_path)
    stripes = np.zeros((30, 40, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "images" / "7.png")
    image = CocoDetection(tmp_path, "train", max_size=10)[0][0].float()
    assert (image[..., 1:-1] - 100).abs().max() < 15  # a nearest neighbour gives 0 or 200


def test_in_memory_it_gives_the_same_as_on_access(tmp_path):
    lazy = CocoDetection(write(tmp_path), "train", max_size=25)
    kept = lazy.in_memory()
    assert torch.equal(kept[0][0], lazy[0][0])
    assert torch.equal(kept[0][1]["boxes"], lazy[0][1]["boxes"])
    assert kept.fingerprint() == lazy.fingerprint()
    assert kept.coco() == lazy.coco()
    assert lazy.in_memory() is kept is kept.in_memory()  # decoded once
    (tmp_path / "images" / "7.png").unlink()
    assert kept[0][0].shape == kept.subset(1, seed=1)[0][0].shape == (3, 19, 25)
    with pytest.raises(KDError, match=r"train.json: image 7 \(7.png\): there is no file"):
        lazy[0]


def test_a_set_too_large_for_memory_is_decoded_on_access(tmp_path):
    data = CocoDetection(write(tmp_path), "train", memory_bytes=3 * 30 * 40 * 2 - 1)
    assert data.in_memory() is data
    part = data.subset(1, seed=0)  # which is small enough
    assert part.in_memory() is not part


def decoded_files(monkeypatch):
    """The names of files that are decoded from now on, as they come."""
    names = []

    def spy(path, size):
        names.append(path.name)
        return decode(path, size)

    monkeypatch.setattr(photos, "decode", spy)
    return names


def test_only_what_is_used_is_decoded(tmp_path, monkeypatch):
    names = decoded_files(monkeypatch)
    data = CocoDetection(write(tmp_path), "train")
    part = data.subset(1, seed=0)
    for each in (data, part):
        each.fingerprint(), each.coco(), len(each), str(each)
    assert names == []
    kept = part.in_memory()
    assert names == [image["file_name"] for image in part.coco()["images"]]
    for _ in range(2):
        kept[0]
    assert len(names) == 1


def test_a_subset_is_a_data_set_of_its_own(tmp_path):
    data = CocoDetection(write(tmp_path), "train")
    part = data.subset(1, seed=0)
    (chosen,) = part.coco()["images"]
    assert str(part) == f"1 images of {data}"
    assert part[0][1]["image_id"] == chosen["id"]
    assert {a["image_id"] for a in part.coco()["annotations"]} == {chosen["id"]}
    assert part.fingerprint() != data.fingerprint()
    assert data.subset(2, seed=0).fingerprint() == data.fingerprint()
    other = next(name for name in ("7.png", "9.png") if name != chosen["file_name"])
    Image.fromarray(pixels(1)).save(tmp_path / "images" / other)
    assert CocoDetection(tmp_path, "train").subset(1, seed=0).fingerprint() == part.fingerprint()


def test_a_subset_without_a_box_is_refused(tmp_path):
    doc = document()
    doc["annotations"] = [a for a in doc["annotations"] if a["image_id"] == 9]
    doc["annotations"].append({**document()["annotations"][1]})  # a crowd, which is no box to learn
    data = CocoDetection(write(tmp_path, doc), "train")
    found = [seed for seed in range(20) if torch.randperm(2, generator=torch.Generator().manual_seed(seed))[0] == 0]
    assert 0 < len(found) < 20
    for seed in range(20):
        if seed not in found:
            assert len(data.subset(1, seed)[0][1]["boxes"]) == 1
            continue
        with pytest.raises(KDError, match=rf"1 images of .*train.json, chosen by seed {seed}, have no box"):
            data.subset(1, seed)


def test_a_share_of_the_images_is_held_out(tmp_path):
    data = CocoDetection(write(tmp_path), "train")
    rest, part = data.split(0.5, seed=0)
    assert sorted([*rest.files(), *part.files()]) == sorted(data.files())
    assert (len(rest), len(part)) == (1, 1)
    assert data.split(0.5, seed=0)[1].files() == part.files()
    assert {data.split(0.5, seed)[1].files()[0] for seed in range(20)} == set(data.files())
    with pytest.raises(KDError, match=r"has 2 images, of which a share of 0.1 cannot be held out"):
        data.split(0.1, seed=0)


def test_both_parts_of_a_split_have_boxes(tmp_path):
    doc = document()
    doc["annotations"] = [a for a in doc["annotations"] if a["image_id"] == 9]
    data = CocoDetection(write(tmp_path, doc), "train")
    with pytest.raises(KDError, match=r"with a share of 0.5 held out, one of the two parts has no box"):
        data.split(0.5, seed=0)


def test_class_names_choose_classes_and_their_order(tmp_path):
    data = CocoDetection(write(tmp_path), "train", class_names=["cube", "ball"])
    assert [data[i][1]["labels"].tolist() for i in range(2)] == [[1], [0]]
    assert [c["name"] for c in data.coco()["categories"]] == ["cube", "ball"]
    cubes = CocoDetection(tmp_path, "train", class_names=["cube"])
    assert [data_of[1]["labels"].tolist() for data_of in (cubes[0], cubes[1])] == [[], [0]]
    assert {a["category_id"] for a in cubes.coco()["annotations"]} == {8}
    with pytest.raises(KDError, match="has no class dog; there are ball, cube"):
        CocoDetection(tmp_path, "train", class_names=["dog"])
    with pytest.raises(KDError, match="class_names has cube twice; name each class once"):
        CocoDetection(tmp_path, "train", class_names=["cube", "ball", "cube"])


def test_progress_counts_images(tmp_path):
    seen = []
    CocoDetection(write(tmp_path), "train", progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = CocoDetection(write(tmp_path / "a"), "train").fingerprint()
    assert first == CocoDetection(write(tmp_path / "b"), "train").fingerprint()
    assert first != CocoDetection(tmp_path / "b", "train", max_size=20).fingerprint()
    for value in (0, 1):  # files of one size, and of one time
        (tmp_path / "b" / "images" / "7.bmp").unlink(missing_ok=True)
        renamed = changed("images.0.file_name", "7.bmp")
        write(tmp_path / "b", renamed)
        Image.fromarray(np.full_like(pixels(7), value)).save(tmp_path / "b" / "images" / "7.bmp")
        os.utime(tmp_path / "b" / "images" / "7.bmp", (0, 0))
        second = CocoDetection(tmp_path / "b", "train").fingerprint()
        assert second != first
        first = second
    first = CocoDetection(tmp_path / "a", "train").fingerprint()
    moved = document()
    moved["annotations"][0]["bbox"][0] = 2
    assert first != CocoDetection(write(tmp_path / "c", moved), "train").fingerprint()


def changed(path, value):
    """The document with one value replaced."""
    return change_in(document(), path, value)


def change_in(doc, path, value):
    """Replace the value at a path like "annotations.0.bbox"."""
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    inner = doc
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return doc


# What cannot be read at all, with `on_bad="skip"` neither.
FATAL = {
    "broken JSON": ('{"images": [\n  {"id": 1,}]}', r"train\.json, line 2, column \d+: not valid JSON"),
    "empty file": ("", r"train\.json, line 1, column 1: not valid JSON"),
    "a list": ("[]", r"holds a JSON list; COCO's format is an object with images, annotations, categories"),
    "a key missing": ({"images": [], "categories": []}, r"wrong or missing: annotations"),
    "a key of another type": (changed("images", {}), r"wrong or missing: images"),
    "category without name": (
        changed("categories.0", {"id": 8}),
        r"categories\[0\] must be an object with an integer id",
    ),
    "category id twice": (changed("categories.0.id", 3), r"categories 3 \(cube\) and 3 \(ball\) have the same id"),
    "category name with half a character": (
        changed("categories.0.name", "\ud800"),
        r"categories\[0\] must be an object",
    ),
    "nested without end": ("[" * 10**5, r"train\.json cannot be read: "),
    "a number without end": ('{"images": ' + "1" * 5000 + "}", r"train\.json cannot be read: "),
    "category name twice": (changed("categories.0.name", "ball"), r"8 \(ball\) and 3 \(ball\) have the same name"),
    "no categories": (changed("categories", []), r"lists no categories"),
    "no images": (changed("images", []) | {"annotations": []}, r"lists no usable image"),
    "no annotations": (changed("annotations", []), r"has no usable annotation of ball, cube"),
    "only crowds": (changed("annotations", document()["annotations"][1:2]), r"has no usable annotation"),
}


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize(("doc", "message"), FATAL.values(), ids=FATAL)
def test_what_cannot_be_used_at_all(tmp_path, doc, message, on_bad):
    with pytest.raises(KDError, match=message) as error:
        CocoDetection(write(tmp_path, doc), "train", on_bad=on_bad)
    assert str(tmp_path / "annotations" / "train.json") in str(error.value)


# What is left out with `on_bad="skip"`: (document, message, images left, annotations left).
BAD = {
    "image no object": (changed("images.0", 5), r"images\[0\] must be an object with an integer id", 1, 1),
    "image id of another type": (
        changed("images.0.id", "7"),
        r"images\[0\] must be an object with an integer id",
        1,
        1,
    ),
    "image id twice": (changed("images.1.id", 7), r"images\[1\]: the id 7 is there already", 1, 2),
    "no file name": (changed("images.0.file_name", None), r"image 7: file_name is missing", 1, 1),
    "width of another type": (
        changed("images.0.width", "40"),
        r"image 7 \(7.png\): width and height must be positive",
        1,
        1,
    ),
    "height of zero": (changed("images.0.height", 0), r"image 7 \(7.png\): width and height must be positive", 1, 1),
    "file missing": (changed("images.0.file_name", "x.png"), r"image 7 \(x.png\): there is no file .*x\.png", 1, 1),
    "one file twice": (
        changed("images.1.file_name", "./7.png"),
        r"image 9 \(./7.png\): image 7 \(7.png\) has the same file, .*; merge the two entries",
        1,
        2,
    ),
    "other size": (changed("images.0.width", 41), r"image 7 \(7.png\): the file is 40x30, the JSON says 41x30", 1, 1),
    "annotation no object": (changed("annotations.0", []), r"annotations\[0\] must be an object", 2, 2),
    "unknown image": (changed("annotations.0.image_id", 5), r"annotation 1: no image has the id 5", 2, 2),
    "unknown category": (
        changed("annotations.0.category_id", 1),
        r"annotation 1 \(image 7\): no category has the id 1, only 3, 8",
        2,
        2,
    ),
    "ignore of another type": (changed("annotations.0.ignore", 2), r"annotation 1 .*ignore must be 0 or 1", 2, 2),
    "crowd of another type": (changed("annotations.0.iscrowd", "no"), r"annotation 1 .*iscrowd must be 0 or 1", 2, 2),
    "no bbox": (changed("annotations.0.bbox", None), r"annotation 1 .*bbox must be four finite numbers", 2, 2),
    "short bbox": (changed("annotations.0.bbox", [1, 2, 3]), r"annotation 1 .*bbox must be four finite numbers", 2, 2),
    "text in bbox": (changed("annotations.0.bbox", [1, 2, 3, "4"]), r"annotation 1 .*four finite numbers", 2, 2),
    "NaN": (changed("annotations.0.bbox", [1, 2, 3, float("nan")]), r"annotation 1 .*four finite numbers", 2, 2),
    "infinity": (changed("annotations.0.bbox", [1, 2, float("inf"), 4]), r"annotation 1 .*four finite numbers", 2, 2),
    "a number beyond floats": (
        changed("annotations.0.bbox", [1, 2, 10**400, 4]),
        r"annotation 1 .*finite numbers",
        2,
        2,
    ),
    "negative area": (changed("annotations.0.area", -1), r"annotation 1 .*area must be a finite number", 2, 2),
    "width zero": (changed("annotations.0.bbox", [1, 2, 0, 4]), r"annotation 1 .*has no area", 2, 2),
    "height negative": (changed("annotations.0.bbox", [1, 2, 3, -4]), r"annotation 1 .*has no area", 2, 2),
    "beyond the right edge": (
        changed("annotations.0.bbox", [35, 2, 7, 4]),
        r"annotation 1 \(image 7\): bbox \[35, 2, 7, 4\] reaches 2 px beyond the image of 40x30",
        2,
        2,
    ),
    "beyond the top": (changed("annotations.0.bbox", [5, -3, 7, 9]), r"annotation 1 .*reaches 3 px beyond", 2, 2),
    "outside": (changed("annotations.0.bbox", [50, 2, 7, 4]), r"annotation 1 .*lies outside the image", 2, 2),
    "outside, just": (changed("annotations.0.bbox", [40, 2, 1, 4]), r"annotation 1 .*lies outside the image", 2, 2),
    "outside, but for rounding": (
        changed("annotations.0.bbox", [39.9999999, 2, 1, 4]),
        r"annotation 1 .*lies outside the image",
        2,
        2,
    ),
    "no width but rounding noise": (
        changed("annotations.0.bbox", [20.5, 1, 7.1e-15, 4]),
        r"annotation 1 \(image 7\): bbox \[20.5, 1, 7.1e-15, 4\] has no area",
        2,
        2,
    ),
    "no height in float32": (changed("annotations.0.bbox", [1e-5, 5, 9, 2e-6]), r"annotation 1 .*no area", 2, 2),
    "a crowd without width": (changed("annotations.1.bbox", [5, 5, 1e-9, 9]), r"annotation 2 .*no area", 2, 2),
    "more pixels than are read": (
        changed("images.0.width", 10**8) | {"annotations": document()["annotations"]},
        r"image 7 \(7.png\): 100000000x30 are more than the 500 million pixels that are read; cut it into tiles",
        1,
        1,
    ),
    "half a character in a name": (
        changed("images.0.file_name", "\ud800.png"),
        r"image 7: file_name is .*no text",
        1,
        1,
    ),
    "another case": (
        changed("images.0.file_name", "7.PNG"),
        r"image 7 \(7.PNG\): there is no file .*7.PNG \(but 7.png: upper and lower case count\)",
        1,
        1,
    ),
    "a value of any length": (changed("annotations.0.iscrowd", "x" * 10**5), r"not 'x{79}\.\.\.", 2, 2),
}


@pytest.mark.parametrize(("doc", "message", "images", "annotations"), BAD.values(), ids=BAD)
def test_bad_entries_are_named_or_left_out(tmp_path, caplog, doc, message, images, annotations):
    write(tmp_path, doc)
    with pytest.raises(KDError, match=message) as error:
        CocoDetection(tmp_path, "train")
    assert re.match(rf"{re.escape(str(tmp_path))}/annotations/train.json: [1-3] faults?:\n  .+\n", str(error.value))

    with caplog.at_level(logging.WARNING):
        data = CocoDetection(tmp_path, "train", on_bad="skip")
    assert len(caplog.records) == 1
    assert re.search(message, caplog.text)
    assert len(data) == images
    truth = data.coco()
    assert len(truth["images"]) == images
    assert len(truth["annotations"]) == annotations


PATHS = [
    f"{key}.{index}.{field}"
    for key, entries in document().items()
    for index, entry in enumerate(entries)
    for field in entry
] + [
    *("annotations.0.bbox.0", "annotations.0.bbox.2", "annotations.0.bbox.3", "images.1", "annotations.2"),
    *("categories.0", "images", "annotations", "categories"),
]
NUMBERS = st.integers() | st.floats() | st.sampled_from([0.0, 1e-7, 7.0, 8, 29.9999999, 40.5, 1e300, 2**63, -(2**70)])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["\ud800", "\0", "..", "/", "9.png"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["id", "name", "bbox"]), inner),
    max_leaves=6,
)
BOXES = st.lists(st.floats(-2, 42) | NUMBERS, min_size=4, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(st.tuples(st.sampled_from(PATHS[:-3]), VALUES), max_size=3),
    last=st.tuples(st.sampled_from(PATHS), VALUES) | st.tuples(st.just("annotations.0.bbox"), BOXES),
    on_bad=st.sampled_from(["error", "skip"]),
    max_size=st.none() | st.integers(1, 50),
)
def test_whatever_stands_in_the_file_it_is_read_or_refused_in_words(tmp_path_factory, changes, last, on_bad, max_size):
    root = tmp_path_factory.getbasetemp() / "fuzz"
    doc = document()
    for path, value in (*changes, last):
        with contextlib.suppress(TypeError, KeyError, IndexError):  # an earlier change has taken the place away
            change_in(doc, path, value)
    write(root, doc)
    try:
        data = CocoDetection(root, "train", on_bad=on_bad, max_size=max_size).in_memory()
        data.fingerprint()
    except KDError as error:
        str(error).encode()
        return
    for image, sample in (data[i] for i in range(len(data))):
        assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()
        assert (sample["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
    json.dumps(data.coco(), allow_nan=False).encode()


def test_many_faults_are_one_error_with_the_first_few_and_their_number(tmp_path):
    doc = document()
    doc["annotations"] += [{"id": 10 + i, "image_id": 7, "category_id": 3, "bbox": [0, 0, 0, 0]} for i in range(7)]
    doc["images"].append({"id": 50, "file_name": "none.png", "width": 4, "height": 4})
    with pytest.raises(KDError, match=r"8 faults:\n  annotation 10 ") as error:
        CocoDetection(write(tmp_path, doc), "train")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:6]] == [f"annotation {i} (image 7)" for i in range(10, 15)]
    assert lines[6] == "  and 3 more; `kd data check` lists all"


@pytest.mark.parametrize(
    ("box", "cut"),
    [([-1, -0.5, 10, 10], [0, 0, 9, 9.5]), ([35, 25, 6, 5.75], [35, 25, 5, 5]), ([0, 0, 40, 30], [0, 0, 40, 30])],
)
def test_up_to_a_pixel_beyond_the_edge_is_cut(tmp_path, box, cut):
    data = CocoDetection(write(tmp_path, changed("annotations.0.bbox", box)), "train")
    x, y, width, height = cut
    assert data[0][1]["boxes"].tolist() == [[x, y, x + width, y + height]]
    assert data.coco()["annotations"][0]["bbox"] == cut


def test_what_is_expected_is_said_where_files_are_missing(tmp_path):
    with pytest.raises(KDError, match=r"there is no folder .*nowhere\. Expected are .*train.json and val.json"):
        CocoDetection(tmp_path / "nowhere", "train")
    write(tmp_path)
    with pytest.raises(KDError, match=r"there is no file .*val.json \(but train.json\). Expected are"):
        CocoDetection(tmp_path, "val")
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    (tmp_path / "images").rmdir()
    with pytest.raises(KDError, match=r"there is no folder .*images\. Expected are"):
        CocoDetection(tmp_path, "train")


def test_a_file_that_is_no_text(tmp_path):
    (write(tmp_path) / "annotations" / "train.json").write_bytes(b'{"images": "\xff"}')
    with pytest.raises(KDError, match=r"train.json is not text in UTF-8 \(invalid start byte at byte 12\)"):
        CocoDetection(tmp_path, "train")


@pytest.mark.parametrize("max_size", [0, -5])
def test_max_size_is_checked(tmp_path, max_size):
    with pytest.raises(KDError, match="max_size must be at least 1"):
        CocoDetection(write(tmp_path), "train", max_size=max_size)


def spoil(path, how):
    if how == "truncated":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(how)


# Odd, but clear: (path in the document, value).
READ = {
    "annotation without id": ("annotations.0.id", None),
    "annotation with an id of text": ("annotations.0.id", "c33c3539-8bd1"),
    "annotation id twice": ("annotations.2.id", 1),
    "image id as a float": ("annotations.0.image_id", 7.0),
    "image's own id as a float": ("images.0.id", 7.0),
    "category id as a float": ("annotations.0.category_id", 3.0),
    "category's own id as a float": ("categories.1.id", 3.0),
    "width as a float": ("images.0.width", 40.0),
    "iscrowd null": ("annotations.0.iscrowd", None),
    "iscrowd false": ("annotations.0.iscrowd", False),
    "area null": ("annotations.0.area", None),
}


@pytest.mark.parametrize(("path", "value"), READ.values(), ids=READ)
def test_what_is_odd_but_clear_is_read(tmp_path, path, value):
    plain = CocoDetection(write(tmp_path / "a"), "train")
    data = CocoDetection(write(tmp_path / "b", changed(path, value)), "train")
    assert json.dumps(data.coco()) == json.dumps(plain.coco())
    assert data[0][1]["boxes"].tolist() == plain[0][1]["boxes"].tolist()


def test_annotations_without_ids_are_named_by_their_place(tmp_path):
    doc = changed("annotations.0.bbox", [0, 0, 0, 0])
    del doc["annotations"][0]["id"]
    with pytest.raises(KDError, match=r"annotations\[0\] \(image 7\): bbox"):
        CocoDetection(write(tmp_path, doc), "train")


@pytest.mark.parametrize(
    ("written", "stored"), [("sub\\7.png", "sub/7.png"), ("\xe9.png", "e\u0301.png"), ("e\u0301.png", "\xe9.png")]
)
def test_names_of_other_systems_are_found(tmp_path, written, stored):
    write(tmp_path, changed("images.0.file_name", written))
    path = tmp_path / "images" / stored
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "images" / "7.png").rename(path)
    assert np.array_equal(CocoDetection(tmp_path, "train")[0][0].permute(1, 2, 0).numpy(), pixels(7))


@pytest.mark.parametrize("box", [[20.5, 11, 5e-5, 12], [1e-5, 5, 5e-5, 10], [39.99995, 5, 1, 10]])
def test_the_thinnest_boxes_that_are_taken_stay_boxes(tmp_path, box):
    for max_size in (None, 10):
        data = CocoDetection(write(tmp_path, changed("annotations.0.bbox", box)), "train", max_size=max_size)
        for image, sample in (data[0],):
            target = {"boxes": sample["boxes"], "labels": sample["labels"]}
            _, mirrored = Augmentation(flip=1)(image, target, torch.Generator())
            for boxes in (sample["boxes"], mirrored["boxes"]):
                assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_images_with_many_boxes_are_spoken_of(tmp_path, caplog):
    doc = document()
    doc["annotations"] += [{"image_id": 9, "category_id": 3, "bbox": [i % 30, 1, 2, 2]} for i in range(100)]
    with caplog.at_level(logging.WARNING):
        CocoDetection(write(tmp_path, doc), "train")
    assert "images with up to 101 boxes (image 9 (9.png)). COCO scores at most 100 detections an image" in caplog.text


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_pixels_that_turn_out_broken_when_they_are_decoded(tmp_path, caplog, on_bad):
    path = write(tmp_path) / "images" / "7.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])  # both ends are good
    data = CocoDetection(tmp_path, "train", on_bad=on_bad)
    with pytest.raises(KDError, match=r"train.json: image 7 \(7.png\): the file cannot be decoded"):
        data[0]
    if on_bad == "error":
        with pytest.raises(KDError, match=r"1 fault:\n  image 7 \(7.png\): the file cannot be decoded"):
            data.in_memory()
        return
    with caplog.at_level(logging.WARNING):
        kept = data.in_memory()
    assert "left out, as they are bad: 1 fault" in caplog.text
    assert [kept[i][1]["image_id"] for i in range(len(kept))] == [9]
    assert [a["image_id"] for a in kept.coco()["annotations"]] == [9]


@pytest.mark.parametrize("how", ["truncated", b"", b"no image"], ids=["truncated", "empty", "text"])
def test_broken_images(tmp_path, how):
    spoil(write(tmp_path) / "images" / "7.png", how)
    with pytest.raises(KDError, match=r"image 7 \(7.png\): the file cannot be decoded"):
        CocoDetection(tmp_path, "train")
    assert len(CocoDetection(tmp_path, "train", on_bad="skip")) == 1


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_width_and_height_are_those_that_one_sees(tmp_path, ending):
    upright = np.zeros((40, 30, 3), np.uint8)
    upright[:15, 20:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    doc = changed("images.0.file_name", f"x.{ending}")
    doc["images"][0] |= {"width": 30, "height": 40}
    doc["annotations"] = [{"image_id": 7, "category_id": 3, "bbox": [20, 0, 10, 15]}]
    Image.fromarray(np.rot90(upright)).save(write(tmp_path, doc) / "images" / f"x.{ending}", exif=exif)
    image, sample = CocoDetection(tmp_path, "train")[0]
    x1, y1, x2, y2 = map(int, sample["boxes"][0])
    assert sample["original_size"] == image.shape[1:] == (40, 30)
    assert image[:, y1:y2, x1:x2].float().mean() > 245
    doc["images"][0] |= {"width": 40, "height": 30}  # as it is stored
    with pytest.raises(KDError, match="the file is 30x40 with its EXIF orientation applied, the JSON says 40x30"):
        CocoDetection(write(tmp_path, doc), "train")


def test_splits_must_agree_on_classes(tmp_path):
    train = CocoDetection(write(tmp_path), "train")
    same = document()
    same["categories"].reverse()
    check_same_classes(train, CocoDetection(write(tmp_path, same, "val"), "val"))
    other = CocoDetection(write(tmp_path, changed("categories.0.name", "dice"), "val"), "val")
    with pytest.raises(
        KDError, match=r"train.json and .*val.json differ: only the first has cube, only the second dice"
    ):
        check_same_classes(train, other)
    swapped = document()
    swapped["categories"] = [{"id": 8, "name": "ball"}, {"id": 3, "name": "cube"}]
    with pytest.raises(KDError, match="the same classes come in a different order"):
        check_same_classes(train, CocoDetection(write(tmp_path, swapped, "val"), "val"))


@needs_shared
def test_real_annotations_with_crowds_and_category_gaps():
    root = SHARED / "tiny-coco"
    data = CocoDetection(root, "val", max_size=128)
    source = json.loads((root / "annotations" / "val.json").read_text())
    assert len(data) == len(source["images"]) == 50
    assert len(data.class_names) == 80
    assert data.class_names[11] == "stop sign"  # id 13: there is no 12
    crowds = sum(a["iscrowd"] for a in source["annotations"])
    assert crowds == 5
    assert sum(a["iscrowd"] for a in data.coco()["annotations"]) == crowds
    assert sum(len(data[i][1]["labels"]) for i in range(50)) == len(source["annotations"]) - crowds
    names = {c["id"]: c["name"] for c in source["categories"]}
    for i in range(50):
        image, sample = data[i]
        assert max(image.shape) == 128
        mine = [a for a in source["annotations"] if a["image_id"] == sample["image_id"] and not a["iscrowd"]]
        assert [data.class_names[label] for label in sample["labels"]] == [names[a["category_id"]] for a in mine]
        scale = 128 / max(sample["original_size"])
        widths = torch.tensor([a["bbox"][2] for a in mine]) * scale
        assert torch.allclose(sample["boxes"][:, 2] - sample["boxes"][:, 0], widths, rtol=0.02)


@needs_shared
@pytest.mark.parametrize("name", ["bccd", "playing-cards", "microcontrollers", "sketch-ui", "chess", "tiny-coco"])
def test_real_data_sets_have_no_fault(name):
    data = CocoDetection(SHARED / name, "val", memory_bytes=0)
    boxes = torch.cat([data[i][1]["boxes"] for i in range(3)])
    assert (boxes[:, 2:] > boxes[:, :2]).all()
