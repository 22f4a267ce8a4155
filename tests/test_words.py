import pytest

from kdtoolkit.words import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("4h", 14400), ("90m", 5400), ("1h30m", 5400), ("2 h 5 min", 7500), ("45s", 45), ("1.5h", 5400)],
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "h", "4 hours", "-1h", "4h later", "1h30", "0m"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is no time"):
        seconds_of(text)
