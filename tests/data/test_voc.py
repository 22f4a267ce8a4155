import logging
import re

import numpy as np
import pytest
from PIL import Image

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset, voc
from tests.data._coco import expect_samples_of_coco, pixels
from tests.data._voc import BALL, CROWD, WHOLE, thing, write, xml


def boxes(data):
    return [sample["boxes"].tolist() for _, sample in (data[i] for i in range(len(data)))]


def test_it_gives_the_samples_of_the_same_data_in_coco_format(tmp_path):
    data = open_dataset(write(tmp_path / "voc"), "train")
    same = expect_samples_of_coco(data, tmp_path / "coco")  # the crowd, which is difficult here, is no box
    assert [a["iscrowd"] for a in data.coco()["annotations"]] == [0, 1, 0]
    assert [a["bbox"] for a in data.coco()["annotations"]] == [a["bbox"] for a in same.coco()["annotations"]]


def test_pixels_count_from_1_and_the_last_one_is_included(tmp_path):
    data = open_dataset(write(tmp_path, files={"7": xml(("ball", (1, 2, 1, 30)), ("ball", (0, 1, 40, 30)))}), "train")
    assert boxes(data)[0] == [[0, 1, 1, 30], [0, 0, 40, 30]]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path, files={".ipynb_checkpoints/7": xml(("owl", (1, 1, 9, 9)))})
    assert open_dataset(tmp_path, "train").class_names == ("ball", "cube")


def test_classes_are_sorted_names_or_those_of_a_list(tmp_path):
    write(tmp_path, files={"7": xml(("zebra", (1, 1, 9, 9)), WHOLE), "8": xml(("ant", (1, 1, 9, 9)))})
    assert open_dataset(tmp_path, "train").class_names == ("ant", "cube", "zebra")  # whatever the split has
    (tmp_path / "classes.txt").write_text("zebra\ncube\n\nyak\n")
    data = open_dataset(tmp_path, "train")
    assert data.class_names == ("zebra", "cube", "yak")
    assert data[0][1]["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>", "<size/>"])
def test_sizes_that_are_not_stated_are_those_of_the_files(tmp_path, size):
    data = open_dataset(write(tmp_path, files={"7": xml(BALL, size=size)}), "train")
    assert data[0][1]["original_size"] == (30, 40)


@pytest.mark.parametrize("encoding", ["gb2312", "GBK", "shift_jis", "cp1252", "ISO-8859-1", "utf-16", "utf-8"])
def test_encodings(tmp_path, encoding):
    name = "caf\xe9" if encoding in ("cp1252", "ISO-8859-1") else "\u732b"
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n{xml((name, (1, 1, 9, 9)))}'
    data = open_dataset(write(tmp_path, files={"7": text.encode(encoding)}), "train")
    assert data.class_names == tuple(sorted([name, "cube"]))


