"""What a run says of loss terms that teach nothing and of parts that have died, and what it leaves unsaid."""

import pytest
import torch
from torch import nn

from kdtoolkit import Distiller, Losses
from kdtoolkit.data import DetectionDataset, ProceduralShapes
from kdtoolkit.engine.diagnose import DeadParts, SilenceDetector
from kdtoolkit.engine.train import TrainConfig, train
from kdtoolkit.methods import LD, DeFeat, LogitKD
from tests.conftest import tiny_gfl, tiny_of

TERMS = ("ld/main", "logitkd/cls", "defeat/object")


class FewBoxes(DetectionDataset):
    """Images of which only the first have a box."""

    class_names = ("thing", "other")

    def __init__(self, count, with_box):
        self.count = count
        self.with_box = with_box

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        boxes = torch.tensor([[10.0, 10, 40, 30]] * (index < self.with_box)).view(-1, 4)
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        return pixels, {"boxes": boxes, "labels": labels, "image_id": index, "original_size": (64, 64)}

    def coco(self):
        raise NotImplementedError  # nothing is scored

    def fingerprint(self):
        return "few boxes"


def distilled(data, steps, methods, **changes):
    teacher, student = (tiny_gfl(seed=seed, num_classes=2) for seed in (1, 2))
    seen = []
    config = TrainConfig(**{"steps": steps, "batch_size": 2, **changes})
    result = train(Distiller(teacher, student, methods), data, config, seed=2, report=seen.append)
    return result, [warning for progress in seen for warning in progress.warnings]


def test_terms_of_objects_are_not_called_silent_while_images_have_no_boxes():
    result, told = distilled(FewBoxes(40, 2), 40, [LD(), LogitKD(), DeFeat()])
    first, last = result.history[0], result.history[-1]
    assert all(first[term] == 0 for term in TERMS)
    assert first["step"] < 5 < last["step"]
    assert all(sum(point[term] for point in result.history) > 0 for term in TERMS)
    assert result.warnings == told == []


def test_a_run_without_a_box_says_so_and_nothing_else():
    result, _ = distilled(FewBoxes(4, 0), 6, [LD()])
    assert result.warnings == ["none of the images of the 6 steps has a box: the student has seen background alone"]


def test_a_term_that_vanishes_in_every_step_is_told_at_the_end():
    result, told = distilled(FewBoxes(4, 4), 7, [LD(weight=0.0), DeFeat()])
    assert told == []
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("loss term ld/main is exactly zero in each of the first 5 steps with boxes")
    assert result.warnings[0].endswith("and never since: this term teaches the student nothing")


def test_a_term_of_the_students_own_may_be_zero():
    student = nn.Linear(1, 1)
    silence = SilenceDetector(student)
    for _ in range(6):
        zero = 0 * student(torch.ones(1, 1)).sum()
        silence.observe(Losses({"task/aux": zero, "kd/term": zero}), {"task/aux": 0.0, "kd/term": 0.0})
    for final in (False, True):
        assert [warning[:33] for warning in silence.warnings(final=final)] == ["loss term kd/term is exactly zero"]


def fcos(*, steps=12, before=False, after_one_step=False):
    """Train torchvision's FCOS; its box sides are made 0 everywhere, as a blow-up of its first steps does."""
    student = tiny_of("torchvision FCOS", seed=0, num_classes=6)
    bias = student.head.regression_head.bbox_reg.bias

    def kill(progress):
        if progress.step == 1:
            nn.init.constant_(bias, -1000.0)

    if before:
        nn.init.constant_(bias, -1000.0)
    config = TrainConfig(steps=steps, batch_size=2, lr=1e-3, warmup_steps=0)
    data = ProceduralShapes(16, image_size=64, seed=0)
    result = train(Distiller(None, student), data, config, seed=0, report=kill if after_one_step else None)
    return student, result


