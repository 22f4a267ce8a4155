from pathlib import Path

import pytest
import torch
from torch import nn

from kdtoolkit import KDError
from kdtoolkit.data import CocoDetection, ProceduralShapes
from kdtoolkit.detectors import GFL
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.libraries import adapt, adapter_classes
from tests.conftest import tiny_gfl, tiny_of
from tests.data._coco import document, write

SHARED = Path(__file__).parents[3] / "shared" / "data"


class Replay(nn.Module):
    """A detector that knows the answers: gives the ground truth of image after image, as `change` makes it."""

    def __init__(self, data, change=lambda sample: sample):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.data = data
        self.change = change
        self.shown = 0

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        outputs = []
        for image in images:
            pixels, sample = self.data[self.shown]
            assert torch.equal((image * 255).round().byte(), pixels)
            scores = torch.ones(len(sample["labels"]))
            found = {"boxes": sample["boxes"].clone(), "labels": sample["labels"].clone(), "scores": scores}
            outputs.append(self.change(found))
            self.shown += 1
        return outputs


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(40, seed=2)


def test_a_detector_of_other_classes_is_refused_before_it_runs(data):
    with pytest.raises(KDError, match=r"has 91 classes, the data set 6: .* Build the detector for 6 classes"):
        evaluate(tiny_gfl(seed=0, num_classes=91), data)


def test_a_detector_on_another_device_is_told_of(data):
    with pytest.raises(KDError, match="device is cpu, and the model lies on meta: move it there first"):
        evaluate(tiny_gfl(seed=0, num_classes=6).to("meta"), data, device="cpu")


def test_a_list_of_images_is_no_data_set(data):
    with pytest.raises(KDError, match="the data set is a list; it must be a DetectionDataset"):
        evaluate(tiny_gfl(seed=0, num_classes=6), [data[0]])


class Floats(ProceduralShapes):
    """A data set of somebody's own that gives images in [0, 1]."""

    def __getitem__(self, index):
        image, sample = super().__getitem__(index)
        return image.float() / 255, sample


def test_a_data_set_of_floats_is_refused():
    with pytest.raises(
        KDError, match=r"image 0 of procedural shapes is torch.float32 \(3, 96, 96\); .* of uint8, 0 to 255"
    ):
        evaluate(tiny_gfl(seed=0, num_classes=6), Floats(2))


def test_a_torch_device_is_taken_like_its_name():
    images, model = ProceduralShapes(2), tiny_gfl(seed=0, num_classes=6)
    assert evaluate(model, images, device=torch.device("cpu")) == evaluate(model, images)


def test_photos_that_turn_out_broken_are_left_out_where_that_is_asked_for(tmp_path, caplog):
    path = write(tmp_path) / "images" / "7.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    photos = CocoDetection(tmp_path, "train", on_bad="skip")
    assert evaluate(Replay(photos.in_memory()), photos, labels_from=0).images == 1
    assert caplog.text.count("image 7 (7.png): the file cannot be decoded") == 1


def test_the_ground_truth_itself_scores_100(data):
    found = evaluate(Replay(data), data, labels_from=0, batch_size=7)
    assert (found.ap, found.ap50, found.ap75, found.ap_small, found.ap_medium) == (100, 100, 100, 100, 100)
    assert found.ap_large is None  # there is none
    assert found.per_class == dict.fromkeys(data.class_names, 100)
    assert found.images == 40
    assert found.detections == sum(len(data[i][1]["labels"]) for i in range(40))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize("max_size", [None, 200])
@pytest.mark.parametrize("name", ["bccd", "playing-cards", "microcontrollers", "sketch-ui", "chess", "tiny-coco"])
def test_the_ground_truth_of_photos_scores_100_at_any_size(name, max_size):
    photos = CocoDetection(SHARED / name, "val", max_size=max_size).subset(25, seed=0)
    assert evaluate(Replay(photos), photos, labels_from=0).ap == pytest.approx(100)


def test_boxes_of_scaled_images_are_scored_at_the_original_size(tmp_path):
    small = CocoDetection(write(tmp_path), "train", max_size=10)
    assert evaluate(Replay(small), small, labels_from=0).ap == pytest.approx(100)
    assert small[0][0].shape == (3, 8, 10)


def test_shifted_boxes_count_below_their_overlap_only(data):
    def shift(found):
        boxes = found["boxes"]
        boxes[:, [0, 2]] += 0.2 * (boxes[:, 2:3] - boxes[:, 0:1])  # an IoU of 2 / 3 with the truth
        return found

    found = evaluate(Replay(data, shift), data, labels_from=0)
    assert found.ap50 > 99
    assert found.ap75 < 5
    assert found.ap == pytest.approx(40, abs=4)  # at 0.5, 0.55, 0.6 and 0.65 of ten


