import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import _fuzz


@pytest.mark.parametrize("form", _fuzz.FORMS)
def test_whatever_stands_in_the_files_is_read_or_refused_in_words(tmp_path, form):
    write, texts = _fuzz.FORMS[form]
    root = write(tmp_path)

    @settings(max_examples=150, deadline=None)
    @given(changes=_fuzz.changes(form), on_bad=st.sampled_from(["error", "skip"]))
    def run(changes, on_bad):
        _fuzz.check(form, root, _fuzz.spoilt(texts, changes), on_bad)

    run()


@pytest.mark.parametrize("form", _fuzz.FORMS)
def test_untouched_files_are_read(tmp_path, form):
    write, texts = _fuzz.FORMS[form]
    assert _fuzz.check(form, write(tmp_path), _fuzz.spoilt(texts, ([], [])), "error")["refused"] == 0