def test_files_of_other_splits_are_parsed_once(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(voc, "parse", lambda path, parse=voc.parse: parsed.append(path.stem) or parse(path))
    write(tmp_path, listed="9")
    for split in ("train", "val"):
        assert open_dataset(tmp_path, split).class_names == ("ball", "cube")
    assert sorted(parsed) == ["7", "9", "9", "9"]
    write(tmp_path, files={"7": xml(("owl", (1, 1, 9, 9)))}, listed="9")
    assert open_dataset(tmp_path, "train").class_names == ("cube", "owl")


def test_classes_that_differ_by_case_alone_are_told(tmp_path, caplog):
    things = [(name, (1, 1, 9, 9)) for name in ("Ball", "BALL ", "CUBE 2")]
    data = open_dataset(write(tmp_path, files={"7": xml(BALL, *things)}), "train")
    assert data.class_names == ("BALL", "Ball", "CUBE 2", "ball", "cube")
    assert "the classes 'BALL', 'Ball', 'ball' differ by case or spaces alone, and are learnt as" in caplog.text
    assert "CUBE" not in caplog.text


def test_why_no_annotation_file_can_be_read(tmp_path):
    write(tmp_path, files={"7": "<annotation>", "9": "<annotation>"})
    with pytest.raises(KDError, match=r"no annotation file can be read; the first is .*7.xml: line 1: not valid XML"):
        open_dataset(tmp_path, "train")


def test_the_image_has_the_name_of_the_annotation_file(tmp_path):
    write(tmp_path, files={"7": xml(BALL, file_name="renamed since.jpg"), "9": xml(WHOLE, file_name="9.png")})
    assert len(open_dataset(tmp_path, "train")) == 2
    (tmp_path / "JPEGImages" / "7.png").rename(tmp_path / "JPEGImages" / "renamed since.jpg")
    assert open_dataset(tmp_path, "train").coco()["images"][0]["file_name"] == "renamed since.jpg"


def test_an_image_has_one_annotation_file(tmp_path):
    write(tmp_path, files={"9": xml(WHOLE, file_name="7.png")})
    (tmp_path / "JPEGImages" / "9.png").unlink()
    with pytest.raises(
        KDError, match=r"Annotations/9.xml: Annotations/7.xml has the same image, .*; merge the two files"
    ):
        open_dataset(tmp_path, "train")


def test_of_two_images_of_a_name_the_filename_chooses(tmp_path):
    write(tmp_path, files={"7": xml(BALL, file_name="7.bmp")})
    Image.fromarray(pixels(5)).save(tmp_path / "JPEGImages" / "7.bmp")
    assert np.array_equal(open_dataset(tmp_path, "train")[0][0].permute(1, 2, 0).numpy(), pixels(5))
    write(tmp_path, files={"7": xml(BALL)})
    with pytest.raises(KDError, match=r"JPEGImages has 7.bmp and 7.png; keep one of them"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize("listed", ["7\n\n9", "  7\r\n9  \r\n", "7.png\n9.PNG\n", "\ufeff7\n9"])
def test_lists(tmp_path, listed):
    assert [len(each) for each in boxes(open_dataset(write(tmp_path, listed=listed), "train"))] == [1, 1]


def test_names_may_have_folders(tmp_path):
    write(tmp_path, listed="sub/7\n9")
    for folder, name in (("Annotations", "7.xml"), ("JPEGImages", "7.png")):
        (tmp_path / folder / "sub").mkdir()
        (tmp_path / folder / name).rename(tmp_path / folder / "sub" / name)
    assert open_dataset(tmp_path, "train").coco()["images"][0]["file_name"] == "sub/7.png"


def test_what_is_marked_to_be_ignored_is_a_crowd(tmp_path):
    things = [("ball", (1, 1, 9, 9), f"<ignore>{flag}</ignore>") for flag in ("1", "0", "")]
    data = open_dataset(write(tmp_path, files={"7": xml(*things)}), "train")
    assert [a["iscrowd"] for a in data.coco()["annotations"]] == [1, 0, 0, 0]


def test_parts_of_objects_are_no_objects(tmp_path):
    part = f"<part>{thing('head', (1, 1, 5, 5))}<name>head</name></part>"
    assert len(boxes(open_dataset(write(tmp_path, files={"7": xml((*BALL, part))}), "train"))[0]) == 1


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>'

# What is left out with `on_bad="skip"`: (text of 7.xml, message, boxes that are left in it; None: no image is left).
BAD = {
    "no XML": ("{}", r"Annotations/7.xml: line 1: not valid XML \(not well-formed", None),
    "empty": ("", r"line 1: not valid XML \(no element found\)", None),
    "cut short": (xml(BALL)[:-10], "not valid XML", None),
    "a bomb": (BOMB + xml(("&b;", (1, 1, 9, 9))), "a document type .* is not read; delete it", None),
    "another file": (OUTSIDE + xml(("&a;", (1, 1, 9, 9))), "a document type .* is not read; delete it", None),
    "an undefined entity": (xml(("&a;", (1, 1, 9, 9))), r"not valid XML \(undefined entity\)", None),
    "another root": ("<html/>", r"the file holds <html>; VOC's format is <annotation>", None),
    "an unknown encoding": ('<?xml version="1.0" encoding="klingon"?><annotation/>', "7.xml: .*(encoding|read)", None),
    "bytes of no encoding": (b"<annotation>\xff</annotation>", r"not valid XML", None),
    "another size": (
        xml(BALL, size="<size><width>41</width><height>30</height></size>"),
        "image JPEGImages/7.png: the file is 40x30, the XML says 41x30",
        None,
    ),
    "a size in words": (
        xml(BALL, size="<size><width>wide</width><height>30</height></size>"),
        "width and height must be positive integers, not 'wide' and '30'",
        None,
    ),
    "a negative size": (
        xml(BALL, size="<size><width>-40</width><height>30</height></size>"),
        "width and height must be positive integers",
        None,
    ),
    "more pixels than are read": (
        xml(BALL, size="<size><width>40000</width><height>40000</height></size>"),
        "40000x40000 are more than the 500 million pixels",
        None,
    ),
    "the filename of another image": (
        xml(BALL, file_name="9.png"),
        "its filename is 9.png, but JPEGImages has 7.png as well",
        None,
    ),
    "no box": (
        xml(BALL, ("ball", (1, 2, 3, ""))),
        r"Annotations/7.xml, line 5: bndbox must have four finite numbers xmin, ymin, xmax, ymax",
        1,
    ),
    "NaN": (xml(("ball", (1, 2, 3, "nan"))), "bndbox must have four finite numbers", 0),
    "infinity": (xml(("ball", ("inf", 2, 3, 4))), "bndbox must have four finite numbers", 0),
    "words": (xml(("ball", ("left", 2, 3, 4))), "bndbox must have four finite numbers .*'left'", 0),
    "corners exchanged": (xml(BALL, ("ball", (20, 2, 10, 9))), r"bndbox \[20, 2, 10, 9\] has no area", 1),
    "x, y, width, height": (xml(("ball", (20, 20, 10, 9))), "has no area", 0),
    "outside": (xml(("ball", (50, 2, 60, 9))), "lies outside the image of 40x30; xmin, ymin, xmax and ymax", 0),
    "beyond the edge": (xml(("ball", (30, 2, 43, 9))), "reaches 3 px beyond the image of 40x30", 0),
    "no name": (xml(BALL, ("", (1, 2, 3, 4))), "the object's name is '', which is none of ball, cube", 1),
    "a terminal's command as name": (
        xml(BALL, ("\x7fball", (1, 2, 3, 4))),
        r"name is '\\x7fball', which is none of",
        1,
    ),
    "ignore in words": (
        xml(BALL, ("ball", (1, 2, 3, 4), "<ignore>yes</ignore>")),
        "ignore must be 0 or 1, not 'yes'",
        1,
    ),
    "difficult in words": (
        xml(BALL, ("ball", (1, 2, 3, 4), "<difficult>very</difficult>")),
        "difficult must be 0 or 1, not 'very'",
        1,
    ),
}


@pytest.mark.parametrize(("text", "message", "left"), BAD.values(), ids=BAD)
def test_bad_entries_are_named_or_left_out(tmp_path, caplog, text, message, left):
    write(tmp_path, files={"7": text})
    (tmp_path / "classes.txt").write_text("ball\ncube")
    with pytest.raises(KDError, match=message) as error:
        open_dataset(tmp_path, "train")
    head, fault, *_ = str(error.value).splitlines()
    assert head == f"{tmp_path}/ImageSets/Main/train.txt: 1 fault:"
    assert "7." in fault
    with caplog.at_level(logging.WARNING):
        data = open_dataset(tmp_path, "train", on_bad="skip")
    assert re.search(message, caplog.text)
    assert [len(each) for each in boxes(data)] == ([1] if left is None else [left, 1])


LISTED = {
    "no such file": ("none\n9", "Annotations/none.xml: there is no such file; delete the name from the list"),
    "a climb": ("../7\n9", r"'../7' leads out of the data set, or is no text; correct the name"),
    "absolute": ("/etc/passwd\n9", "'/etc/passwd' leads out of the data set"),
    "another drive": ("C:7\n9", "'C:7' leads out of the data set"),
    "twice": ("9\n9", "9 is listed twice; list it once"),
    "control characters": ("\x1b[2J\n9", r"'\\x1b\[2J' leads out of the data set, or is no text"),
    "a name without end": ("x" * 5000 + "\n9", "the file cannot be read"),
}


@pytest.mark.parametrize(("listed", "message"), LISTED.values(), ids=LISTED)
def test_bad_names_in_lists(tmp_path, listed, message):
    write(tmp_path, listed=listed)
    with pytest.raises(KDError, match=message):
        open_dataset(tmp_path, "train")
    assert len(open_dataset(tmp_path, "train", on_bad="skip")) == 1


def test_file_names_that_lead_out_are_refused(tmp_path):
    for file_name in ("../../7.png", str(tmp_path / "JPEGImages" / "9.png"), "C:\\7.png"):
        write(tmp_path, files={"8": xml(BALL, file_name=file_name)}, listed="8\n9")
        with pytest.raises(KDError, match=r"leads out of .*JPEGImages; an image has the name of its XML file"):
            open_dataset(tmp_path, "train")
    write(tmp_path, files={"8": xml(BALL)}, listed="8\n9")
    with pytest.raises(KDError, match="JPEGImages has no image 8, and the file has no filename"):
        open_dataset(tmp_path, "train")


def test_what_cannot_be_used_at_all(tmp_path):
    write(tmp_path)
    with pytest.raises(
        KDError, match=r"there is no file .*test.txt \(but of train, val\). Expected are lists of names"
    ):
        open_dataset(tmp_path, "test")
    for text, message in (("ball\nball", "'ball' is there twice"), (b"\xff", "classes.txt is not text in UTF-8")):
        (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(KDError, match=message):
            open_dataset(tmp_path, "train")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(KDError, match=r"train.txt has no usable annotation of ball, cube"):
        open_dataset(write(tmp_path, files={"7": xml(CROWD), "9": xml(), "8": xml(BALL)}), "train")
    with pytest.raises(KDError, match=r"train.txt lists no usable image"):
        open_dataset(write(tmp_path, listed=""), "train")
    with pytest.raises(KDError, match=r"has no object with a name, and there is no list .*classes.txt"):
        open_dataset(write(tmp_path / "empty", files={"7": xml(), "9": xml()}), "train")
    for path in (tmp_path / "JPEGImages").iterdir():
        path.unlink()
    (tmp_path / "JPEGImages").rmdir()
    with pytest.raises(KDError, match=r"there is no folder .*JPEGImages. Expected are"):
        open_dataset(tmp_path, "train")


def test_linked_folders_are_read(tmp_path):
    write(tmp_path, listed="sub/7\nsub/9")
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).rename(tmp_path / f"away_{folder}")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sub").symlink_to(tmp_path / f"away_{folder}")
    data = open_dataset(tmp_path, "train")
    assert data.class_names == ("ball", "cube")
    assert [image["file_name"] for image in data.coco()["images"]] == ["sub/7.png", "sub/9.png"]