def test_a_head_that_dies_is_named():
    student, result = fcos(after_one_step=True)
    assert result.history[-1]["task/bbox_regression"] == pytest.approx(1)
    assert not student.head.regression_head.bbox_reg.weight.grad.any()
    assert len(result.warnings) == 1
    assert "student's head.regression_head.bbox_reg has been exactly 0 since step 2" in result.warnings[0]
    assert "Lower lr or lengthen warmup_steps" in result.warnings[0]
    assert fcos()[1].warnings == []


def test_a_head_that_was_dead_at_the_start_is_named_by_its_loss_term():
    _, result = fcos(steps=6, before=True)
    reason = "has no gradient to the student in each of the first 5 steps in which it is above zero"
    assert [warning.partition(", and")[0] for warning in result.warnings] == [
        f"loss term task/bbox_regression {reason}"
    ]


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "norm": nn.PReLU()})
        self.levels = nn.ModuleList([nn.PReLU(), nn.PReLU()])


def watched(*steps, patience=2):
    """What is said after steps: the parameters with a gradient in each, and whether its images had boxes."""
    letters = {
        "w": "a.conv.weight",
        "b": "a.conv.bias",
        "n": "a.norm.weight",
        "0": "levels.0.weight",
        "1": "levels.1.weight",
    }
    parts = Parts()
    assert set(letters.values()) == {name for name, _ in parts.named_parameters()}
    names = [*(f"student.{name}" for name in letters.values()), "methods.0.projection.weight"]
    dead = DeadParts(parts, names, patience, torch.device("cpu"))
    for alive, has_boxes in steps:
        dead.observe(torch.tensor([float(letter in alive) for letter in [*letters, "m"]]), has_boxes)
    return [warning.partition(" has been")[0].rpartition("student's ")[2] for warning in dead.warnings()]


def test_the_largest_part_all_of_whose_parameters_are_dead_is_named():
    everything, boxes = ("wbn01m", True), True
    assert watched(everything, ("01", boxes), ("01", boxes)) == ["a"]
    assert watched(everything, ("n01", boxes), ("n01", boxes)) == ["a.conv"]
    assert watched(everything, ("bn01", boxes), ("bn01", boxes)) == []  # a bias learns on
    assert watched(everything, ("", boxes), ("", boxes)) == ["every parameter"]


def test_one_head_of_several_levels_may_get_no_object_for_long():
    everything, boxes = ("wbn01m", True), True
    assert watched(everything, ("wbn0", boxes), ("wbn0", boxes)) == []
    assert watched(everything, ("wbn", boxes), ("wbn", boxes)) == ["levels"]


def test_a_layer_of_one_head_is_not_dead_while_that_of_another_head_learns():
    heads = nn.ModuleList(nn.Sequential(nn.PReLU(), nn.PReLU()) for _ in range(2))
    names = [f"student.{name}" for name, _ in nn.ModuleDict({"heads": heads}).named_parameters()]
    for second_layers, expected in (([1.0, 0.0], []), ([0.0, 0.0], ["heads.0.1", "heads.1.1"])):
        dead = DeadParts(nn.ModuleDict({"heads": heads}), names, 2, torch.device("cpu"))
        dead.observe(torch.ones(4), True)
        for _ in range(2):
            dead.observe(torch.tensor([1.0, second_layers[0], 1.0, second_layers[1]]), True)
        assert [line.partition(" has been")[0].rpartition("student's ")[2] for line in dead.warnings()] == expected


def test_parts_are_dead_only_after_some_steps_with_boxes_and_if_they_have_lived():
    everything, boxes = ("wbn01m", True), True
    assert watched(everything, ("01", boxes)) == []
    assert watched(everything, ("01", False), ("01", False), ("01", boxes)) == []
    assert watched(everything, ("01", boxes), ("01", boxes), ("w01", boxes)) == ["a.norm"]
    assert watched(("01", boxes), ("01", boxes), ("01", boxes)) == []  # never in use