def test_as_many_detections_of_an_image_and_class_count_as_are_asked_for(data):
    def with_a_better_miss(found):
        away = {**found, "boxes": found["boxes"] + 1000, "scores": found["scores"]}
        right = {**found, "scores": 0.5 * found["scores"]}
        return {key: torch.cat([away[key], right[key]]) for key in found}

    all_of_them = evaluate(Replay(data, with_a_better_miss), data, labels_from=0)
    one = evaluate(Replay(data, with_a_better_miss), data, labels_from=0, max_detections=1)
    assert (all_of_them.max_detections, one.max_detections) == (100, 1)
    assert all_of_them.ap > 30
    assert one.ap == 0


def test_a_class_that_is_never_found_costs_its_share(data):
    def without_rings(found):
        keep = found["labels"] != 4
        return {key: value[keep] for key, value in found.items()}

    found = evaluate(Replay(data, without_rings), data, labels_from=0)
    assert found.per_class["ring"] == 0
    assert found.per_class["gapped ring"] == 100
    assert found.ap == pytest.approx(100 * 5 / 6)


def test_classes_absent_from_the_truth_have_no_ap(tmp_path):
    balls = document()
    balls["annotations"] = balls["annotations"][:1]
    photos = CocoDetection(write(tmp_path, balls), "train")
    assert evaluate(Replay(photos), photos, labels_from=0).per_class == pytest.approx({"ball": 100, "cube": None})


def test_labels_follow_the_chosen_order_of_classes(tmp_path):
    photos = CocoDetection(write(tmp_path), "train", class_names=["cube", "ball"])

    def cubes_only(found):
        keep = found["labels"] == 0
        return {key: value[keep] for key, value in found.items()}

    assert evaluate(Replay(photos, cubes_only), photos, labels_from=0).per_class == pytest.approx(
        {"cube": 100, "ball": 0}
    )


def test_detections_within_a_crowd_are_no_mistakes(tmp_path):
    photos = CocoDetection(write(tmp_path), "train")

    def in_the_crowd(found):
        if 0 in found["labels"]:  # the first image: its crowd of cubes covers the right half
            found["boxes"] = torch.cat([found["boxes"], torch.tensor([[25.0, 5, 35, 15]])])
            found["labels"] = torch.cat([found["labels"], torch.tensor([1])])
            found["scores"] = torch.cat([found["scores"], torch.tensor([1.0])])
        return found

    def beside_it(found):
        found = in_the_crowd(found)
        found["boxes"][1:] -= torch.tensor([20.0, 0, 20, 0])
        return found

    assert evaluate(Replay(photos, in_the_crowd), photos, labels_from=0).per_class["cube"] == pytest.approx(100)
    assert evaluate(Replay(photos, beside_it), photos, labels_from=0).per_class["cube"] < 99


def test_annotations_may_be_numbered_from_0(tmp_path):
    numbered = document()
    for number, annotation in enumerate(numbered["annotations"]):
        annotation["id"] = number
    data = CocoDetection(write(tmp_path, numbered), "train")
    assert evaluate(Replay(data), data, labels_from=0).ap == pytest.approx(100)


def test_no_detection_at_all_scores_0(data):
    found = evaluate(Replay(data, lambda found: {key: value[:0] for key, value in found.items()}), data, labels_from=0)
    assert (found.ap, found.ap50, found.ap_small, found.ap_large, found.detections) == (0, 0, 0, None, 0)


@pytest.mark.parametrize(("key", "value"), [("boxes", float("nan")), ("scores", float("inf"))])
def test_numbers_that_are_not_finite_are_named(data, key, value):
    def spoil(found):
        found[key][:1] = value
        return found

    with pytest.raises(KDError, match=f"gives {key} that are NaN or infinite on image [0-9]+:"):
        evaluate(Replay(data, spoil), data, labels_from=0)


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_the_data_set_does_not_know_are_named(data, label):
    def spoil(found):
        found["labels"][:1] = label
        return found

    with pytest.raises(KDError, match=f"gives the label {label} on image [0-9]+; the data set has labels 0 to 5"):
        evaluate(Replay(data, spoil), data, labels_from=0)


def test_modes_are_restored_also_after_an_error(data):
    model = Replay(data)
    model.train()
    model.norm.eval()  # as for a frozen layer
    evaluate(model, data, labels_from=0)
    assert (model.training, model.norm.training) == (True, False)
    with pytest.raises(IndexError):
        evaluate(model, data, labels_from=0)  # it has shown all images
    assert (model.training, model.norm.training) == (True, False)


def test_nothing_is_printed_and_progress_is_told(data, capsys):
    seen = []
    evaluate(Replay(data), data, labels_from=0, batch_size=16, progress=lambda *counts: seen.append(counts))
    assert seen == [(16, 40), (32, 40), (40, 40)]
    assert capsys.readouterr() == ("", "")


