"""The suites of published recipes: they can be read, and their recipes fit the students that they are for."""

from pathlib import Path

import pytest
from torch.nn.modules.batchnorm import _BatchNorm

from kdtoolkit import Distiller
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.engine.optim import build_optimizer, frozen
from kdtoolkit.models import build_model

FOLDER = Path(__file__).parents[2] / "benchmarks" / "suites" / "published"
SUITES = ("detr", "fcos", "gfl", "retinanet")


def test_there_is_a_suite_for_each_published_recipe():
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.yaml"))) == SUITES


@pytest.mark.parametrize("name", SUITES)
def test_published_suites_are_valid(name):
    suite = load_suite(str(FOLDER / f"{name}.yaml"))
    assert suite.name == f"published-{name}"
    assert suite.student.train.input_size.long == suite.data.image_size == 1333
    assert suite.student.train.input_size.crop == (0.5 if name == "detr" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_published_recipes_fit_their_students(name):
    section = load_suite(str(FOLDER / f"{name}.yaml")).student
    args = {key: value for key, value in section.args.items() if "pretrained" not in key}
    if name == "detr":
        args["use_pretrained_backbone"] = False
    student = build_model(section.model, 80, args)
    distiller = Distiller(None, student)
    with frozen(student, section.train) as set_training:
        set_training(distiller)
        optimizer = build_optimizer(distiller, section.train)
        groups = {(round(group["peak"], 9), group["weight_decay"]) for group in optimizer.param_groups}
        trained = {name for name, p in student.named_parameters() if p.requires_grad}
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    assert not any(norm.training for norm in norms)
    assert not any("backbone.layer1" in name for name in trained)
    assert any("layer2" in name for name in trained)
    expected = {
        "fcos": {(0.01, 1e-4), (0.02, 0.0)},
        "detr": {(1e-4, 1e-4), (1e-5, 1e-4)},
    }
    assert sorted(groups) == sorted(expected.get(name, {(0.01, 1e-4)}))
