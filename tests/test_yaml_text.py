import pytest

from kdtoolkit.errors import KDError
from kdtoolkit.yaml_text import dump, dump_arguments, load, load_arguments, split_name


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("-.5E2", -50.0), ("1.e+1", 10.0), ("12", 12), ("1.5", 1.5)]
)
def test_a_number_with_an_exponent_is_a_number(text, value):
    found = load(f"a: [{text}]")["a"][0]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["'1e-3'", "1e", "e5", "1e5x", "v1e5"])
def test_other_text_stays_text(text):
    assert load(text) == text.strip("'")


def test_values_are_written_so_that_they_are_read_again():
    values = {
        "a": "1e-3",
        "b": 1e-5,
        "c": "a & b = 50 % + c",
        "d": [8, 16],
        "e": {"f": None},
        "g": 6.0,
        "h": 1.23456789,
    }
    assert load(dump(values)) == values
    assert load_arguments(dump_arguments(values)) == values
    assert dump_arguments({"weight": 6.0, "strides": (8, 16), "name": "x"}) == "weight=6&strides=[8, 16]&name=x"


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("backbone=", "backbone has no value"),
        ("backbone", "'backbone' is no name=value"),
        ("=3", "'=3' is no name=value"),
        ("a=1&b=2&a=3", "a is given twice"),
        ("a={", r"a: '\{' is not YAML"),
        ("a=2001-99-99", "a: '2001-99-99' is not YAML"),
    ],
)
def test_arguments_that_cannot_be_read_are_errors(query, says):
    with pytest.raises(ValueError, match=says):
        load_arguments(query)
    with pytest.raises(KDError, match=f"model 'kdtoolkit/gfl.*{says}.*write arguments as"):
        split_name(f"kdtoolkit/gfl?{query}")


def test_a_plus_stays_a_plus():
    assert split_name("kdtoolkit/gfl?pretrained=my+w.pth") == ("kdtoolkit/gfl", {"pretrained": "my+w.pth"})
