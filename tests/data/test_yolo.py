import logging
import os
import re
import unicodedata

import pytest
from PIL import Image

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.data.opening import splits_of
from tests.data._coco import expect_samples_of_coco, pixels
from tests.data._yolo import BALL, WHOLE, YAML, write


def boxes(data):
    return [sample["boxes"].tolist() for _, sample in (data[i] for i in range(len(data)))]


def labels(data):
    return [sample["labels"].tolist() for _, sample in (data[i] for i in range(len(data)))]


def test_it_gives_the_samples_of_the_same_data_in_coco_format(tmp_path):
    data = open_dataset(write(tmp_path / "yolo"), "train")
    expect_samples_of_coco(data, tmp_path / "coco")
    truth = data.coco()
    assert [image["file_name"] for image in truth["images"]] == ["7.png", "9.png"]
    assert truth["categories"] == [{"id": 1, "name": "ball"}, {"id": 2, "name": "cube"}]
    assert truth["annotations"][0]["bbox"] == [2.5, 4, 10, 20.25]


@pytest.mark.parametrize(
    ("yaml", "images"),
    [
        ("train: images/train\nnames: [ball, cube]", "images/train"),
        ("train: images/train\nnames: {1: cube, 0: ball}", "images/train"),
        ("train: images/train\nnames: {'0': ball, '1': cube}\nnc: 2", "images/train"),
        ("train: [images/train]\nnames: [ball, cube]\nnc: 2.0", "images/train"),
        ("train: images\\train\nnames: [ball, cube]", "images/train"),
        ("train: ../train/images\nnames: [ball, cube]", "train/images"),  # as Roboflow writes it
        ("path: /nowhere/at/all\ntrain: images/train\nnames: [ball, cube]", "images/train"),  # moved since
        ("path: images\ntrain: train\nnames: [ball, cube]", "images/train"),
        ("path: ''\ntrain: images/\nnames: [ball, cube]", "images/deep/er"),
        ("\ufefftrain: images/train\nnames: [ball, cube]", "images/train"),
        ("train: images/train\nnames: [ball, cube]\ndownload: https://example.org", "images/train"),
    ],
)
def test_layouts(tmp_path, yaml, images):
    write(tmp_path, yaml, images=images)
    if images == "train/images":
        (tmp_path / "labels" / "train" / "images").rename(tmp_path / "train" / "labels")
    data = open_dataset(tmp_path, "train")
    assert data.class_names == ("ball", "cube")
    assert labels(data) == [[0], [1]]


def test_val_may_be_called_validation(tmp_path):
    write(tmp_path, "train: images/train\nvalidation: images/train\nnames: [ball, cube]")
    assert splits_of(tmp_path) == ["train", "val"]
    assert labels(open_dataset(tmp_path, "val")) == [[0], [1]]


def test_classes_without_names(tmp_path):
    data = open_dataset(write(tmp_path, "train: images/train\nnc: 3"), "train")
    assert data.class_names == ("class_0", "class_1", "class_2")


def test_numbers_are_names_if_they_read_as_they_are_written(tmp_path):
    write(tmp_path, "train: images/train\nnames: {00: 7, 1: '010', 2: 1.5, 3: 08}\nnc: 4.0")
    assert open_dataset(tmp_path, "train").class_names == ("7", "010", "1.5", "08")


def test_merged_mappings_may_be_overridden(tmp_path):
    write(tmp_path, "b: &b {nc: 3}\na: &a {<<: *b, train: x, nc: 2}\n<<: *a\ntrain: images/train")
    assert open_dataset(tmp_path, "train").class_names == ("class_0", "class_1")


def test_labels_lie_beside_images_if_there_is_no_images_folder(tmp_path):
    write(tmp_path, "train: photos\nnames: [ball, cube]", images="photos")
    for number in (7, 9):
        (tmp_path / "labels" / "photos" / f"{number}.txt").rename(tmp_path / "photos" / f"{number}.txt")
    assert labels(open_dataset(tmp_path, "train")) == [[0], [1]]


