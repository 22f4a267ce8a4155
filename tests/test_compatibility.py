from kdtoolkit.compatibility import why_no_student, why_refused
from kdtoolkit.contract import Capability, PriorKind
from kdtoolkit.methods import CWD, PKD, Mimic
from tests.methods._views import spec

PLAIN = {"priors_per_cell": (), "bins": (), "assigns": False}
FEATURES_ALONE = spec(name="backbone", num_classes=0, priors=PriorKind.NONE, **PLAIN)
DETECTIONS_ALONE = spec(name="a file", strides=(), channels=(), priors=PriorKind.DETECTIONS, **PLAIN)


def test_a_detector_without_levels_or_without_priors_shows_only_the_rest():
    assert FEATURES_ALONE.capabilities == {Capability.FEATURES}
    assert DETECTIONS_ALONE.capabilities == {Capability.PREDICTIONS}
    assert {Capability.FEATURES, Capability.PREDICTIONS} < spec().capabilities


def test_features_alone_teach_methods_of_features():
    assert why_refused(PKD, spec(), FEATURES_ALONE) is None
    assert why_refused(Mimic, spec(), FEATURES_ALONE) == (
        "it needs assignment, predictions, which the teacher (backbone) does not show. Use Cosine, or a method of "
        "features (PKD, FGD) where strides are equal"
    )


def test_detections_alone_teach_no_method_that_compares_features_or_priors():
    assert why_refused(PKD, spec(), DETECTIONS_ALONE) == (
        "it needs features, which the teacher (a file) does not show. Use ObjectKD, which learns from detections; or "
        "make labels of them, `kd pseudo-label`"
    )
    assert "assignment, which the teacher (a file) does not show. Use ObjectKD" in why_refused(
        Mimic, spec(), DETECTIONS_ALONE
    )
    reason = why_refused(CWD.for_logits(), spec(), DETECTIONS_ALONE)
    assert reason.startswith("the student predicts at anchors, the teacher at detections")
    assert "PKD" not in reason


def test_who_shows_only_one_of_both_cannot_be_a_student():
    assert why_no_student(spec()) is None
    assert why_no_student(FEATURES_ALONE).startswith("backbone can only teach, because it shows nothing but features")
    assert why_no_student(DETECTIONS_ALONE).startswith(
        "a file can only teach, because it shows nothing but predictions"
    )
