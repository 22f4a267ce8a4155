import inspect
import typing
from typing import Literal

import pytest
import torch
from torch import nn

from kdtoolkit.contract import Capability, Method, Schedule
from kdtoolkit.errors import KDError
from kdtoolkit.methods import CWD, LD, PKD, CrossKD, LogitKD, all_methods
from kdtoolkit.options import check_options


def wrong_values(name, hint):
    """Values that an option of any method must refuse, by its hint and name."""
    if typing.get_origin(hint) is Literal:
        first = typing.get_args(hint)[0]
        return [first.upper() if first.islower() else first.lower(), f"{first}s", 3, None]
    if hint is float:
        wrong = [float("nan"), float("inf"), "1", None, True]
        wrong += [-1, -1e-9] if name.endswith("weight") else []
        return wrong + ([0, -2.0] if name.endswith("temperature") else [])
    return {int: [1.5, "1", True], bool: [1, "yes"]}.get(hint, [])


OPTIONS = [
    (cls, name, typing.get_type_hints(cls.__init__)[name])
    for cls in all_methods().values()
    for name in inspect.signature(cls).parameters
]


@pytest.mark.parametrize(("cls", "name", "hint"), OPTIONS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_every_option_of_every_method_is_checked(cls, name, hint):
    assert wrong_values(name, hint), f"no wrong value is known for {hint}: teach check_options and this test"
    for value in wrong_values(name, hint):
        with pytest.raises(KDError) as error:
            cls(**{name: value})
        assert str(error.value).startswith(f"{cls.__name__}({name}={value!r}): must be ")
        assert "\n" not in str(error.value)


def test_errors_say_what_is_allowed():
    with pytest.raises(KDError, match=r"^CrossKD\(box_loss='GIoU'\): .* 'giou' or 'iou' \(did you mean 'giou'\?\)$"):
        CrossKD(box_loss="GIoU")
    with pytest.raises(KDError, match=r"must be 'after' or 'before' \(did you mean 'before'\?\)"):
        CrossKD(tap="befor")
    with pytest.raises(KDError, match=r"^CWD\(on='feature'\): .*did you mean 'features'"):
        CWD(on="feature")
    with pytest.raises(KDError, match=r"^LD\(temperature=0\): must be above 0$"):
        LD(temperature=0)
    with pytest.raises(KDError, match=r"^PKD\(weight=-1\): must be 0 or more$"):
        PKD(weight=-1)
    with pytest.raises(TypeError, match="wieght"):  # Python's own words
        PKD(wieght=1)
    assert LogitKD(kind="dkd", weight=0, temperature=2).kind == "dkd"


def test_methods_of_others_are_checked_too():
    class Theirs(Method):
        needs = frozenset({Capability.FEATURES})
        terms = ("x",)
        paper = "none"

        def __init__(self, mode: Literal["soft", "hard"] = "soft", *, weight: float = 1.0, bins: int | None = None):
            super().__init__()
            self.mode, self.weight, self.bins = mode, weight, bins

        def forward(self, exchange):
            return {}

    class Derived(Theirs):
        """Has the options of its base."""

    assert list(inspect.signature(Theirs).parameters) == ["mode", "weight", "bins"]
    assert Theirs("hard", bins=3).mode == "hard"
    for cls in (Theirs, Derived):
        with pytest.raises(KDError, match=rf"^{cls.__name__}\(mode='Hard'\): must be 'soft' or 'hard'"):
            cls("Hard")
        with pytest.raises(KDError, match=rf"^{cls.__name__}\(bins='x'\): must be a whole number$"):
            cls(bins="x")
        with pytest.raises(KDError, match="must be 0 or more"):
            cls(weight=-0.5)


def test_a_forgotten_super_call_is_named():
    class Forgetful(Method):
        terms = ()
        paper = "none"

        def __init__(self, learned: object = 1.0):
            self.learned = learned

        def forward(self, exchange):
            return {}

    class Broken(Forgetful):
        def __init__(self):
            nn.Module.__init__(self)
            self.learned.missing  # noqa: B018

    for learned in (1.0, nn.Linear(1, 1), nn.Parameter(torch.zeros(1))):
        with pytest.raises(TypeError, match=r"^Forgetful.__init__ must call super\(\).__init__\(\) before") as error:
            Forgetful(learned)
        assert error.value.__context__ is None  # nothing of torch's above it
    with pytest.raises(AttributeError, match="learned"):
        Broken()


def test_whole_numbers_become_floats_where_these_are_hinted():
    def f(weight: float, stage: int, name: "Missing") -> None:  # noqa: F821
        """Has a hint that cannot be resolved."""

    assert check_options("f", f, {"weight": 2}) == {"weight": 2}
    assert str(check_options("LD", LD, {"weight": 2})["weight"]) == "2.0"


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"stop": 0}, "ends the method before its first step"),
        ({"warmup": 1.5}, r"scheduled\(warmup=1.5\): must be a whole number of steps, as in warmup=2, or a share"),
        ({"stop": 1.0}, "leave stop out, since without it the method runs to the end"),
        ({"start": 1.0}, "a whole number of steps or a share of the run between 0 and 1"),
        ({"start": 0.5, "warmup": 0.2, "stop": 0.6}, "it must be 0.7 or more"),
        ({"stop": True}, "must be a whole number"),
        ({"stop": -5}, "-5"),
        ({"warmup": -1}, "must be 0 or more"),
    ],
)
def test_schedules_are_checked(schedule, words):
    with pytest.raises(KDError, match=words):
        Schedule(**schedule)
    with pytest.raises(KDError, match=words):
        PKD().scheduled(**schedule)


def test_levels_are_checked():
    with pytest.raises(KDError, match=r"as in at_strides\(8, 16\)"):
        PKD().at_strides([8, 16])
