"""`kd distill` with a teacher that shows features alone, and what such a teacher cannot do."""

import io

import pytest
from rich.console import Console

import kdtoolkit
from kdtoolkit.errors import KDError
from kdtoolkit.inspect import inspect_detector, print_inspection, print_pair
from kdtoolkit.libraries import adapt
from kdtoolkit.models import open_detector
from kdtoolkit.workflow.auto import choose, teacher_scale
from tests._foundation import CONVNEXT, DINOV2, DINOV3, foundation, write_weights
from tests.conftest import tiny_gfl
from tests.workflow._data import TINY


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "vit.safetensors")


def distil(shapes, weights, out, **changes):
    words = {"teacher_weights": str(weights), "student_weights": "none", "steps": 2, "batch_size": 4, "quiet": True}
    return kdtoolkit.distill(DINOV3, TINY, shapes, out=out, **words | changes)


def test_the_plan_fits_the_teacher_and_the_report_says_that_it_has_no_ap(shapes, weights, tmp_path, capsys):
    report = distil(shapes, weights, tmp_path / "run", quiet=False)
    assert report.teacher is None
    assert report.ap is not None
    assert report.plan["method"].startswith("Cosine (made for teachers that show features alone")
    assert report.plan["teacher's images"].startswith("0.5 times the student's size (its cells of 16 px are then 32 px")
    assert "it shows features alone" in report.plan["teacher"]
    text = (report.folder / "report.md").read_text()
    assert "The teacher was not measured: it shows features alone" in text
    assert "dinov3-license" in (report.model / "README.md").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "the teacher is not measured: timm/vit_small_patch16_dinov3.lvd1689m shows features alone" in shown
    assert "a licence of their own, dinov3-license" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "CrossKD"}, r"CrossKD cannot distil .*`--method auto` would take Cosine"),
        ({"teacher_scale": 0.3}, "teacher_scale is 0.3: it must be 1, 0.5 or 0.25"),
        ({"class_map": {"disc": "ball"}}, "shows features alone and has no classes: leave class_map out"),
        ({"teacher_weights": "none"}, "has random weights, so it cannot teach: leave teacher_weights out"),
        ({"init": "teacher"}, "has no neck and head to start from: leave init out"),
        ({"student": DINOV3}, "can only teach, because it shows nothing but features"),
    ],
)
def test_wrong_uses_are_one_sentence(shapes, weights, tmp_path, changes, message):
    words = {"teacher": DINOV3, "student": TINY, "teacher_weights": str(weights), "student_weights": "none"}
    words |= {"data": shapes, "steps": 2, "batch_size": 4, "quiet": True, "out": tmp_path / "run"}
    with pytest.raises(KDError, match=message):
        kdtoolkit.distill(**words | changes)


def test_it_cannot_be_trained_or_measured(shapes, weights, tmp_path):
    with pytest.raises(KDError, match="can only teach"):
        kdtoolkit.train(DINOV3, shapes, weights=str(weights), out=tmp_path / "run", steps=1, batch_size=2, quiet=True)
    with pytest.raises(KDError, match="features alone"):
        kdtoolkit.evaluate(DINOV3, shapes, weights=str(weights))


def test_without_weights_it_needs_no_number_of_classes():
    found = open_detector(DINOV3)
    assert (found.class_names, found.trained) == (None, False)


def specs(name):
    return adapt(tiny_gfl(seed=0)).spec, adapt(foundation(name)).spec


@pytest.mark.parametrize(("name", "scale"), [(DINOV2, 0.5), (DINOV3, 0.5), (CONVNEXT, 1.0)])
def test_the_scale_at_which_strides_meet(name, scale):
    student_spec, teacher_spec = specs(name)
    assert teacher_scale(student_spec, teacher_spec).value == scale
    found = choose(student_spec, teacher_spec.on_images_scaled_by(scale), "kdtoolkit")
    assert [str(use) for use in found.methods] == ["Cosine"]


def test_detectors_see_what_the_student_sees():
    spec = adapt(tiny_gfl(seed=0)).spec
    assert teacher_scale(spec, spec).value == 1


def printed(show, *arguments, **options):
    console = Console(record=True, width=100, file=io.StringIO())
    show(*arguments, console, **options)
    return " ".join(console.export_text().split())


def test_it_is_inspected():
    found = inspect_detector(foundation(DINOV2), 64)
    text = printed(print_inspection, found)
    for part in ("classes none", "priors none", "padded to 70 x 70", "can only teach"):
        assert part in text
    student = inspect_detector(tiny_gfl(seed=0), 64)
    text = printed(print_pair, student, found, teacher_scale=0.5)
    assert "0.5 times the student's size: its strides count 28" in text
    assert "class counts" not in text
    assert "work Cosine" in text
    with pytest.raises(KDError, match="can only teach"):
        print_pair(found, student, Console())
