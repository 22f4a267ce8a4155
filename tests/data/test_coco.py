import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdtoolkit import KDError
from kdtoolkit.data import CocoDetection, check_same_classes
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


def test_decoded_on_access_it_gives_the_same(tmp_path):
    cached = CocoDetection(write(tmp_path), "train", max_size=25)
    lazy = CocoDetection(tmp_path, "train", max_size=25, cache_bytes=100)
    assert torch.equal(cached[0][0], lazy[0][0])
    assert cached.fingerprint() == lazy.fingerprint()
    (tmp_path / "images" / "7.png").unlink()
    assert cached[0][0].shape == lazy[1][0].shape
    with pytest.raises(KDError, match=r"train.json: image 7 \(7.png\): there is no file"):
        lazy[0]


def test_class_names_choose_classes_and_their_order(tmp_path):
    data = CocoDetection(write(tmp_path), "train", class_names=["cube", "ball"])
    assert [data[i][1]["labels"].tolist() for i in range(2)] == [[1], [0]]
    assert [c["name"] for c in data.coco()["categories"]] == ["cube", "ball"]
    cubes = CocoDetection(tmp_path, "train", class_names=["cube"])
    assert [data_of[1]["labels"].tolist() for data_of in (cubes[0], cubes[1])] == [[], [0]]
    assert {a["category_id"] for a in cubes.coco()["annotations"]} == {8}
    with pytest.raises(KDError, match="has no class dog; there are ball, cube"):
        CocoDetection(tmp_path, "train", class_names=["dog"])


def test_progress_counts_images(tmp_path):
    seen = []
    CocoDetection(write(tmp_path), "train", progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = CocoDetection(write(tmp_path / "a"), "train").fingerprint()
    assert first == CocoDetection(write(tmp_path / "b"), "train").fingerprint()
    assert first != CocoDetection(tmp_path / "b", "train", max_size=20).fingerprint()
    Image.fromarray(pixels(7) // 64).save(tmp_path / "b" / "images" / "7.png")  # another file size
    assert first != CocoDetection(tmp_path / "b", "train").fingerprint()
    moved = document()
    moved["annotations"][0]["bbox"][0] = 2
    assert first != CocoDetection(write(tmp_path / "c", moved), "train").fingerprint()


def changed(path, value):
    """The document with one value replaced; `path` is like "annotations.0.bbox"."""
    doc = document()
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
    "other size": (changed("images.0.width", 41), r"image 7 \(7.png\): the file is 40x30, the JSON says 41x30", 1, 1),
    "annotation no object": (changed("annotations.0", []), r"annotations\[0\] must be an object", 2, 2),
    "annotation id twice": (changed("annotations.2.id", 1), r"annotations\[2\]: the id 1 is there already", 2, 2),
    "unknown image": (changed("annotations.0.image_id", 5), r"annotation 1: no image has the id 5", 2, 2),
    "unknown category": (
        changed("annotations.0.category_id", 1),
        r"annotation 1 \(image 7\): no category has the id 1, only 3, 8",
        2,
        2,
    ),
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
    "outside": (changed("annotations.0.bbox", [50, 2, 7, 4]), r"annotation 1 .*reaches 17 px beyond", 2, 2),
    "outside, just": (changed("annotations.0.bbox", [40, 2, 1, 4]), r"annotation 1 .*reaches 1 px beyond", 2, 2),
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
] + ["annotations.0.bbox.2", "images.1", "annotations.2", "categories.0", "images", "annotations", "categories"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["id", "name", "bbox"]), inner),
    max_leaves=6,
)


@given(path=st.sampled_from(PATHS), value=VALUES)
def test_whatever_stands_in_the_file_it_is_read_or_refused_in_words(tmp_path_factory, path, value):
    root = tmp_path_factory.getbasetemp() / "fuzz"
    write(root, changed(path, value))
    try:
        data = CocoDetection(root, "train")
    except KDError:
        return
    for image, sample in (data[i] for i in range(len(data))):
        assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()
        assert (sample["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()


def test_many_faults_are_one_error_with_the_first_few_and_their_number(tmp_path):
    doc = document()
    doc["annotations"] += [{"id": 10 + i, "image_id": 7, "category_id": 3, "bbox": [0, 0, 0, 0]} for i in range(7)]
    doc["images"].append({"id": 50, "file_name": "none.png", "width": 4, "height": 4})
    with pytest.raises(KDError, match=r"8 faults:\n  annotation 10 ") as error:
        CocoDetection(write(tmp_path, doc), "train")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:6]] == [f"annotation {i} (image 7)" for i in range(10, 15)]
    assert lines[6] == "  and 3 more"


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


