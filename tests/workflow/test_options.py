import inspect
from pathlib import Path

import pytest
import yaml

import kdtoolkit
from kdtoolkit.errors import KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.workflow import defaults
from kdtoolkit.workflow.options import DistillOptions, TrainOptions, TuneOptions, check_options, read_options

NEEDED = {"teacher": "runs/t", "student": "kdtoolkit/gfl", "data": "birds"}


def error_of(kind, words, **rest):
    with pytest.raises(KDError) as caught:
        check_options(kind, words, **rest)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ({"teachr": "a"}, "unknown key 'teachr' (did you mean 'teacher'?)"),
        ({"image_size": 8}, "image_size 8: input should be greater than or equal to 32"),
        ({"epochs": 3, "steps": 9}, "epochs and steps are two ways to say how long to train"),
        ({"seed": 2**65}, "seed 36893488147419103232: input should be less than 9223372036854775808"),
        ({"lr": -1}, "lr -1: input should be greater than 0"),
        ({"method": "CrosKD"}, "unknown method 'CrosKD' (did you mean 'CrossKD'?)"),
        ({"method": "PKD?wieght=6"}, "PKD: unknown key 'wieght' (did you mean 'weight'?)"),
        ({"method": ["auto", "PKD"]}, "auto chooses all methods itself"),
        ({"method": []}, "name at least one method"),
        ({"train": {"emma": 0.9}}, "train: unknown key 'emma' (did you mean 'ema'?)"),
        (
            {"batch_size": 8, "train": {"accumulation": 3}},
            "batch_size (8) must be a multiple of train.accumulation (3)",
        ),
        ({"train": {"lr": 0.9}}, "write lr beside `train`, not in it"),
        ({"train": {"augmentation": {"flip": 2}}}, "augmentation.flip"),
        ({"train": {"input_size": {"short": [128, 128]}}}, "saves the detector at image_size. Leave input_size out"),
        ({"budget": "4 hours"}, "budget: '4 hours' is no time: write it as 4h, 90m, 1h30m or 45s"),
        ({"budget": "4h", "steps": 9}, "budget decides how long to train: leave epochs and steps out"),
        ({"init": "techer"}, "init 'techer': input should be 'teacher'"),
    ],
)
def test_wrong_words_are_one_sentence(words, part):
    message = error_of(DistillOptions, NEEDED | words)
    assert part in message
    assert len(message.splitlines()) == 1


def test_a_missing_option_is_named_as_it_is_written():
    assert error_of(TrainOptions, {"data": "birds"}) == "model is missing: kd train needs it"
    assert error_of(TrainOptions, {"data": "birds"}, dashes=True) == "--model is missing: kd train needs it"
    assert "--image-size 'big'" in error_of(TrainOptions, {"data": "b", "model": "m", "image_size": "big"}, dashes=True)


def test_methods_are_read_in_all_forms():
    words = NEEDED | {"method": ["CrossKD", "PKD?weight=2", {"FGD": {"foreground_weight": 0.1}}]}
    crosskd, pkd, fgd = check_options(DistillOptions, words).method
    assert (crosskd.name, pkd.args, fgd.args) == ("CrossKD", {"weight": 2.0}, {"foreground_weight": 0.1})
    assert check_options(DistillOptions, NEEDED | {"method": "PKD"}).method == (MethodUse.model_validate("PKD"),)
    assert check_options(DistillOptions, NEEDED | {"method": ["auto"]}).method == "auto"


def test_options_of_training_have_the_values_that_training_takes():
    given = {"accumulation": "2", "ema": "0", "frozen": ["backbone"], "augmentation": {"flip": "0", "zoom": [1, 2]}}
    options = check_options(TrainOptions, {"model": "m", "data": "d", "batch_size": 8, "train": given})
    assert options.train == {
        "accumulation": 2,
        "ema": 0.0,
        "frozen": ["backbone"],
        "augmentation": {"flip": 0.0, "zoom": [1.0, 2.0]},
    }
    assert "multiple of train.accumulation (3)" in error_of(
        DistillOptions, NEEDED | {"batch_size": 8, "train": {"accumulation": "3"}}
    )


