"""Places, ticks and texts of pictures."""

import pytest

from kdtoolkit.benchmark.report.svg import Scale, add, markup, number, picture


def test_a_scale_puts_its_ends_at_0_and_100():
    scale = Scale(10.0, 30.0)
    assert [scale(value) for value in (10, 15, 30)] == [0, 25, 100]
    assert Scale(1.0, 100.0, log=True)(10) == pytest.approx(50)
    assert Scale(1.0, 100.0, log=True)(0) == 0  # no logarithm: at the lower end


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(-4.5, 3.5), [-4, -2, 0, 2]),
        (Scale(0.0, 100.0), [0, 20, 40, 60, 80, 100]),
        (Scale(33.1, 33.9), [33.2, 33.4, 33.6, 33.8]),
        (Scale(0.03, 25.0, log=True), [0.03, 0.1, 0.3, 1, 3, 10]),
        (Scale(0.004, 5000.0, log=True), [0.01, 0.1, 1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round_and_few(scale, ticks):
    assert scale.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize("low", [1e-6, 0.3, 7.0, 1e5])
@pytest.mark.parametrize("span", [1e-3, 1.0, 9.0, 1e4])
def test_ticks_lie_within_any_scale(low, span):
    for scale in (Scale(low, low + span), Scale(low, low + span, log=True)):
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 8
        assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)


def test_scales_of_equal_or_no_numbers_have_a_width():
    assert Scale.over([5.0, 5.0])(5.0) == pytest.approx(50)
    assert Scale.over([]).ticks()
    assert Scale.over([3.0, float("nan")], log=True)(3.0) == pytest.approx(50)
    assert Scale.over([2.0, 3.0], zero=True).low < 0


def test_texts_of_users_are_escaped():
    own = picture(10, '<script> & "quotes"')
    add(own, "text", "<b>bold</b>", data_row="<i>")
    text = str(markup(own))
    assert "<script>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert 'data-row="&lt;i&gt;"' in text


@pytest.mark.parametrize(("value", "text"), [(0.05, "0.05"), (12.0, "12"), (1500.0, "1,500"), (3_262_187.0, "3.26 M")])
def test_numbers_are_short(value, text):
    assert number(value) == text
