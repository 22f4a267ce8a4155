import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from kdtoolkit import cli
from kdtoolkit.listing import embedded_suites
from kdtoolkit.methods import CrossKD, all_methods
from kdtoolkit.models import build_model
from tests.benchmark._suite import TINY
from tests.benchmark.test_report import make_run
from tests.data import _voc, _yolo
from tests.data._coco import document, write


def kd(*arguments, monkeypatch, capsys):
    """Exit code, stdout and stderr of `kd`."""
    monkeypatch.setattr(sys, "argv", ["kd", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "600")
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: kd(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_version(run):
    assert run("--version") == (0, f"kdtoolkit {version('kdtoolkit')}\n", "")


def test_methods_lists_all_with_their_papers(run):
    code, out, _ = run("methods")
    assert code == 0
    for name, method in all_methods().items():
        assert name in out
        assert method.paper in out


def test_suites_lists_all(run):
    code, out, _ = run("benchmark", "suites")
    assert code == 0
    assert all(name in out for name in embedded_suites())
    assert "min" in out


def test_help_shows_every_option_and_an_example(run):
    code, out, _ = run("benchmark", "run", "--help")
    assert code == 0
    for option in (
        "--data",
        "--out",
        "--jobs",
        "--device",
        "--seeds",
        "--only",
        "--image-size",
        "--skip-bad",
        "--fresh",
    ):
        assert option in out
    assert "kd benchmark run photos --data" in out


def test_report_writes_the_board_again(run, tmp_path):
    root = make_run(tmp_path)
    code, out, _ = run("benchmark", "report", root)
    assert code == 0
    assert "is above the baseline at equal steps" in out
    assert (root / "leaderboard.html").exists()


def test_one_report_of_several_runs(run, tmp_path):
    roots = [make_run(tmp_path / name, teacher=teacher) for name, teacher in (("a", 31.0), ("b", 34.0))]
    code, _, errors = run("benchmark", "report", *roots)
    assert (code, "add --out FOLDER" in errors) == (2, True)
    code, _, errors = run("benchmark", "report", roots[0], roots[0], "--out", tmp_path / "both")
    assert (code, "name each run once" in errors) == (2, True)
    code, out, _ = run("benchmark", "report", *roots, "--out", tmp_path / "both")
    assert code == 0
    assert "mean rank" in out
    assert "Over all data sets" in (tmp_path / "both" / "report.html").read_text("utf-8")


def test_a_report_that_cannot_be_written_is_told_before_it_is_made(run, tmp_path):
    root = make_run(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    code, out, errors = run("benchmark", "report", root, "--out", file / "x")
    assert (code, out) == (2, "")
    assert f"cannot make the folder {file / 'x'}: Not a directory. Choose a different one (--out)" in errors


def test_mistakes_are_one_error_and_code_2(run, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TINY.replace("seeds: 2", "sedes: 2"))
    code_of_others = tmp_path / "code.yaml"
    code_of_others.write_text(TINY.replace("model: kdtoolkit/gfl", "model: os:system", 1))
    for arguments, part in (
        (["benchmark", "run", "qick"], "did you mean 'quick'?"),
        (["benchmark", "run", wrong], "wrong.yaml, line 4: unknown key 'sedes' (did you mean 'seeds'?)"),
        (["benchmark", "run", code_of_others], "is 'os:system', which imports a Python module and so runs its code"),
        (["benchmark", "report", tmp_path], "is not a folder of `kd benchmark run`"),
        (["benchmark", "run", "--data", tmp_path / "none"], "none' does not exist"),
        (["benchmark", "run", "--sed", "3"], "--seeds"),
        (["benchmark", "run", "--device", "gpu"], "'--device': 'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["benchmark", "run", "--jobs", "0"], "'--jobs'"),
        (["benchmark", "run", "quick", "photos"], "unexpected extra argument"),
        (["bench"], "Did you mean 'benchmark'? (see `kd --help`)"),
        (["inspect"], "(see `kd inspect --help`)"),
        (["inspect", "kdtoolkit/gfl", "--weights", tmp_path / "none.pth"], "there is no weights file"),
        (["inspect", "kdtoolkit/gfl", "--teacher-weights", wrong], "--teacher-weights needs --teacher NAME"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert part.lower() in err.lower()  # some versions of typer name arguments in capitals
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [[], ["benchmark"]])
def test_without_a_command_the_help_is_shown(run, command):
    code, out, err = run(*command)
    assert (code, err) == (2, "")
    assert "Commands:" in out


def test_no_traceback_from_a_real_process():
    done = subprocess.run(
        [sys.executable, "-m", "kdtoolkit", "benchmark", "run", "qick"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown suite 'qick'")
    assert len(done.stderr.splitlines()) == 1


def test_bad_data_is_one_error_or_is_left_out(run, tmp_path):
    spoilt = document()
    spoilt["annotations"].append({"id": 4, "image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 9]})
    root = write(write(tmp_path / "cubes", spoilt), split="val")
    suite = tmp_path / "tiny.yaml"
    suite.write_text(TINY.replace("seeds: 2", "seeds: 1"))
    command = ["benchmark", "run", suite, "--data", root, "--out", tmp_path / "runs", "--only", "PKD"]
    code, _, err = run(*command)
    assert code == 2
    assert "train.json: 1 fault:" in err
    assert "annotation 4 (image 7): bbox [5, 5, 0, 9] has no area" in err
    assert "--skip-bad" in err
    code, _, err = run(*command, "--skip-bad")
    assert (code, err) == (0, "")
    assert (tmp_path / "runs" / "tiny-cubes" / "leaderboard.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", [_yolo, _voc])
def test_a_suite_runs_on_every_format(run, tmp_path, form):
    root = form.write(tmp_path / "cubes")
    suite = tmp_path / "tiny.yaml"
    suite.write_text(TINY.replace("seeds: 2", "seeds: 1"))
    for path in (root, root / "data.yaml" if form is _yolo else root / "Annotations"):
        code, _, err = run("benchmark", "run", suite, "--data", path, "--out", tmp_path / "runs", "--only", "PKD")
        assert (code, err) == (0, "")
    assert [path.name for path in (tmp_path / "runs").glob("tiny-*")] == ["tiny-cubes"]
    assert len(list((tmp_path / "runs" / "pictures" / "photos").glob("*/*.rgb"))) == 2


def test_data_are_checked(run, tmp_path):
    root = _yolo.write(tmp_path / "cubes", labels={7: "0 0.5 0.5 2"})
    code, out, err = run("data", "check", root)
    assert (code, err) == (1, "")
    assert "train: labels/train/7.txt, line 1: the line has 4 numbers" in out
    assert "with --skip-bad it leaves out 0 images with their boxes, and 2 single boxes" in out
    code, out, err = run("data", "check", root / "data.yaml", "--json", "--image-size", 320)
    assert (code, err) == (1, "")
    found = json.loads(out)
    assert found["format"] == "YOLO"
    assert found["splits"]["val"]["faults"][0]["loses"] == "box"
    _yolo.write(root)
    assert run("data", "check", root)[0] == 0
    code, _, err = run("data", "check", tmp_path)
    assert (code, "is no data set that is known" in err) == (2, True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all file names are Unicode")
def test_data_whose_file_names_are_no_text_are_checked(run, tmp_path):
    root = _yolo.write(tmp_path / "photos")
    (root / "labels" / "train" / os.fsdecode(b"\xff.txt")).write_text("")
    name = r"labels/train/\udcff.txt"
    assert name in run("data", "check", root)[1]
    code, out, err = run("data", "check", root, "--json")
    assert (code, err) == (0, "")
    assert name in out
    assert os.fsdecode(b"\xff.txt") in json.loads(out)["warnings"][-1]


def test_data_are_converted_and_shown(run, tmp_path):
    root = write(tmp_path / "cubes")
    code, out, err = run("data", "convert", root, tmp_path / "yolo", "--to", "yolo")
    assert (code, err) == (0, "")
    assert f"{tmp_path}/yolo: 2 images, 2 boxes" in out
    assert "lost: 1 crowds" in out
    code, _, err = run("data", "convert", root, tmp_path / "yolo", "--to", "voc")
    assert (code, "is there already" in err) == (2, True)
    code, out, err = run("data", "show", tmp_path / "yolo", "--out", tmp_path / "shown")
    assert (code, err) == (0, "")
    assert f"{tmp_path}/shown: 2 pictures of {tmp_path}/yolo/data.yaml" in out
    assert len(list((tmp_path / "shown").iterdir())) == 2
    code, _, err = run("data", "show", tmp_path / "yolo", "--split", "dev")
    assert (code, "has no dev, only train" in err) == (2, True)


def test_a_method_is_explained_with_its_defaults(run):
    code, out, _ = run("methods", "crosskd")
    assert code == 0
    for part in (CrossKD.paper, "proposal_box", "tap", "'after'", "exponent of the quality focal loss"):
        assert part in out
    assert "CrossKD.for_fcos" in out
    code, _, err = run("methods", "CrosKD")
    assert (code, "did you mean 'CrossKD'?" in err) == (2, True)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_argument_of_every_method_is_described(run, name):
    code, out, _ = run("methods", name)
    assert code == 0
    table = out[out.rindex("what it is") :].splitlines() if "what it is" in out else []
    named = {row.split()[0]: row.split(None, 2) for row in table[1:] if row[1:2].strip()}
    assert set(inspect.signature(all_methods()[name]).parameters) <= set(named)
    assert all(len(cells) == 3 for cells in named.values())


def test_inspect_shows_a_detector(run, tmp_path):
    name = "kdtoolkit/gfl?backbone=resnet10t&neck_channels=16&head_channels=24&head_groups=4&bins=9"
    model = build_model(name, 3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    command = ["inspect", name, "--classes", 3, "--weights", tmp_path / "weights.pth", "--image-size", 64]
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    for part in (f"{parameters:.2f} M", "9 bins, 0 to 8", "block 4", "cls 24; reg 24", "64 x 64", "work", "CrossKD"):
        assert part in out
    assert [line.split()[1:3] for line in out.splitlines() if "8 x 8" in line] == [["8", "16"]]
    code, out, _ = run(*command[:3], 4, *command[4:])
    assert (code, "note: the class layers are new" in out) == (0, True)
    code, out, _ = run(*command[:2], *command[4:])  # as many classes as the weights have
    assert (code, "note" in out) == (0, False)


def test_inspect_shows_a_pair(run, tmp_path):
    tiny = "backbone=resnet10t&neck_channels=16&head_channels=24&head_groups=4"
    student, teacher = f"kdtoolkit/fcos?{tiny}", f"kdtoolkit/gfl?{tiny}"
    torch.save(build_model(teacher, 3).state_dict(), tmp_path / "teacher.pth")
    command = ["inspect", student, "--teacher", teacher, "--classes", 3, "--image-size", 64]
    code, out, err = run(*command, "--teacher-weights", tmp_path / "teacher.pth")
    assert (code, err) == (0, "")
    for part in ("FCOS (", "GFL (", "common strides", "8, 16, 32, 64, 128", "CrossKD", "distributions over equal bins"):
        assert part in out
    code, _, err = run(*command, "--weights", tmp_path / "teacher.pth")
    assert (code, "do not fit FCOS" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gfl", "unknown model 'gfl': there is no such file or folder"),
        ("kdtoolkit/gfl?depth=3", "keyword argument 'depth'"),
        ("kdtoolkit/gfl?backbon=resnet18", "(did you mean 'backbone'?)"),
        ("kdtoolkit/glf", "(did you mean 'gfl'?)"),
        ("torchvison/fcos_resnet50_fpn", "(did you mean 'torchvision'?)"),
        ("os:getcwd", "Its arguments are none"),
    ],
)
def test_inspect_explains_wrong_names(run, name, part):
    code, _, err = run("inspect", name)
    assert (code, part in err) == (2, True), err


def test_adapters_lists_families(run):
    code, out, _ = run("adapters")
    assert code == 0
    assert all(part in out for part in ("GFL", "torchvision Faster R-CNN", "proposals", "distributions"))


def test_the_matrix_is_printed_and_written(run, tmp_path):
    command = ["adapters", "--matrix", "--family", "GFL", "--family", "torchvision Faster R-CNN", "--method", "CrossKD"]
    code, out, err = run(*command, "--markdown", tmp_path / "matrix.md")
    assert (code, err) == (0, "")
    assert "50%" in out
    assert "anchors" in out
    assert "## CrossKD" in (tmp_path / "matrix.md").read_text()
    for wrong, part in ((["--method", "CrosKD"], "did you mean 'CrossKD'?"), (["--family", "GLF"], "unknown family")):
        code, _, err = run("adapters", "--matrix", *wrong)
        assert (code, part in err) == (2, True)
    code, _, err = run(*command, "--markdown", tmp_path / "none" / "matrix.md")
    assert (code, "cannot write" in err) == (2, True)


def test_options_of_the_matrix_alone_are_not_ignored(run):
    code, _, err = run("adapters", "--family", "GFL")
    assert (code, "need --matrix" in err) == (2, True)


def test_inspect_names_arguments_that_a_library_does_not_check(run):
    code, _, err = run("inspect", "torchvision/fcos_resnet50_fpn?min_size=[abc]", "--image-size", 64)
    assert (code, "cannot be run on an image of 64 x 64 px" in err) == (2, True)


def test_names_cannot_command_the_terminal(run, tmp_path):
    code, out, err = run("benchmark", "report", tmp_path / "\x1b[2Jname")
    assert (code, out) == (2, "")
    assert "\x1b" not in err
    assert r"\x1b[2Jname" in err
