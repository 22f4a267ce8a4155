import pytest
import yaml

from kdtoolkit.benchmark.suite import change
from kdtoolkit.benchmark.suite_file import load_suite, parse_suite
from kdtoolkit.errors import KDError
from kdtoolkit.listing import embedded_suites
from kdtoolkit.methods import PKD, CrossKD
from tests.benchmark._suite import TINY


def line_of(text, part):
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


def error_of(text):
    with pytest.raises(KDError) as caught:
        parse_suite(text, "mine.yaml")
    return str(caught.value)


def test_a_suite_is_read():
    suite = parse_suite(TINY, "mine.yaml")
    assert suite.student.train.steps == 2
    assert [use.name for use in suite.methods("CrossKD+PKD")] == ["CrossKD", "PKD"]
    crosskd, pkd = (use.build() for use in suite.methods("CrossKD+PKD"))
    assert isinstance(crosskd, CrossKD)
    assert isinstance(pkd, PKD)
    assert pkd.weights == (3.0,)
    assert suite.methods("baseline") == ()


def test_published_settings_are_written_and_read():
    text = TINY.replace("PKD: [PKD]", "PKD: [PKD.for_fcos]")
    assert parse_suite(parse_suite(text, "mine.yaml").to_yaml(), "copy.yaml") == parse_suite(text, "mine.yaml")


def test_what_is_written_reads_back():
    suite = parse_suite(TINY, "mine.yaml")
    assert parse_suite(suite.to_yaml(), "copy.yaml") == suite


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        ("seeds: 2", "sedes: 2", "sedes", ["unknown key 'sedes'", "did you mean 'seeds'", "expected_minutes"]),
        (
            "seeds: 2",
            "seeds: 2\nteacher_scale: 0.7",
            "teacher_scale",
            ["teacher_scale is 0.7: it must be 1, 0.5 or 0.25"],
        ),
        ("seeds: 2", "seeds: 0", "seeds", ["seeds = 0", "greater than or equal to 1"]),
        ("seeds: 2", "seeds: 36893488147419103232", "seeds", ["seeds = 36893488147419103232", "less than 1000000"]),
        (
            "  image_size: 64",
            "  image_size: 64\n  seed: 36893488147419103232",
            "seed: 36",
            ["less than 92233720368547"],
        ),
        ("seeds: 2", "seeds: many", "seeds", ["seeds = 'many'", "integer"]),
        ("  image_size: 64", "  image_sise: 64", "image_sise", ["data: unknown key", "did you mean 'image_size'"]),
        ("train: {steps: 3,", "train: {step: 3,", "step: 3", ["teacher.train", "did you mean 'steps'", "clip_norm"]),
        ("steps: 3,", "steps: 3, optimizer: adam,", "adam", ["optimizer = 'adam'", "'adamw' or 'sgd'"]),
        ("steps: 2,", "", "student:", ["student.train", "'steps' is missing"]),
        ("  val_images: 4\n", "", "data:", ["procedural data needs val_images"]),
        ("PKD: [PKD]", "PKD: [PDK]", "PDK", ["unknown method 'PDK'", "did you mean 'PKD'", "CrossKD"]),
        ("{weight: 3.0}", "{wieght: 3.0}", "wieght", ["PKD: unknown key 'wieght'", "did you mean 'weight'"]),
        ("{weight: 3.0}", "{weight: .nan}", "nan", ["PKD(weight=nan): must be finite"]),
        ("{weight: 3.0}", "{weight: heavy}", "heavy", ["PKD(weight='heavy'): must be a number"]),
        ("{weight: 3.0}", "{weight: -3.0}", "-3.0", ["PKD(weight=-3.0): must be 0 or more"]),
        (
            "{weight: 3.0}",
            "{stop: 0}",
            "stop: 0",
            ["PKD: stop=0 ends the method before its first step", "leave the method out"],
        ),
        ("PKD: [PKD]", "PKD: [{CWD: {'on': logit}}]", "CWD", ["CWD(on='logit')", "did you mean 'logits'"]),
        ("PKD: [PKD]", "PKD: [{CWD: {on: logits}}]", "CWD", ["CWD: YAML reads the key `on`", "quotes"]),
        (
            "{weight: 3.0}",
            "{warmup: 9}",
            "entries",
            ["PKD: start (0) and warmup (9) leave no step of the run (2 steps)"],
        ),
        ("PKD: [PKD]", "PKD: []", "entries", ["entry 'PKD' has no methods"]),
        ("PKD: [PKD]", "Baseline: [PKD]", "entries", ["'Baseline' has the same name as another row"]),
        ("PKD: [PKD]", "../PKD: [PKD]", "../PKD", ["../PKD"]),
        ("seeds: 2", "seeds: 2\nseeds: 3", "seeds: 3", ["key 'seeds' is written twice"]),
        ("{weight: 3.0}", "{weight: 3.0", "entries", ["not YAML"]),
    ],
)
def test_errors_name_the_line_and_what_is_allowed(old, new, line, parts):
    text = TINY.replace(old, new, 1)
    if "not YAML" in parts:  # found where the text ends
        assert error_of(text).startswith("mine.yaml, line ")
    elif "missing" in parts[-1]:  # named is the section that lacks it
        assert f"line {line_of(text, 'student:') + 3}: " in error_of(text)
    else:
        assert error_of(text).startswith(f"mine.yaml, line {line_of(text, line)}: ")
    for part in parts:
        assert part in error_of(text)


