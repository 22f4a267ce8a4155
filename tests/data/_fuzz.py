"""Spoilt data sets of each format: what a reader must either read or refuse in words.

`benchmarks/reliability/fuzz_readers.py` runs the same for minutes.
"""

import json
import re
import unicodedata
from pathlib import Path

import torch
from hypothesis import strategies as st

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from tests.data import _coco, _voc, _yolo

LIST = "images/train/7.png\n./images/train/9.png\n"
XML = _voc.xml(_voc.BALL, (*_voc.CROWD[:2], "<difficult>1</difficult>"), file_name="7.png")

# By format: what writes the good data set, and its files of text.
FORMS = {
    "COCO": (_coco.write, {"annotations/train.json": json.dumps(_coco.document(), indent=0)}),
    "YOLO": (
        _yolo.write,
        {
            "data.yaml": "path: .\ntrain: [images/train]\nval: train.txt\nnc: 2\nnames: {0: ball, 1: cube}\n",
            "labels/train/7.txt": f"{_yolo.BALL}\n0 0.25 0.2 0.5 0.2 0.5 0.6\n",
            "train.txt": LIST,
        },
    ),
    "VOC": (
        _voc.write,
        {"Annotations/7.xml": XML, "ImageSets/Main/train.txt": "7\n9\n", "classes.txt": "ball\ncube\n"},
    ),
}
SPLITS = {"COCO": ["train"], "YOLO": ["train", "val"], "VOC": ["train"]}

NUMBERS = [
    *("0", "-1", "1", "2", "0.5", "1e-9", "1e300", "-1e300", "nan", "inf", "-inf", "7.0", "29.9999999", "40.5"),
    *("9" * 400, "18446744073709551616", "0x10", "1_0", "1,5", "١", ""),
]
WORDS = [
    *(
        "null",
        "true",
        "no",
        "[]",
        "{}",
        "[[]]",
        "ball",
        "9.png",
        "../7",
        "..",
        "/etc/passwd",
        "C:\\x",
        "~",
        "a/b",
        "\\",
    ),
    *(
        '"\\ud800"',
        '"\\u0000"',
        "\x00",
        "\x1b[2J",
        "\ufeff",
        "\u202e",
        "é",
        "e\u0301",
        "<",
        ">",
        "&",
        "&b;",
        "]]>",
        "*",
    ),
    *(
        "<!DOCTYPE a>",
        "<!--",
        "<object/>",
        "</object>",
        "<name>ball</name>",
        "&#0;",
        "<?xml version='1.0' encoding='x'?>",
    ),
    *(
        "&a [*a]",
        "!!python/name:os.system",
        "kpt_shape: [1, 2]\n",
        "path: /\n",
        "<<: *a",
        "- ",
        "? ",
        "\t",
        "\r",
        "\n\n",
    ),
]
VALID = {  # what leaves the syntax of a format whole, so that the checks behind the parser are reached
    "COCO": [
        *("0", "-1", "7", "3", "1e-9", "1e300", "40.5", "7.0", "null", "true", "[]", "{}", '""', '"9.png"', '"../7"')
    ],
    "YOLO": [
        "0",
        "1",
        "-1",
        "2",
        "0.5",
        "1e-9",
        "1e300",
        "nan",
        "-inf",
        "7.0",
        "x",
        "0.1 0.2",
        "images",
        "..",
        "0.5\n1",
    ],
    "VOC": [
        "0",
        "1",
        "-1",
        "2",
        "7",
        "9",
        "40.5",
        "1e-9",
        "nan",
        "ball",
        "cube",
        "x",
        "size",
        "name",
        "object",
        "9.png",
    ],
}
BOUNDARY = re.compile(r"""[^\s\[\]{}<>",:/]+|[\[\]{}<>",:/]""")


def changes(form: str) -> st.SearchStrategy[tuple[list, list]]:
    """Changes of words and of bytes: which file; where, as a share of it; how much goes; what comes instead."""
    valid = st.tuples(st.integers(0, 2), st.floats(0, 1), st.just(1), st.sampled_from(VALID[form]))
    any_token = st.sampled_from([*NUMBERS, *WORDS]) | st.text(max_size=4)
    any_change = st.tuples(st.integers(0, 2), st.floats(0, 1), st.integers(0, 3) | st.integers(0, 60), any_token)
    of_bytes = st.tuples(st.integers(0, 2), st.floats(0, 1), st.integers(0, 30), st.binary(max_size=6))
    return st.one_of(
        st.tuples(st.lists(valid, min_size=1, max_size=3), st.just([])),
        st.tuples(st.lists(valid | any_change, min_size=1, max_size=3), st.just([])),
        st.tuples(st.lists(valid, max_size=1), st.lists(of_bytes, min_size=1, max_size=2)),
    )


def spoilt(texts: dict[str, str], words_and_bytes: tuple[list, list]) -> dict[str, bytes]:
    """The files with words, then bytes, replaced."""
    names = list(texts)
    of_words, of_bytes = words_and_bytes
    for index, place, count, token in of_words:
        name = names[index % len(names)]
        words = list(BOUNDARY.finditer(texts[name]))
        if words:
            first = min(int(place * len(words)), len(words) - 1)
            end = words[min(first + count, len(words)) - 1].end() if count else words[first].start()
            texts = {**texts, name: texts[name][: words[first].start()] + token + texts[name][end:]}
    files = {name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()}
    for index, place, count, piece in of_bytes:
        name = names[index % len(names)]
        start = int(place * len(files[name]))
        files[name] = files[name][:start] + piece + files[name][start + count :]
    return files


def check(form: str, root: Path, files: dict[str, bytes], on_bad: str) -> dict[str, int]:
    """Open the data set with these files: how many splits were read, and how many refused."""
    for name, content in files.items():
        (root / name).write_bytes(content)
    outcome = {"read": 0, "refused": 0}
    for split in SPLITS[form]:
        try:
            data = open_dataset(root, split, on_bad=on_bad).in_memory()
            data.fingerprint()
        except KDError as error:
            text = str(error)
            assert not any(unicodedata.category(c) == "Cc" for c in text.replace("\n", "")), text
            assert len(text) < 5000
            outcome["refused"] += 1
            continue
        for image, sample in (data[i] for i in range(len(data))):
            boxes = sample["boxes"]
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
            assert ((sample["labels"] >= 0) & (sample["labels"] < len(data.class_names))).all()
        json.dumps(data.coco(), allow_nan=False).encode()
        outcome["read"] += 1
    return outcome