@pytest.mark.parametrize("how", ["truncated", b"", b"no image"], ids=["truncated", "empty", "text"])
def test_broken_images(tmp_path, how):
    spoil(write(tmp_path) / "images" / "7.png", how)
    with pytest.raises(KDError, match=r"image 7 \(7.png\): the file cannot be decoded"):
        CocoDetection(tmp_path, "train")
    assert len(CocoDetection(tmp_path, "train", on_bad="skip")) == 1


def test_a_truncated_image_that_is_not_cached_is_found_on_access(tmp_path):
    write(tmp_path, changed("images.0.file_name", "7.jpg"))
    Image.fromarray(pixels(7)).save(tmp_path / "images" / "7.jpg")
    spoil(tmp_path / "images" / "7.jpg", "truncated")
    data = CocoDetection(tmp_path, "train", cache_bytes=0)
    with pytest.raises(KDError, match=r"train.json: image 7 \(7.jpg\): the file cannot be decoded"):
        data[0]


def save_with_orientation(path, array, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(path, exif=exif)


def test_exif_orientation_is_applied(tmp_path):
    write(tmp_path)
    upright = pixels(7)
    # 6: to be turned a quarter clockwise; stored as turned the other way.
    save_with_orientation(tmp_path / "images" / "7.png", np.rot90(upright), 6)
    for cache_bytes in (0, 10**6):
        image = CocoDetection(tmp_path, "train", cache_bytes=cache_bytes)[0][0]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), upright)


def test_exif_orientation_that_the_json_does_not_know_is_refused(tmp_path):
    save_with_orientation(write(tmp_path) / "images" / "7.png", pixels(7), 6)
    message = "the file is 30x40 with its EXIF orientation applied, the JSON says 40x30"
    for cache_bytes in (0, 10**6):
        with pytest.raises(KDError, match=message):
            CocoDetection(tmp_path, "train", cache_bytes=cache_bytes)


def grey16(values):
    return Image.fromarray((values[..., 0].astype(np.uint16) << 8) + 255)


MODES = {
    "L": (lambda v: Image.fromarray(v[..., 0]), lambda v: np.repeat(v[..., :1], 3, 2), "png"),
    "LA": (lambda v: Image.fromarray(v[..., 0]).convert("LA"), lambda v: np.repeat(v[..., :1], 3, 2), "png"),
    "1": (lambda v: Image.fromarray(v[..., 0] > 127), lambda v: 255 * np.repeat(v[..., :1] > 127, 3, 2), "png"),
    "P": (
        lambda v: Image.fromarray(v // 128 * 255).quantize(8),
        lambda v: v // 128 * 255,
        "png",
    ),
    "RGBA": (lambda v: Image.fromarray(np.dstack([v, v[..., 0]])), lambda v: v, "png"),
    "I;16": (grey16, lambda v: np.repeat(v[..., :1], 3, 2), "png"),
    "CMYK": (lambda v: Image.fromarray(v).convert("CMYK"), lambda v: v, "tiff"),
}


@pytest.mark.parametrize("mode", MODES)
def test_all_kinds_of_pixels_become_rgb(tmp_path, mode):
    make, expected, kind = MODES[mode]
    write(tmp_path, changed("images.0.file_name", f"odd.{kind}"))
    make(pixels(7)).save(tmp_path / "images" / f"odd.{kind}")
    with Image.open(tmp_path / "images" / f"odd.{kind}") as image:
        assert image.mode == mode
    found = CocoDetection(tmp_path, "train")[0][0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected(pixels(7))).max() <= 1


def test_floating_point_pixels_are_refused(tmp_path):
    write(tmp_path, changed("images.0.file_name", "odd.tiff"))
    Image.fromarray(np.zeros((30, 40), np.float32)).save(tmp_path / "images" / "odd.tiff")
    with pytest.raises(KDError, match=r"image 7 \(odd.tiff\): .*store it with 8 or 16 bits"):
        CocoDetection(tmp_path, "train")


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
    with pytest.raises(KDError, match="the same classes come in another order"):
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
    data = CocoDetection(SHARED / name, "val", cache_bytes=0)
    boxes = torch.cat([data[i][1]["boxes"] for i in range(3)])
    assert (boxes[:, 2:] > boxes[:, :2]).all()