def test_all_errors_are_told_at_once():
    text = TINY.replace("seeds: 2", "seeds: 0").replace("PKD: [PKD]", "PKD: [PDK]")
    assert len(error_of(text).splitlines()) == 2


def test_numbers_as_people_write_them():
    text = TINY.replace("weight: 3.0", "weight: 1e-3").replace("steps: 2,", "steps: 2, lr: 2e-3,")
    suite = parse_suite(text, "mine.yaml")
    assert suite.methods("CrossKD+PKD")[1].args == {"weight": 0.001}
    assert suite.student.train.lr == 0.002


@pytest.mark.parametrize("name", embedded_suites())
def test_embedded_suites_are_valid_and_named_as_their_files(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.entries


def test_unknown_suites_are_refused_with_the_known_ones():
    known = ", ".join(embedded_suites())
    with pytest.raises(
        KDError, match=rf"unknown suite 'qick' \(did you mean 'quick'\?\); the embedded ones are {known}\."
    ):
        load_suite("qick")
    with pytest.raises(KDError, match=r"no suite file nowhere\.yaml"):
        load_suite("nowhere.yaml")


def test_a_root_is_relative_to_the_suite_file(tmp_path):
    fields = yaml.safe_load(TINY)
    fields["data"]["root"] = "photos"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
    assert load_suite(str(tmp_path / "mine.yaml")).data.root == tmp_path / "photos"


def test_change_leaves_the_rest(tmp_path):
    suite = parse_suite(TINY, "mine.yaml")
    changed = change(suite, data={"root": tmp_path, "image_size": 128}, seeds=7)
    assert (changed.seeds, changed.data.root, changed.data.image_size) == (7, tmp_path, 128)
    assert changed.data.val_images == 4
    assert changed.entries == suite.entries


def test_weights_of_a_backbone_that_a_model_names_count_from_the_folder_of_the_suite(tmp_path):
    (tmp_path / "r.safetensors").touch()
    file = tmp_path / "suite.yaml"
    file.write_text(
        TINY.replace(
            "model: kdtoolkit/gfl\n", "model: kdtoolkit/gfl?pretrained=r.safetensors&score_threshold=1e-2\n", 1
        )
    )
    suite = load_suite(str(file))
    assert (suite.teacher.model, suite.teacher.args["score_threshold"]) == ("kdtoolkit/gfl", 0.01)
    assert suite.teacher.args["pretrained"] == str(tmp_path / "r.safetensors")
