import json
import re
import sys

import pytest
import torch

import kdtoolkit
from kdtoolkit.cli import main
from kdtoolkit.method_use import MethodUse
from kdtoolkit.probing import Measured, Probe, Row
from kdtoolkit.workflow.options import DistillOptions, ProbeOptions, check_options
from kdtoolkit.workflow.probe import Found, proposed
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


def run_file(folder, teacher, shapes, **train):
    """A run file with options of training, which no command line has."""
    file = folder / "run.yaml"
    given = {"teacher": str(teacher), "student": TINY, "data": str(shapes), "method": ["PKD"], "train": train}
    file.write_text(check_options(DistillOptions, given).to_yaml())
    return file


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
    code, out, _ = kd(*words(teacher, shapes, "--method", proposed, "--share", 0.2, "--json"))
    again = json.loads(out)
    assert again["losses"]["pkd"]["parts"]["all"]["share"] == pytest.approx(0.2, rel=0.05)
    assert "share" not in again["methods"]["pkd"]["proposed"]


def found(*uses, norms):
    """What is found of PKD and other methods whose gradients have these norms, beside a task's of norm 1."""
    rows = [
        Row(name, 1.0, dict.fromkeys(("all", "neck"), Measured(norm, 1.0, 0.0, 0.01, 0.0)) if norm else {})
        for name, norm in zip(("pkd", "fgd", "crosskd"), norms, strict=False)
    ]
    probed = Probe(tuple(rows), {}, 0.1, 4, 1.0)
    by_name = {row.name: MethodUse.model_validate(use) for row, use in zip(rows, uses, strict=True)}
    return Found(probed, by_name, proposed(probed, by_name), 0, ())


def proposals(found):
    return [line for line in found.lines() if "--method" in line or line.endswith(":")]


def test_weights_that_have_the_share_already_are_proposed_as_they_are():
    same = found("PKD?weight=0.12", norms=[1.02 / 9])
    assert same.proposed == same.uses
    assert proposals(same) == []
    one = found(
        "PKD?weight=0.12",
        "FGD?foreground_weight=1&background_weight=0&attention_weight=0&global_weight=0",
        norms=[1.02 / 9, 1.0],
    )
    assert proposals(one)[1].startswith('  --method "PKD?weight=0.12" --method "FGD?foreground_weight=0.11&')


def test_a_method_without_gradient_gets_no_proposal():
    none = found("PKD", norms=[0.0])
    assert none.proposed == none.uses
    assert proposals(none) == []
    both = found("PKD", "FGD?global_weight=0", norms=[0.0, 1.0])
    assert [line.count("--method") for line in proposals(both)] == [0, 1, 0, 1]


def test_the_only_proposal_is_no_alternative():
    assert proposals(found("PKD?share=0.1", "FGD", "CrossKD.for_fcos", norms=[5.0, 0.0, 3.0])) == [
        "Let the share of 10 % be held from the first step to the last:",
        '  --method "CrossKD.for_fcos?share=0.1"',
    ]


def test_weights_that_cannot_be_given_are_held(kd, teacher, shapes):
    _, out, _ = kd(*words(teacher, shapes, "--method", "CrossKD.for_fcos", "--method", "PKD?share=0.3", "--json"))
    methods = json.loads(out)["methods"]
    assert methods["crosskd"]["proposed"] == "CrossKD.for_fcos?share=0.1"
    assert methods["pkd"]["proposed"] == "PKD?share=0.3"
    assert [methods[name]["held"] for name in ("crosskd", "pkd")] == [None, 0.3]


def test_the_batches_are_those_that_follow_the_training_before(kd, teacher, shapes):
    """The student learns nothing in the steps before, so only the images decide the task's loss."""
    values = []
    for after, batches in ((0, 3), (0, 2), (2, 1)):
        common = ("--method", "PKD", "--json", "--lr", 1e-12)
        _, out, _ = kd(*words(teacher, shapes, *common, "--after", after, "--batches", batches))
        values.append(json.loads(out)["losses"]["task"]["value"])
    assert values[2] == pytest.approx(3 * values[0] - 2 * values[1], rel=1e-4)


def test_it_shows_the_parts_of_a_batch_and_computes_as_training_does(kd, teacher, shapes, tmp_path):
    values = []
    for precision in ("float32", "bfloat16"):
        file = run_file(tmp_path, teacher, shapes, accumulation=2, precision=precision)
        run = (*words(teacher, shapes, "--after", 0), file)
        assert "probed 4 images in batches of 2" in kd(*run)[1]
        values.append(json.loads(kd(*run, "--json")[1])["losses"]["task"]["value"])
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.05)


def test_a_gpu_without_memory_is_one_sentence(kd, teacher, shapes, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kdtoolkit.Distiller, "forward", full)
    code, _, err = kd(*words(teacher, shapes, "--method", "PKD"))
    assert code == 2
    assert "the GPU is out of memory: use half the --batch-size or a smaller --image-size" in err
    assert len(err.splitlines()) == 1


def test_a_held_share_is_as_it_should_be(kd, teacher, shapes):
    code, out, _ = kd(*words(teacher, shapes, "--method", "PKD?share=0.1"))
    assert "pkd is held at a share of 10 %" in out
    assert "drowns" not in out
    assert code == ("pulls against the task (" in out)


def test_what_training_freezes_is_left_out(kd, teacher, shapes, tmp_path):
    file = run_file(tmp_path, teacher, shapes, frozen=["backbone"])
    _, out, _ = kd(*words(teacher, shapes, "--json"), file)
    assert set(json.loads(out)["losses"]["pkd"]["parts"]) == {"all", "neck"}


def test_it_reads_run_files_of_kd_distill(tmp_path):
    file = tmp_path / "run.yaml"
    given = {"teacher": "t", "student": "s", "data": str(tmp_path), "method": ["PKD"], "out": str(tmp_path / "run")}
    file.write_text(check_options(DistillOptions, given).to_yaml())
    options = check_options(ProbeOptions, {"share": 0.05}, file=file)
    assert (options.teacher, options.share, str(options.method[0])) == ("t", 0.05, "PKD")


def test_help_shows_what_is_used_and_commands_of_kd_distill_are_taken(kd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = kd("probe", "--help")[1]
    unused = ("--out", "--compare-baseline", "--allow-weak-teacher")
    assert not [option for option in unused if option in shown]
    assert all(option in kd("distill", "--help")[1] for option in unused)
    assert re.search(r"--share +<float>", shown)
    code, _, err = kd("probe", "--out", "x", "--compare-baseline", "--allow-weak-teacher")
    assert code == 2
    assert [line.split()[0] for line in err.replace("error: ", "").splitlines()] == ["--data", "--teacher", "--student"]


@pytest.mark.parametrize("after", [0, 2])
def test_several_processes_are_refused_first(kd, tmp_path, monkeypatch, after):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = kd("probe", "--teacher", "t", "--student", "s", "--data", tmp_path, "--after", after)
    assert code == 2
    assert "start it without torchrun" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "told"), [(("--share", 2), "--share"), (("--batches", 0), "--batches"), (("--after", -1), "--after")]
)
def test_wrong_options_are_one_sentence(kd, tmp_path, more, told):
    code, _, err = kd("probe", "--teacher", "t", "--student", "s", "--data", tmp_path, *more)
    assert code == 2
    assert told in err
    assert len(err.splitlines()) == 1