def test_labels_lie_beside_images_if_the_data_lie_in_an_images_folder(tmp_path, caplog):
    root = write(tmp_path / "images" / "birds", "train: photos\nnames: [ball, cube]", images="photos")
    for number in (7, 9):
        (root / "labels" / "photos" / f"{number}.txt").rename(root / "photos" / f"{number}.txt")
    assert labels(open_dataset(root, "train")) == [[0], [1]]
    assert not caplog.text
    (tmp_path / "labels" / "birds" / "photos").mkdir(parents=True)
    (root / "photos" / "7.txt").rename(tmp_path / "labels" / "birds" / "photos" / "7.txt")
    assert labels(open_dataset(root, "train")) == [[0], [1]]


def test_the_yaml_file_may_have_any_name(tmp_path):
    (write(tmp_path) / "data.yaml").rename(tmp_path / "cubes.yml")
    assert len(open_dataset(tmp_path, "train")) == len(open_dataset(tmp_path / "cubes.yml", "train")) == 2
    (tmp_path / "suite.yaml").write_text("name: x\nteacher: y")  # which describes no data
    assert len(open_dataset(tmp_path, "train")) == 2
    (tmp_path / "more.yaml").write_text(YAML)
    with pytest.raises(KDError, match=r"several YAML files that describe data \(cubes.yml, more.yaml\); name one"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize("line", ["./images/train/{}.png", "images/train/{}.png", "{root}/images/train/{}.png"])
def test_lists_of_images(tmp_path, line):
    write(tmp_path, YAML.replace("train: images/train", "train: train.txt"))
    text = "\n".join(line.format(number, root=tmp_path) for number in (9, 7))
    (tmp_path / "train.txt").write_text(f"{text}\n\n")
    data = open_dataset(tmp_path, "train")
    assert labels(data) == [[1], [0]]  # in the order of the list
    assert [image["file_name"] for image in data.coco()["images"]] == ["train/9.png", "train/7.png"]


def test_several_folders(tmp_path):
    write(tmp_path, "train: [images/a, images/b]\nnames: [ball, cube]", images="images/a")
    write(tmp_path, "train: [images/a, images/b]\nnames: [ball, cube]", images="images/b")
    assert labels(open_dataset(tmp_path, "train")) == [[0], [1], [0], [1]]


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.25 0.2 0.5 0.2 0.5 0.6", [10, 6, 20, 18]),  # a triangle
        ("0 0.25 0.2 0.5 0.2 0.5 0.6 0.25 0.6", [10, 6, 20, 18]),  # the corners of a turned box
        ("0.0\t0.375 0.4   0.25 0.4 ", [10, 6, 20, 18]),
        ("0 0.24 0.4 0.5 0.4", [0, 6, 19.6, 18]),  # half a pixel beyond the edge
    ],
)
def test_lines(tmp_path, line, box):
    data = open_dataset(write(tmp_path, labels={7: f"\ufeff{line}\r\n\r\n{BALL}\r\n"}), "train")
    found = boxes(data)[0]
    assert found[0] == pytest.approx(box)
    assert len(found) == 2


def test_poses_are_boxes_where_the_yaml_says_how_long_they_are(tmp_path):
    line = f"{BALL} 0.1 0.1 2 0.9 0.9 1"
    write(tmp_path, f"{YAML}kpt_shape: [2, 3]", labels={7: line})
    assert boxes(open_dataset(tmp_path, "train"))[0] == [[2.5, 4, 12.5, 24.25]]


def test_a_missing_label_file_means_an_image_without_objects(tmp_path):
    data = open_dataset(write(tmp_path, labels={7: None, 8: ""}), "train")
    assert labels(data) == [[], [], [1]]


def test_labels_that_are_missing_or_too_many_are_told_once(tmp_path, caplog):
    folder = write(tmp_path, labels={7: None}) / "labels" / "train"
    Image.fromarray(pixels(5)).save(tmp_path / "images" / "train" / "a.gif")
    for name in ("a", "b", "c", "._9"):
        (folder / f"{name}.txt").write_text(BALL)
    for _ in range(2):
        open_dataset(tmp_path, "train")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'data.yaml'}: {text}"
        for text in (
            "1 of 2 images have no label file (the first is 7.png): they count as images without objects. Looked for "
            f"was {folder / '7.txt'}",
            "1 files have labels, but endings that are not read (the first is images/train/a.gif): store such images "
            "as PNG or JPEG",
            "2 label files belong to no image; the first is labels/train/b.txt",
        )
    ]


