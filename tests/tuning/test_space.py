from kdtoolkit.libraries import adapt
from kdtoolkit.method_use import MethodUse
from kdtoolkit.tuning.space import OWN, WHOLE, Space, candidates, given_candidates, in_words
from kdtoolkit.workflow.auto import choose
from tests.conftest import tiny_fcos, tiny_gfl


def uses(*words):
    return tuple(MethodUse.model_validate(word) for word in words)


def names(found):
    return [candidate.name for candidate in found]


def test_methods_that_are_named_are_tried_alone_and_together():
    assert names(given_candidates(uses("PKD"))) == ["PKD"]
    assert names(given_candidates(uses("PKD", "CrossKD"))) == ["PKD", "CrossKD", "PKD + CrossKD"]
    assert names(given_candidates(uses("PKD", "PKD?weight=2"))) == ["PKD", "PKD?weight=2"]
    assert names(given_candidates(uses("PKD", "PKD"))) == ["PKD"]


def test_auto_tries_all_that_work_and_its_own_choice_first():
    spec = adapt(tiny_gfl(seed=0)).spec
    found = names(candidates(spec, spec, "kdtoolkit", 1.0))
    assert found[:3] == ["CrossKD + PKD", "CrossKD", "PKD"]
    assert "FGD" in found
    assert "KDDETR" not in found  # for queries
    assert len(found) == len(set(found))
    fcos = adapt(tiny_fcos(seed=0)).spec
    assert in_words(choose(fcos, spec, "kdtoolkit").methods) == names(candidates(fcos, spec, "kdtoolkit", 1.0))[0]


def test_weights_follow_the_loss_of_the_library_or_shares_stand_in():
    spec = adapt(tiny_fcos(seed=0)).spec
    by_name = {each.name: each for each in candidates(spec, spec, "ultralytics", 8.0)}
    assert by_name["FitNet"].own[0].args == {"weight": 16.0}
    fixed = by_name["CrossKD.for_fcos"]
    assert fixed.own is None  # published settings have no weights to give
    space = Space((fixed,), (0.3, 0.6), ())
    assert {in_words(space.uses(params)) for params in space.settings()} == {
        "CrossKD.for_fcos?share=0.3",
        "CrossKD.for_fcos?share=0.6",
    }


def test_a_setting_adds_share_and_end_and_what_the_user_gave_stays():
    space = Space(tuple(given_candidates(uses("PKD?stop=0.9", "FGD?global_weight=0", "CrossKD"))), (0.2,), (0.5,))
    params = {"methods": "PKD?stop=0.9 + FGD?global_weight=0 + CrossKD", "share": 0.2, "stop": 0.5}
    pkd, fgd, crosskd = space.uses(params)
    assert pkd.args == {"stop": 0.9, "share": 0.2}
    assert fgd.args == {"global_weight": 0.0, "stop": 0.5}
    assert crosskd.args == {"share": 0.2, "stop": 0.5}
    assert space.uses(space.first()[2]) == uses("CrossKD")
    assert space.first()[2] == {"methods": "CrossKD", "share": OWN, "stop": WHOLE}
    assert space.size == 2 + 2 + 4 + 4  # alone: one part of PKD's and FGD's is given
