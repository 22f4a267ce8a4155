"""Weights from files (kdtoolkit/weights.py)."""

import pytest
import torch
from safetensors.torch import save_file

from kdtoolkit import Distiller
from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.detectors import GFL, load_published
from kdtoolkit.errors import KDError
from kdtoolkit.methods import PKD
from kdtoolkit.weights import load_weights, read_weights
from tests.conftest import TINY, tiny_of

ARGS = {**TINY, "backbone_args": {"channels": (8, 8, 16, 16), "stem_width": 4}, "head_channels": 16}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_from_plain_files(tmp_path, suffix):
    build = DenseAdapter.examples()["GFL"]
    trained, fresh, path = build(3), build(3), tmp_path / f"weights{suffix}"
    state = {key: value.contiguous() for key, value in trained.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    load_weights(fresh, path)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in state.items())
    with pytest.raises(
        KDError, match=r"are for 3 classes, and this GFL has 4 .*: build it with num_classes=3 \(--classes 3\)"
    ):
        load_weights(build(4), path)


def tiny(**changes):
    return GFL(3, **{**ARGS, "bins": 5, **changes})


def saved(content, folder):
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


@pytest.fixture(scope="module")
def trained():
    return {key: value + 1 for key, value in tiny().state_dict().items()}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def zeros(state):
    return {key: value * 0 for key, value in state.items()}


WRAPPED = {
    "without counters": lambda w: {k: v for k, v in w.items() if not k.endswith("num_batches_tracked")},
    "DataParallel": lambda w: prefixed(w, "module."),
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled in part": lambda w: {k.replace("backbone.", "backbone._orig_mod."): v for k, v in w.items()},
    "both": lambda w: {"model_state_dict": prefixed(w, "module._orig_mod."), "epoch": 3},
    "another project's": lambda w: {"state_dict": prefixed(w, "architecture."), "optimizer": {"state": {0: {"m": w}}}},
    "beside a larger teacher": lambda w: {
        "state_dict": {**prefixed(w, "student."), "teacher.backbone.bn1.weight": torch.ones(3)}
    },
    "moving average": lambda w: {"model": zeros(w), "ema": {"module": w, "updates": 5}, "scaler": {"scale": 2.0}},
    "moving average of torch": lambda w: {"n_averaged": torch.tensor(4), **prefixed(w, "module.")},
    "moving average of timm": lambda w: {"state_dict": zeros(w), "state_dict_ema": w},
    "another name of it": lambda w: {"model": zeros(w), "averaged_model": prefixed(w, "module.")},
    "averages exchanged": lambda w: {
        "state_dict": w, "ema_state_dict": {**prefixed(zeros(w), "module."), "steps": torch.tensor(4)}
    },
    "means of losses beside it": lambda w: {"model": w, "loss_avg": {"cls": torch.tensor(1.0)}},
    "a moving average and means beside it": lambda w: {
        "ema": w, "loss_average": {"cls": torch.tensor(1.0)}, "model": zeros(w)
    },
    "a moving average and means alone": lambda w: {"ema": w, "loss_average": {"cls": torch.tensor(1.0)}},
    "moving average of Lightning": lambda w: {
        "state_dict": {**prefixed(zeros(w), "model."), **prefixed(w, "model_ema.module.")}
    },
    "moving average of Lightning, without counters": lambda w: {"state_dict": {
        **prefixed(zeros(w), "model."), "ema_model.n_averaged": torch.tensor(3),
        **prefixed({k: v for k, v in w.items() if not k.endswith("num_batches_tracked")}, "ema_model.module."),
    }},
    "moving average beside bare names": lambda w: {**zeros(w), **prefixed(w, "ema.")},
    "averages exchanged, under names without points": lambda w: {
        "state_dict": {**w, **{f"ema_{k.replace('.', '_')}": v * 0 for k, v in w.items()}}
    },
    "random state beside it": lambda w: {"net": w, "rng": {"torch": torch.zeros(3)}},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_state_dicts_load_as_training_scripts_leave_them(name, trained, tmp_path):
    path, fresh, native = saved(WRAPPED[name](trained), tmp_path), tiny(), tiny()
    load_weights(fresh, path)
    load_published(native, path)
    for key, value in trained.items():
        if "without counters" not in name or not key.endswith("num_batches_tracked"):
            assert torch.equal(fresh.state_dict()[key], value), key
            assert torch.equal(native.state_dict()[key], value), key


def test_the_student_of_a_distillers_state_dict_loads(tmp_path):
    student, fresh = tiny(neck_channels=8), tiny(neck_channels=8)
    distiller = Distiller(tiny(), student, [PKD()])
    load_weights(fresh, saved(distiller.state_dict(), tmp_path))
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda w: {**prefixed(w, "a."), **prefixed(w, "b.")},
            r"weights of GFL more than once, behind 'a\.' and 'b\.'",
        ),
        (lambda w: {"first": w, "second": w}, r"several state dicts \(first, second\): save only the one"),
        (lambda w: {"epoch": 3, "args": "x"}, r"holds no state dict, but a dict of epoch, args: save"),
        (lambda w: {"encoder.weight": torch.ones(2)}, "holds no weights of GFL: it has encoder.weight, and GFL has"),
        (lambda w: {**w, "more": torch.ones(2)}, r"do not fit GFL: 1 unknown: more\. Build"),
        (
            lambda w: {**w, "scales": torch.ones(5)},
            r"1 of a different shape: scales \(needs \(3,\), is \(5,\)\)\. Build",
        ),
        (lambda w: {k: v for k, v in w.items() if k != "scales"}, r"do not fit GFL: 1 missing: scales\. Build"),
    ],
)
def test_weights_that_do_not_fit_are_explained(content, message, trained, tmp_path):
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KDError, match=message):
        load_weights(model, saved(content(trained), tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "family", ["GFL", "RetinaNet", "torchvision RetinaNet", "torchvision SSD", "torchvision Faster R-CNN"]
)
def test_other_class_counts_are_named_as_such(family, tmp_path):
    path = saved(tiny_of(family, seed=0, num_classes=7).state_dict(), tmp_path)
    with pytest.raises(KDError, match=r"are for 7 classes, and this .* has 4 "):
        load_weights(tiny_of(family, seed=0, num_classes=4), path)


def test_other_sizes_are_not_taken_for_class_counts(tmp_path):
    path = saved(GFL(4, **ARGS, bins=17).state_dict(), tmp_path)
    with pytest.raises(KDError, match=r"2 of a different shape: predictors\.reg\.weight"):
        load_weights(GFL(4, **ARGS, bins=5), path)


class Sprung:
    def __reduce__(self):
        return (print, ("run",))


def test_unusable_files_are_explained(tmp_path, capsys):
    torch.save({"state_dict": {}, "meta": Sprung()}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "model.onnx").write_text("a graph")
    for name, message in {
        "code.pth": "holds Python objects",
        "text.pth": "damaged",
        "text.safetensors": "cannot be read",
        "list.pth": "no state dict",
        "model.onnx": "is an exported file, which runs without kdtoolkit .*: name the run or the weights",
        "absent.pth": "there is no weights file",
    }.items():
        with pytest.raises(KDError, match=message) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value)
    assert "run" not in capsys.readouterr().out
