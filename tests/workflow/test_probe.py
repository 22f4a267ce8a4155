import json
import sys

import pytest

from kdtoolkit.cli import main
from kdtoolkit.workflow.options import DistillOptions, ProbeOptions, check_options
from tests.workflow._data import TINY


@pytest.fixture
def kd(monkeypatch, capsys):
    """Run `kd` with words; gives the exit code and what it printed."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["kd", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        printed = capsys.readouterr()
        return done.value.code or 0, printed.out, printed.err

    return call


def words(teacher, shapes, *more):
    common = ("--student-weights", "none", "--batch-size", 4, "--batches", 2, "--steps", 4, "--after", 2)
    return ("probe", "--teacher", teacher, "--student", TINY, "--data", shapes, *common, *more)


def test_it_prints_a_table_sentences_and_weights(kd, teacher, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = kd(*words(teacher, shapes, "--method", "PKD", "--method", "FGD?global_weight=0"))
    assert code == 1  # one of them drowns the task of a detector with random weights
    assert "after 2 steps without methods" in out
    assert "drowns the task" in out
    assert '--method "PKD?weight=' in out
    assert '--method "PKD?share=0.1" --method "FGD?global_weight=0&share=0.1"' in out
    assert err == ""
    assert not list(tmp_path.iterdir())


def test_json_has_all_of_it_and_what_it_proposes_has_the_share(kd, teacher, shapes):
    code, out, _ = kd(*words(teacher, shapes, "--method", "PKD", "--share", 0.2, "--json"))
    found = json.loads(out)
    assert (found["share"], found["batches"], found["after"], found["fine"]) == (0.2, 2, 2, code == 0)
    assert set(found["losses"]) >= {"task", "task/cls", "pkd", "pkd/feature"}
    proposed = found["methods"]["pkd"]["proposed"]
    assert proposed.startswith("PKD?weight=")
    code, out, _ = kd(*words(teacher, shapes, "--method", proposed, "--json"))
    again = json.loads(out)
    assert again["losses"]["pkd"]["parts"]["all"]["share"] == pytest.approx(0.2, rel=0.05)
    assert (code, again["fine"]) == (0, True)


def test_weights_that_cannot_be_given_are_held(kd, teacher, shapes):
    _, out, _ = kd(*words(teacher, shapes, "--method", "CrossKD.for_fcos", "--method", "PKD?share=0.3", "--json"))
    methods = json.loads(out)["methods"]
    assert methods["crosskd"]["proposed"] == "CrossKD.for_fcos?share=0.1"
    assert methods["pkd"]["proposed"] == "PKD?share=0.3"


def test_a_held_share_is_as_it_should_be(kd, teacher, shapes):
    code, out, _ = kd(*words(teacher, shapes, "--method", "PKD?share=0.1"))
    assert "pkd is held at a share of 10 %" in out
    assert "drowns" not in out
    assert code == ("pulls against the task (" in out)


def test_what_training_freezes_is_left_out(kd, teacher, shapes):
    frozen = "frozen: [backbone]"
    file = shapes.parent / "frozen.yaml"
    file.write_text(f"train: {{{frozen}}}\n")
    _, out, _ = kd("probe", file, *words(teacher, shapes, "--method", "PKD", "--json")[1:])
    assert set(json.loads(out)["losses"]["pkd"]["parts"]) == {"all", "neck"}


def test_it_reads_run_files_of_kd_distill(tmp_path):
    file = tmp_path / "run.yaml"
    given = {"teacher": "t", "student": "s", "data": str(tmp_path), "method": ["PKD"], "out": str(tmp_path / "run")}
    file.write_text(check_options(DistillOptions, given).to_yaml())
    options = check_options(ProbeOptions, {"share": 0.05}, file=file)
    assert (options.teacher, options.share, str(options.method[0])) == ("t", 0.05, "PKD")


@pytest.mark.parametrize(
    ("more", "told"), [(("--share", 2), "--share"), (("--batches", 0), "--batches"), (("--after", -1), "--after")]
)
def test_wrong_options_are_one_sentence(kd, tmp_path, more, told):
    code, _, err = kd("probe", "--teacher", "t", "--student", "s", "--data", tmp_path, *more)
    assert code == 2
    assert told in err
    assert len(err.splitlines()) == 1
