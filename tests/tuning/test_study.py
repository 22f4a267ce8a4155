"""Trials on disk: a search that is stopped anywhere makes the trials that it would have made."""

import errno
import os
from pathlib import Path

import optuna
import pytest

from kdtoolkit.errors import KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.tuning import study as module
from kdtoolkit.tuning.space import Space, given_candidates
from kdtoolkit.tuning.study import Study, Trial, ranked

USES = tuple(MethodUse.model_validate(word) for word in ("PKD", "CWD"))
SPACE = Space(tuple(given_candidates(USES)), (0.1, 0.5), (0.5,))  # 18 settings


def score(trial):
    """A made-up AP: the more characters, the better."""
    return float(len(trial.name))


def follow(open_study, count):
    """Ask for trials, and report and end each of them."""
    names = []
    for number in range(count):
        trial = open_study().ask()
        end(open_study(), trial, number)
        names.append(trial.name)
    return names


def end(study, trial, number):
    """Report a trial if it is not reported yet, and end it; `number`: its place among all trials."""
    trial = trial if trial.scores else study.report(trial, 1, score(trial), 2.0)
    study.out(trial) if number % 3 else study.finish(trial)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.jsonl"
    study = Study(path, SPACE, 0)
    return path, follow(lambda: study, 14)


def test_each_method_is_tried_as_it_is_before_anything_else(whole):
    _, names = whole
    assert names[:3] == ["PKD", "CWD", "PKD + CWD"]
    assert len(set(names)) == len(names)


def test_a_search_that_is_opened_again_makes_the_same_trials(whole, tmp_path):
    _, names = whole
    assert follow(lambda: Study(tmp_path / "study.jsonl", SPACE, 0), 10) == names[:10]


def test_another_seed_makes_other_trials(whole, tmp_path):
    study = Study(tmp_path / "study.jsonl", SPACE, 1)
    assert follow(lambda: study, 8)[3:] != whole[1][3:8]


def test_everything_is_tried_once_and_then_nothing(tmp_path):
    study = Study(tmp_path / "study.jsonl", SPACE, 0)
    names = follow(lambda: study, SPACE.size)
    assert len(set(names)) == 18
    assert study.ask() is None


def test_a_file_cut_off_anywhere_goes_on_with_the_same_trials(whole, tmp_path):
    path, names = whole
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in range(1, len(lines), 9):
        torn = tmp_path / f"{cut}.jsonl"
        torn.write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        study = Study(torn, SPACE, 0)
        found = study.trials()
        assert [trial.name for trial in found] == names[: len(found)]
        for number, trial in enumerate(found):
            if trial.state == "running":
                end(study, trial, number)
        if len(found) < len(names):
            found.append(study.ask())
        assert [trial.name for trial in found] == names[: len(found)]


def test_trials_are_read_as_they_were_reported(whole):
    path, names = whole
    found = Study(path, SPACE, 0).trials()
    assert [trial.name for trial in found] == names
    assert {trial.state for trial in found} == {"out", "finished"}
    assert all(trial.scores == {1: len(trial.name)} and trial.seconds == 2.0 for trial in found)


def test_a_trial_that_fails_says_why(tmp_path):
    study = Study(tmp_path / "study.jsonl", SPACE, 0)
    study.fail(study.ask(), "loss = nan")
    (found,) = Study(tmp_path / "study.jsonl", SPACE, 0).trials()
    assert (found.state, found.reason, found.ap) == ("failed", "loss = nan", None)


def test_optuna_itself_reads_the_file(whole):
    path, names = whole
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    found = optuna.load_study(study_name="kd tune", storage=optuna.storages.JournalStorage(backend))
    assert found.best_value == max(map(len, names[::3]))


def test_those_that_came_furthest_rank_first():
    def trial(number, scores, state="out"):
        return Trial(number=number, methods=USES, scores=scores, seconds=1, state=state)

    trials = [
        trial(0, {1: 9.0}),
        trial(1, {1: 5.0, 3: 6.0}, "finished"),
        trial(2, {1: 9.5}),
        trial(3, {1: 10.0}, "failed"),
        trial(4, {}, "running"),
        trial(5, {1: 7.0, 3: 6.5}, "finished"),
    ]
    assert [each.number for each in ranked(trials)] == [5, 1, 2, 0]


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'optuna'")

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(KDError, match=r"a search needs Optuna: pip install 'kdtoolkit\[tune\]'"):
        module.imported()


def test_half_a_line_is_cut_without_writing_the_rest_anew(whole, tmp_path, monkeypatch):
    path, names = whole
    torn = tmp_path / "study.jsonl"
    torn.write_bytes(path.read_bytes() + b'{"half')
    monkeypatch.setattr(Path, "write_bytes", None)
    assert [trial.name for trial in Study(torn, SPACE, 0).trials()] == names
    assert torn.read_bytes().startswith(path.read_bytes())


def test_a_full_disk_is_told_and_loses_no_trial(tmp_path, monkeypatch):
    path = tmp_path / "study.jsonl"
    study = Study(path, SPACE, 0)
    trial = study.ask()
    before = path.read_bytes()

    def full(descriptor):
        os.write(descriptor, b'{"half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(KDError, match=r"study.jsonl cannot be read or written \(No space left on device\)"):
            study.report(trial, 1, 10.0, 1.0)
    assert path.read_bytes().startswith(before)
    assert [found.name for found in Study(path, SPACE, 0).trials()] == [trial.name]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "study.jsonl"
    path.write_text("nonsense\nmore of it\n")
    with pytest.raises(KDError, match=r"the trials in .*study.jsonl cannot be read"):
        Study(path, SPACE, 0)