@pytest.mark.parametrize(("ours", "theirs"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_images_and_labels_may_be_composed_in_different_ways(tmp_path, caplog, ours, theirs):
    write(tmp_path)
    for kind, form, ending in (("images", ours, "png"), ("labels", theirs, "txt")):
        folder = tmp_path / kind / "train" / unicodedata.normalize(form, "höhe")
        folder.mkdir()
        (tmp_path / kind / "train" / f"7.{ending}").rename(folder / f"{unicodedata.normalize(form, 'é')}.{ending}")
    assert labels(open_dataset(tmp_path, "train")) == [[1], [0]]
    assert not caplog.text


def test_label_files_may_have_their_ending_in_upper_case(tmp_path, caplog):
    folder = write(tmp_path) / "labels" / "train"
    (folder / "7.txt").rename(folder / "7.TXT")
    assert labels(open_dataset(tmp_path, "train")) == [[0], [1]]
    assert not caplog.text


FATAL = {
    "empty": ("", "data.yaml must be a mapping with the keys path, train, val and names, not None"),
    "a list": ("[1, 2]", "must be a mapping"),
    "not YAML": ("train: [", "data.yaml, line 1: not YAML"),
    "an object of Python": ("train: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    "nested without end": ("[" * 5000, "not YAML|cannot be read as YAML"),
    "control characters": ("train: \x00", "not YAML"),
    "no split": ("names: [a]", "names no images: write `train: images/train`"),
    "a missing split": ("val: images/train\nnames: [a]", "has no train, only val"),
    "a split of another type": ("train: 5\nnames: [a]", "train must be a folder of images, .*not 5"),
    "an empty split": ("train: []\nnames: [a]", r"train must be a folder .*not \[\]"),
    "path of another type": ("path: [a]\ntrain: a\nnames: [a]", r"path must be the folder of the data, not \['a'\]"),
    "no such folder": (
        YAML.replace("train: images/train", "train: none"),
        "train: there is no folder and no .txt list",
    ),
    "a lost path": ("path: gone\ntrain: none\nnames: [a]", r"\(path, gone, is no folder, so the folder of the file"),
    "a folder outside": ("train: ..\nnames: [a]", r"train: \.\. lies outside of the data set's folder"),
    "no folder outside": ("train: ../none\nnames: [a]", "train: there is no folder and no .txt list .*none; correct"),
    "an absolute folder outside": ("train: /etc\nnames: [a]", "train: /etc lies outside of the data set's folder"),
    "a folder without images": ("train: labels\nnames: [a]", "train: there are no images in labels"),
    "no names": ("train: images/train", "has no names; write them as a list"),
    "names of another type": ("train: images/train\nnames: ball", "names must be a list of class names"),
    "no class": ("train: images/train\nnames: []", r"names must be a list of class names, .*not \[\]"),
    "a name that YAML takes for false": ("train: images/train\nnames: [no, cube]", r"names\[0\] is False, which is no"),
    "an octal number": ("train: images/train\nnames: [ball, 010]", r"names\[1\] is 010, which YAML takes for a number"),
    "a time": ("train: images/train\nnames: {0: 12:30, 1: a}", r"names\[0\] is 12:30, which .* put it in quotes"),
    "a zero at the end": ("train: images/train\nnames: [1.50]", r"names\[0\] is 1.50, which YAML takes for"),
    "a number twice": (
        "train: images/train\nnames: {0: ball, 0: cube}",
        r"line 2: not YAML: the key '0' is there twice",
    ),
    "a key twice": (
        "train: images/train\nnames: [ball]\ntrain: x",
        r"line 3: not YAML: the key 'train' is there twice",
    ),
    "a name of another type": (
        "train: images/train\nnames: [ball, [cube]]",
        r"names\[1\] is \['cube'\], which is no text",
    ),
    "a name with a terminal's commands": ('train: a\nnames: ["\\e[2J"]', r"names\[0\] is '\\x1b\[2J'"),
    "a name twice": ("train: images/train\nnames: [ball, ball]", "names has ball twice"),
    "a gap in names": (
        "train: images/train\nnames: {0: ball, 2: cube}",
        r"names must have the keys 0 to 1, not \[0, 2\]",
    ),
    "nc disagrees": (f"{YAML}nc: 3", "nc is 3, and names has 2"),
    "nc of another type": (f"{YAML}nc: many", "nc must be the number of classes, not 'many'"),
    "kpt_shape of another type": (f"{YAML}kpt_shape: 17", r"kpt_shape must be two numbers, such as \[17, 3\], not 17"),
    "no label at all": (YAML, "has no usable annotation of ball, cube"),
}


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize(("yaml", "message"), FATAL.values(), ids=FATAL)
def test_what_cannot_be_used_at_all(tmp_path, yaml, message, on_bad):
    missing = {7: None, 9: None} if "usable" in message else None
    with pytest.raises(KDError, match=message) as error:
        open_dataset(write(tmp_path, yaml, labels=missing), "train", on_bad=on_bad)
    assert str(tmp_path / "data.yaml") in str(error.value)


def test_a_bomb_of_aliases_is_refused_in_few_words(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(KDError, match="names") as error:
        open_dataset(write(tmp_path, "\n".join([*lines, "train: images/train", "names: [*a11]"])), "train")
    assert len(str(error.value)) < 500


# What is left out with `on_bad="skip"`: (text of labels, message, boxes that are left in it).
BAD = {
    "a class beyond": ("2 0.5 0.5 0.2 0.2", r"line 1: class '2' is none of 0 to 1", 0),
    "a negative class": ("-1 0.5 0.5 0.2 0.2", r"class '-1' is none of 0 to 1", 0),
    "half a class": ("0.5 0.5 0.5 0.2 0.2", r"class '0.5' is none of 0 to 1", 0),
    "a name as class": ("ball 0.5 0.5 0.2 0.2", r"'ball 0.5 0.5 0.2 0.2' must be finite numbers: class, centre x", 0),
    "commas": (f"{BALL}\n0,0.5,0.5,0.2,0.2", r"line 2: '0,0.5,0.5,0.2,0.2' must be finite numbers", 1),
    "NaN": ("0 nan 0.5 0.2 0.2", "must be finite numbers", 0),
    "infinity": ("0 0.5 inf 0.2 0.2", "must be finite numbers", 0),
    "a huge number": ("0 1e300 0.5 0.2 0.2", "must be finite numbers", 0),
    "four numbers": ("0 0.5 0.5 0.2", "the line has 4 numbers; it must be class, centre x", 0),
    "a class alone": ("0", "the line has 1 numbers", 0),
    "a confidence": (f"{BALL} 0.9", "the line has 6 numbers", 0),
    "half a corner": (f"{BALL} 0.9 0.5 0.1", "the line has 8 numbers; .* If it is a pose, set kpt_shape", 0),
    "no width": ("0 0.5 0.5 0 0.2", r"box \[20, 12, 0, 6\] has no area", 0),
    "negative height": ("0 0.5 0.5 0.2 -0.2", "has no area", 0),
    "a flat polygon": ("0 0.1 0.5 0.5 0.5 0.9 0.5", "has no area", 0),
    "pixels": ("0 20 15 8 6", r"lies outside the image of 40x30; these are pixels: .* a line is class, centre x", 0),
    "corners": ("0 0.5 0.5 0.9 0.9\n0 0.6 0.6 0.9 0.9", r"line 2: box .* reaches 2 px beyond the image of 40x30", 1),
    "no text": (b"\xff\xfe0", r"is not text in UTF-8 \(invalid start byte at byte 0\)", None),
}


@pytest.mark.parametrize(("text", "message", "left"), BAD.values(), ids=BAD)
def test_bad_lines_are_named_or_left_out(tmp_path, caplog, text, message, left):
    write(tmp_path, labels={7: text})
    with pytest.raises(KDError, match=message) as error:
        open_dataset(tmp_path, "train")
    head, fault, *_ = str(error.value).splitlines()
    assert head == f"{tmp_path}/data.yaml: 1 fault:"
    assert "7.txt" in fault
    with caplog.at_level(logging.WARNING):
        data = open_dataset(tmp_path, "train", on_bad="skip")
    assert re.search(message, caplog.text)
    assert [len(each) for each in boxes(data)] == ([1] if left is None else [left, 1])


LISTED = {
    "a climb": ("images/../../x.png", r"train.txt, line 1: 'images/../../x.png' lies outside of the data set's folder"),
    "a climb that returns": ("images/../images/train/9.png", "lies outside of the data set's folder"),
    "absolute and outside": ("/etc/x.png", r"'/etc/x.png' lies outside of the data set's folder .* set `path`"),
    "a missing file": ("images/train/none.png", "there is no file 'images/train/none.png' in"),
    "twice": ("images/train/9.png\nimages/train/9.png", "image 'images/train/9.png': it is listed twice"),
    "a name without end": ("x" * 5000, "there is no file 'x"),
}


@pytest.mark.parametrize(("text", "message"), LISTED.values(), ids=LISTED)
def test_bad_lines_of_lists(tmp_path, text, message):
    write(tmp_path, YAML.replace("train: images/train", "train: train.txt"))
    (tmp_path / "train.txt").write_text(f"{text}\nimages/train/7.png\n")
    with pytest.raises(KDError, match=message):
        open_dataset(tmp_path, "train")
    assert labels(open_dataset(tmp_path, "train", on_bad="skip"))[-1] == [0]


def test_broken_images(tmp_path):
    path = write(tmp_path) / "images" / "train" / "7.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(KDError, match=r"1 fault:\n  image images/train/7.png: the file cannot be decoded"):
        open_dataset(tmp_path, "train")
    assert labels(open_dataset(tmp_path, "train", on_bad="skip")) == [[1]]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    folder = write(tmp_path) / "images" / "train"
    for name in ("._7.png", ".ipynb_checkpoints/7-checkpoint.png", "sub/.Trash/8.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / "7.png").read_bytes())
    assert labels(open_dataset(tmp_path, "train")) == [[0], [1]]


def test_links_to_images_that_are_gone_are_faults(tmp_path):
    (write(tmp_path) / "images" / "train" / "8.png").symlink_to(tmp_path / "gone" / "8.png")
    with pytest.raises(KDError, match=r"image images/train/8.png: there is no file .*: it is a link to .*gone/8.png"):
        open_dataset(tmp_path, "train")
    assert labels(open_dataset(tmp_path, "train", on_bad="skip")) == [[0], [1]]


def test_names_with_control_characters_are_faults(tmp_path):
    Image.fromarray(pixels(5)).save(write(tmp_path) / "images" / "train" / "\x1b[31m.png")
    with pytest.raises(KDError, match=r"image 'images/train/\\x1b\[31m.png': its name has control characters") as error:
        open_dataset(tmp_path, "train")
    assert "\x1b" not in str(error.value)
    assert len(open_dataset(tmp_path, "train", on_bad="skip")) == 2


def test_turned_images_have_the_size_that_one_sees(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(7)).save(write(tmp_path, labels={7: WHOLE}) / "images" / "train" / "7.png", exif=exif)
    image, sample = open_dataset(tmp_path, "train")[0]
    assert sample["original_size"] == image.shape[1:] == (40, 30)
    assert sample["boxes"].tolist() == [[0, 0, 30, 40]]


def test_links_are_not_followed_to_name_an_image(tmp_path, monkeypatch):
    write(tmp_path)
    asked = []
    monkeypatch.setattr("os.path.realpath", lambda path, real=os.path.realpath: asked.append(path) or real(path))
    open_dataset(tmp_path, "train")
    assert not asked


def test_linked_folders_are_read(tmp_path):
    write(tmp_path, images="images/train/sub")
    for kind in ("images", "labels"):
        (tmp_path / kind / "train" / "sub").rename(tmp_path / f"away_{kind}")
        (tmp_path / kind / "train" / "sub").symlink_to(tmp_path / f"away_{kind}")
    data = open_dataset(tmp_path, "train")
    assert [image["file_name"] for image in data.coco()["images"]] == ["sub/7.png", "sub/9.png"]
    assert labels(data) == [[0], [1]]
