import pytest
import torch

from kdtoolkit import KDError
from kdtoolkit.data import ProceduralShapes, shapes
from kdtoolkit.data.shapes import CLASS_NAMES


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(300, seed=5)


def everything(data, key):
    return torch.cat([data[i][1][key] for i in range(len(data))])


def test_a_picture_depends_on_seed_and_place_not_on_the_count(data):
    few = ProceduralShapes(3, seed=5)
    for i in range(3):
        assert torch.equal(few[i][0], data[i][0])
        assert torch.equal(few[i][1]["boxes"], data[i][1]["boxes"])
        assert torch.equal(few[i][1]["labels"], data[i][1]["labels"])
    assert not torch.equal(ProceduralShapes(1, seed=6)[0][0], data[0][0])
    assert not torch.equal(data[0][0], data[1][0])


def test_the_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ProceduralShapes(2)[1][0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, ProceduralShapes(2)[1][0])


def test_pictures_kept_in_a_folder_are_the_same_and_drawn_once(data, tmp_path, monkeypatch):
    first = ProceduralShapes(5, seed=5, folder=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []  # nothing is drawn before it is asked for
    assert torch.equal(first[3][0], data[3][0])
    (file,) = (tmp_path / "new").iterdir()
    monkeypatch.setattr(shapes, "_Scene", None)
    again = ProceduralShapes(5, seed=5, folder=tmp_path / "new")
    for i in range(5):
        assert torch.equal(again[i][0], data[i][0])
        assert torch.equal(again[i][1]["boxes"], data[i][1]["boxes"])
        assert torch.equal(again[i][1]["labels"], data[i][1]["labels"])
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:1000])  # a damaged file is drawn again
    assert torch.equal(ProceduralShapes(5, seed=5, folder=tmp_path / "new")[3][0], data[3][0])


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KDError, match=r"cannot write the drawn pictures to .*file"):
        ProceduralShapes(1, folder=tmp_path / "file")[0]


def test_items_are_what_every_data_set_promises(data):
    image, sample = data[0]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 96, 96))
    assert (sample["boxes"].dtype, sample["labels"].dtype) == (torch.float32, torch.int64)
    assert sample["boxes"].shape == (len(sample["labels"]), 4)
    assert sample["original_size"] == (96, 96)
    assert data.class_names == CLASS_NAMES


def test_classes_are_balanced(data):
    shares = everything(data, "labels").bincount(minlength=len(CLASS_NAMES)) / len(everything(data, "labels"))
    assert shares.min() > 0.7 / len(CLASS_NAMES)
    assert shares.max() < 1.3 / len(CLASS_NAMES)


def test_boxes_lie_in_the_picture_and_vary_in_size(data):
    boxes = everything(data, "boxes")
    assert boxes.min() >= 0
    assert boxes.max() <= 96
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    assert sides.min() > 8
    assert sides.max() < 60
    assert sides.quantile(0.9) > 1.7 * sides.quantile(0.1)


def test_numbers_of_objects_vary(data):
    counts = torch.tensor([len(data[i][1]["labels"]) for i in range(len(data))]).bincount()
    assert len(counts) == 7
    assert (counts[1:] > 0.05 * len(data)).all()


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_boxes_are_tight(data, side):
    """Walking into a box, the largest step from one column of pixels to the next is at its edge."""
    steps = []
    for i in range(len(data)):
        image, boxes = data[i][0].float(), data[i][1]["boxes"]
        if side in ("top", "bottom"):
            image, boxes = image.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
        if side in ("right", "bottom"):
            image, boxes = image.flip(2), torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], 1)
        change = (image[:, :, 1:] - image[:, :, :-1]).abs()
        for x1, y1, _, y2 in boxes.round().int().tolist():
            if x1 >= 8:
                steps.append(change[:, y1:y2, x1 - 6 : x1 + 5].mean((0, 1)))  # entry 5 is the step across x1
    profile = torch.stack(steps).mean(0)
    assert profile.argmax() in (5, 6)  # a round side reaches its box with one pixel only
    assert profile[5] > 1.4 * profile[:4].max()


