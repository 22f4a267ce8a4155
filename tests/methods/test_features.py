import pytest

from kdtoolkit import Distiller
from kdtoolkit.methods.features import FeatureMethod
from tests.conftest import tiny_gfl


class TwoTerms(FeatureMethod):
    terms = ("one", "two")
    paper = "none"

    def loss(self, student, teacher, level):
        return (student - teacher).square().mean().expand(2)


class OwnSetup(FeatureMethod):
    paper = "none"

    def setup(self, student_spec, teacher_spec):
        self.own = 1

    def loss(self, student, teacher, level):
        return (student - teacher).square().mean()


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            TwoTerms,
            r"TwoTerms has 2 terms .* and 1 weights: in its __init__ assign self.weights, one for each of terms",
        ),
        (OwnSetup, r"OwnSetup.setup must call super\(\).setup\(student_spec, teacher_spec\)"),
    ],
)
def test_what_a_subclass_leaves_out_is_one_sentence(method, sentence, batch):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [method()])
    with pytest.raises(TypeError, match=sentence):
        distiller(*batch)
