"""Boards with one seed: intervals over images."""

import gzip
import json

import numpy as np
import pytest

from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.detections_file import detections_path, write_detections
from kdtoolkit.benchmark.resampling import resampled_aps, resamples
from kdtoolkit.benchmark.store import Store, read_result, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, TEACHER
from kdtoolkit.engine.scoring import Found, mean_precision, precisions
from tests.benchmark._suite import made_up, store_result, tiny

IMAGES = 30
ROWS = {TEACHER: 1.0, BASELINE: 4.0, "PKD": 2.0}  # by how many pixels their boxes are wrong


def truth():
    rng = np.random.default_rng(0)
    annotations = []
    for image in range(1, IMAGES + 1):
        for _ in range(3):
            box = [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(20, 40, 2).tolist()]
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            )
    images = [{"id": number, "width": 100, "height": 100} for number in range(1, IMAGES + 1)]
    return {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": annotations}


def detections(wrong):
    rng, objects = np.random.default_rng(1), truth()["annotations"]
    boxes = np.array([each["bbox"] for each in objects]) + wrong * rng.normal(size=(len(objects), 4))
    images = np.array([each["image_id"] - 1 for each in objects])
    return Found(images, np.zeros(len(objects), np.int64), boxes, rng.permutation(len(objects)) / len(objects))


@pytest.fixture
def root(tmp_path):
    """A run with one seed."""
    store = Store(tmp_path / "tiny")
    write_atomic(store.suite_path, tiny(("seeds: 2", "seeds: 1")).to_yaml().encode())
    document = json.dumps({"fingerprint": "the images", "truth": truth()})
    write_atomic(store.ground_truth_path, gzip.compress(document.encode()))
    for row, wrong in ROWS.items():
        path = store.teacher_copy if row == TEACHER else store.result_path(row, 0)
        ap = mean_precision(precisions(truth(), detections(wrong))[..., 0])
        result = made_up(row, 0, ap, fingerprints={"val_data": "the images"}, per_class={"cat": ap})
        write_detections(detections_path(path), detections(wrong), result)
        store_result(path, result)
    return store.root


def row_of(root):
    return next(row for row in build_board(root).rows if row.entry == "PKD")


def test_intervals_are_over_images_and_show_nothing_about_the_method(root):
    counts = resamples(IMAGES, 1000)
    teacher, baseline, pkd = (resampled_aps(truth(), detections(wrong), counts) for wrong in ROWS.values())
    row = row_of(root)
    found = row.versus_baseline
    assert (found.low, found.high) == pytest.approx(np.quantile(pkd - baseline, (0.025, 0.975)), abs=0.05)
    assert 0 < found.low < found.mean < found.high
    assert (found.over, found.p, found.verdict, found.pairs) == ("images", None, "not shown", 1)
    assert row.gap_interval == pytest.approx(
        np.quantile((pkd - baseline) / (teacher - baseline), (0.025, 0.975)), abs=0.01
    )
    assert row.rank is None
    assert found.text == f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] (images)"
    board = build_board(root)
    assert board.pairs["PKD"][BASELINE] == found
    assert f"(95 % interval over images {found.low:+.2f} to {found.high:+.2f}, 1 seed)" in board.claims[0].text
    assert any("An interval over images shows" in warning for warning in board.warnings)


def test_what_was_computed_is_kept_until_the_detections_change(root):
    kept = root / "over_images.json"
    before = row_of(root)
    first = kept.read_bytes()
    assert set(json.loads(first)) == set(ROWS)
    altered = {**json.loads(first), "PKD": {**json.loads(first)["PKD"], "aps": [90.0] * 1000}}
    kept.write_text(json.dumps(altered))
    assert row_of(root).versus_baseline.low > before.versus_baseline.high  # nothing was computed
    path = Store(root).result_path("PKD", 0)
    write_detections(detections_path(path), detections(2.5), read_result(path))
    assert row_of(root).versus_baseline.low < before.versus_baseline.high
    for damaged in ("{", "[]", json.dumps({"PKD": {"key": "", "aps": [1.0]}})):
        kept.write_text(damaged)
        assert row_of(root).versus_baseline.over == "images"


def test_rows_without_detections_or_of_different_images_have_no_interval(root):
    path = Store(root).result_path("PKD", 0)
    store_result(path, made_up("PKD", 0, 20.0, per_class={"cat": 20.0}, fingerprints={"val_data": "the images"}))
    assert row_of(root).versus_baseline.low is not None
    fields = {"per_class": {"cat": 20.0}, "fingerprints": {"val_data": "the images"}}
    store_result(path, made_up("PKD", 0, 20.0, date="2021-01-01", **fields))
    assert row_of(root).versus_baseline.low is None  # the detections are of an earlier training
    store_result(path, made_up("PKD", 0, 20.0, **fields))
    detections_path(path).write_bytes(b"no detections")
    assert row_of(root).versus_baseline.low is None
    detections_path(path).unlink()
    assert row_of(root).versus_baseline.low is None
    Store(root).ground_truth_path.write_bytes(b"no document")
    assert row_of(root).versus_baseline.low is None