def test_objects_are_labelled_by_how_much_of_them_can_be_seen(data, monkeypatch):
    found = {0.35: data}
    _ = data[0]
    for share in (0.0, 0.99):
        monkeypatch.setattr(shapes, "MIN_VISIBLE", share)
        found[share] = ProceduralShapes(300, seed=5)
        _ = found[share][0]  # drawn now
    assert all(torch.equal(data[i][0], found[0.0][i][0]) for i in range(300))
    counts = [len(everything(found[share], "labels")) for share in (0.0, 0.35, 0.99)]
    assert counts[0] > counts[1] > 1.2 * counts[2]
    assert counts[1] > 0.95 * counts[0]  # few are hidden nearly whole


@pytest.mark.parametrize(("size", "objects"), [(32, 2), (64, 4), (96, 6), (160, 10)])
def test_larger_pictures_have_more_and_larger_objects(size, objects):
    data = ProceduralShapes(60, image_size=size)
    assert data[0][0].shape == (3, size, size)
    assert objects / 2 < max(len(data[i][1]["labels"]) for i in range(60)) <= objects
    boxes = everything(data, "boxes")
    assert (boxes[:, 2:] - boxes[:, :2]).max() <= 2 * 1.2 * size / 4 + 2


def test_ground_truth_in_coco_format_says_the_same(data):
    truth = data.coco()
    assert [c["name"] for c in truth["categories"]] == list(CLASS_NAMES)
    assert [i["id"] for i in truth["images"]] == [data[i][1]["image_id"] for i in range(len(data))]
    assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])
    boxes = torch.tensor([a["bbox"] for a in truth["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    assert torch.allclose(boxes, everything(data, "boxes"))
    assert [a["category_id"] - 1 for a in truth["annotations"]] == everything(data, "labels").tolist()


def test_fingerprint_follows_every_argument():
    prints = [
        ProceduralShapes(*args, **kwargs).fingerprint()
        for args, kwargs in [((2,), {}), ((3,), {}), ((2,), {"seed": 1}), ((2,), {"image_size": 64})]
    ]
    assert len(set(prints)) == 4
    assert prints[0] == ProceduralShapes(2).fingerprint()


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (0, {}, "count must be at least 1, not 0"),
        (1, {"image_size": 16}, "image_size must be at least 32 px, not 16"),
        (1, {"seed": -1}, "seed must not be negative"),
    ],
)
def test_arguments_out_of_range(count, arguments, message):
    with pytest.raises(KDError, match=message):
        ProceduralShapes(count, **arguments)


def test_subsets_are_chosen_by_seed(data):
    few = data.subset(20, seed=3)
    assert len(few) == 20
    ids = [few[i][1]["image_id"] for i in range(20)]
    assert ids == [data.subset(20, seed=3)[i][1]["image_id"] for i in range(20)]
    assert ids != [data.subset(20, seed=4)[i][1]["image_id"] for i in range(20)]
    assert len(set(ids)) == 20
    assert set(ids) <= {data.subset(40, seed=3)[i][1]["image_id"] for i in range(40)}  # more holds fewer
    truth = few.coco()
    assert [i["id"] for i in truth["images"]] == ids
    assert {a["image_id"] for a in truth["annotations"]} <= set(ids)
    assert len(truth["annotations"]) == len(everything(few, "labels"))
    assert few.class_names == data.class_names


def test_subsets_have_fingerprints_of_their_own(data):
    prints = [data.fingerprint(), *(data.subset(20, seed).fingerprint() for seed in (0, 1))]
    assert len(set(prints)) == 3
    assert prints[1] == ProceduralShapes(300, seed=5).subset(20, 0).fingerprint()
    assert data.subset(None, seed=0).fingerprint() == prints[0]


@pytest.mark.parametrize("count", [0, 301])
def test_subsets_no_data_set_can_give(data, count):
    with pytest.raises(KDError, match=f"a subset of {count} images is too large: the data set has 300"):
        data.subset(count, seed=0)