def test_a_file_is_read_and_words_come_before_it(tmp_path):
    (tmp_path / "birds").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(NEEDED | {"epochs": 3.0, "method": ["CrossKD"], "seed": 2}))
    options = check_options(DistillOptions, {"steps": 7}, file=path)
    assert (options.steps, options.epochs, options.seed) == (7, None, 2)
    assert options.data == tmp_path / "birds"  # relative to the file
    copy = tmp_path / "copy.yaml"
    copy.write_text(options.to_yaml())
    assert read_options(DistillOptions, copy) == options


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("data: birds\nmodl: x\n", "run.yaml, line 2: unknown key 'modl' (did you mean 'model'?)"),
        ("data: birds\nmodel: x\nseed: -1\n", "run.yaml, line 3: seed: seed = -1"),
        ("data: birds\ndata: cats\nmodel: x\n", "run.yaml, line 2: key 'data' is written twice"),
        ("- data\n", "run.yaml, line 1: a run file of `kd train` is a mapping with the keys data, out"),
        ("data: [\n", "not YAML"),
    ],
)
def test_a_wrong_file_names_the_line(tmp_path, text, part):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert part in error_of(TrainOptions, {}, file=path)


def test_a_file_that_is_not_there_is_told(tmp_path):
    assert "cannot read the run file" in error_of(TrainOptions, {}, file=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("function", "kind"),
    [(kdtoolkit.train, TrainOptions), (kdtoolkit.distill, DistillOptions), (kdtoolkit.tune, TuneOptions)],
)
def test_functions_take_the_words_of_the_command(function, kind):
    shown = {name for name, field in kind.model_fields.items() if field.description}
    assert set(inspect.signature(function).parameters) == shown


def test_every_option_is_described():
    for kind in (TrainOptions, DistillOptions):
        assert all(field.description for field in kind.model_fields.values())


def test_the_help_of_the_batch_size_is_what_runs_do():
    text = TrainOptions.model_fields["batch_size"].description
    assert f"{defaults.BATCH_ON_CPU} on a CPU" in text
    assert text.endswith(f"up to {defaults.LARGEST_BATCH}")


def test_a_run_file_does_not_allow_its_own_code(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: os:getcwd\ndata: shapes\nallow_code: true\n")
    assert not check_options(TrainOptions, {}, file=file).allow_code
    allowed = check_options(TrainOptions, {"allow_code": True}, file=file)
    assert allowed.allow_code
    assert "allow_code" not in allowed.to_yaml()


def test_the_weights_of_a_backbone_are_found_from_every_working_directory(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "r.safetensors").touch()
    file = tmp_path / "run.yaml"
    file.write_text("model: kdtoolkit/gfl?backbone=resnet18&pretrained=weights/r.safetensors\ndata: shapes\n")
    assert read_options(TrainOptions, file).model.endswith(f"&pretrained={tmp_path}/weights/r.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "True").touch()
    others = "kdtoolkit/gfl?pretrained=true", "kdtoolkit/gfl?pretrained=no/such.file", "my_pretrained=x.pth"
    for name in others:
        assert check_options(TrainOptions, {"model": name, "data": "shapes"}).model == name


def test_a_long_name_is_no_path():
    name = f"kdtoolkit/gfl?backbone={'x' * 300}"
    assert check_options(TrainOptions, {"model": name, "data": "shapes"}).model == name


def test_a_run_file_of_kd_distill_is_one_of_kd_tune_and_not_the_other_way_round(tmp_path):
    distilled, tuned = tmp_path / "distill.yaml", tmp_path / "tune.yaml"
    distilled.write_text(check_options(DistillOptions, NEEDED | {"method": ["CrossKD", "PKD"]}).to_yaml())
    found = check_options(TuneOptions, {"confirm_data": ["more"], "share": ["0.2"]}, file=distilled)
    assert [use.name for use in found.method] == ["CrossKD", "PKD"]
    assert (found.share, found.confirm_data) == ((0.2,), (Path("more").absolute(),))
    tuned.write_text(found.to_yaml())
    assert read_options(TuneOptions, tuned) == found
    assert "is of `kd tune`, not of `kd distill`" in error_of(DistillOptions, {}, file=tuned)