def test_the_data_set_is_not_written_to(tmp_path):
    photos = CocoDetection(write(tmp_path), "train")
    before = repr(photos.coco())
    evaluate(Replay(photos), photos, labels_from=0)
    assert repr(photos.coco()) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_real_detector_can_be_trained_on_afterwards(data, precision):
    model = tiny_gfl(seed=0, num_classes=6)
    few = data.subset(4, seed=0)
    found = evaluate(model, few, precision=precision)
    assert found.images == 4
    assert 0 <= found.ap <= 100
    images = [few[i][0] / 255 for i in range(4)]
    sum(model.train()(images, [few[i][1] for i in range(4)]).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["torchvision FCOS", "torchvision SSD"])
def test_detectors_of_any_library_are_run_through_their_adapter(data, family):
    """Labels count from 0 and boxes are in pixels of the original image, whatever the library's own convention."""
    examples = {name: make for cls in adapter_classes(load=True) for name, make in cls.examples().items()}
    torch.manual_seed(0)
    model = examples[family](len(data.class_names))
    found = evaluate(model, data)
    assert found.ap is not None
    assert found.detections > 0
    assert model.training


def test_labels_of_a_plain_module_count_from_0_or_from_where_it_is_said(data):
    assert evaluate(Replay(data), data).ap == 100

    def from_one(found):
        found["labels"] += 1
        return found

    assert evaluate(Replay(data, from_one), data, labels_from=1).ap == 100
    with pytest.raises(KDError, match=r"gives the label 6 on image [0-9]+; the data set has labels 0 to 5"):
        evaluate(Replay(data, from_one), data, labels_from=0)
    with pytest.raises(KDError, match=r"gives the label 0 on image [0-9]+; the data set has labels 1 to 6"):
        evaluate(Replay(data), data, labels_from=1)


def test_a_teacher_is_measured_at_the_size_at_which_it_teaches(data):
    teacher, student = tiny_of("torchvision FCOS", seed=0, num_classes=6), tiny_gfl(seed=0, num_classes=6)
    teacher.transform.min_size, teacher.transform.max_size = (160,), 160
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    few = data.subset(2, seed=0)
    evaluate(teacher, few)
    alone = seen[-1]
    assert student.training
    evaluate(teacher, few, like=adapt(student))
    assert student.training
    assert (alone, seen[-1]) == ((256, 256), (128, 128))  # both are padded to a multiple of 128


class OwnHead(nn.Module):
    """Another box head, which reads the same pooled features as torchvision's own."""

    def __init__(self, channels, classes):
        super().__init__()
        self.both = nn.Linear(channels, 5 * classes)
        self.classes = classes

    def forward(self, x):
        return self.both(x).split([self.classes, 4 * self.classes], 1)


def test_what_an_adapter_refuses_is_not_taken_for_a_plain_module(data):
    """Its labels count from 1: taken as they are, every class would be scored as the next."""
    model = tiny_of("torchvision Faster R-CNN", seed=0, num_classes=6)
    channels = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = OwnHead(channels, 7)
    few = data.subset(4, seed=0)
    with pytest.raises(KDError, match=r"head.*labels_from=1\) if label 0 is background"):
        evaluate(model, few)
    assert evaluate(model, few, labels_from=1).images == 4


@pytest.mark.parametrize("classes", [5, 91])
def test_another_number_of_classes_is_refused_before_anything_runs(data, classes):
    model = tiny_gfl(seed=0, num_classes=classes)
    model.backbone = None
    with pytest.raises(
        KDError, match=rf"GFL has {classes} classes, the data set 6: .* Build the detector for 6 classes"
    ):
        evaluate(model, data)


def test_adapters_and_devices_are_taken_as_they_come(data):
    few = data.subset(2, seed=0)
    model = tiny_gfl(seed=0, num_classes=6)
    expected = evaluate(model, few)
    assert evaluate(adapt(model), few, device=torch.device("cpu")) == expected
    assert evaluate(model, few, device="cpu", precision="auto").images == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is no device: write 'cpu'"),
        ({"device": "meta"}, "device is meta, and the model lies on cpu"),
        ({"batch_size": 0}, r"batch_size must be at least 1, not 0"),
        ({"max_detections": 0}, r"max_detections must be at least 1, not 0"),
        ({"precision": "bf16"}, "precision is 'auto', 'float32', 'bfloat16' or 'float16', not 'bf16'"),
        ({"labels_from": 2}, "labels_from must be 0 or 1"),
        ({"model": GFL}, "the model must be a detector, an nn.Module"),
        ({"dataset": [(torch.zeros(3, 8, 8), {})]}, "the data set is a list; it must be a DetectionDataset"),
        ({"model": nn.Identity(), "labels_from": 0}, "Identity must return a list with a dict of boxes"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_sentence(data, changes, message):
    arguments = {"model": tiny_gfl(seed=0, num_classes=6), "dataset": data, **changes}
    with pytest.raises(KDError, match=message):
        evaluate(**arguments)
