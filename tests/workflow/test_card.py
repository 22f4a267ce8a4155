import shutil
from importlib.metadata import version

import pytest

from kdtoolkit.data import ProceduralShapes, open_dataset
from kdtoolkit.engine.evaluate import Evaluation
from kdtoolkit.workflow.card import card
from tests.data import _coco, _yolo

GOOD = Evaluation(51.26, 70.0, 55.5, None, 40.0, 60.0, {"ball": 61.0, "cube": None}, 1, 12)


@pytest.fixture
def facts(tmp_path):
    root = _coco.write(tmp_path / "toys")
    return {
        "title": "toys",
        "student": "kdtoolkit/gfl?backbone=resnet18",
        "class_names": ("ball", "cube"),
        "data": root,
        "datasets": {"training": open_dataset(root, "train"), "validation": ProceduralShapes(1)},
        "scores": {"student": GOOD},
    }


def test_a_card_says_what_was_made_of_what(facts):
    text = card(
        **facts,
        student_weights="timm's weights of ImageNet for the backbone",
        teacher="ultralytics/yolo11m",
        teacher_weights="mine.pt",
        methods=["CrossKD()", "PKD(weight=6)"],
        schedule={"steps": 900, "image size": 320},
        how_to_open="model.load_state_dict(torch.load('model.pth'))",
        command="kd distill run.yaml",
    )
    for part in (
        "for 2 classes: `kdtoolkit/gfl?backbone=resnet18`, distilled from `ultralytics/yolo11m`",
        "in the order of their labels: ball, cube.",
        "```python\nmodel.load_state_dict",
        "| student | 51.3 | 70.0 | 55.5 |  | 40.0 | 60.0 |",
        "| ball | 61.0 |",
        "| cube |  |",
        "Its first weights: timm's weights of ImageNet for the backbone.",
        "Its weights: mine.pt.",
        "Methods: `CrossKD()`, `PKD(weight=6)`.",
        "Data: toys, 2 images for training, 1 image for validation.",
        "- Steps: 900.",
        "- Image size: 320.",
        f"ultralytics {version('ultralytics')}",
        "```\nkd distill run.yaml\n```",
    ):
        assert part in text, part


def test_what_is_not_known_is_said_or_left_out(facts):
    text = card(**{**facts, "scores": {"student": None}, "student": "mine:Detector"})
    assert "Its AP was not measured." in text
    assert "Its first weights: random." in text
    assert "licence unknown. The data set's files state none." in text
    for part in ("Teacher", "Methods", "How to open it", "This command", "Code of"):
        assert part not in text


@pytest.mark.parametrize(
    ("student", "teacher"), [("ultralytics/yolo11n", None), ("kdtoolkit/gfl", "ultralytics/yolo26m")]
)
def test_the_licence_of_ultralytics_is_told(facts, student, teacher):
    text = card(**{**facts, "student": student}, teacher=teacher)
    assert "- Code of ultralytics: AGPL-3.0." in text
    assert "this binds models trained with them too" in text


def test_weights_whose_licence_nobody_knows_are_told(facts):
    assert "first weights (from a friend): licence unknown" in card(**facts, student_weights="from a friend")
    assert "first weights (" not in card(**facts).partition("## Licences")[2]


def test_names_of_users_are_shown_as_they_are(facts):
    text = card(**{**facts, "title": "a|b\n*c*", "class_names": ("ball", "<cube>")})
    assert r"# a\|b \*c\*" in text
    assert r"ball, \<cube\>." in text


def test_the_licence_of_the_data_is_repeated(facts, tmp_path):
    document = {**_coco.document(), "licenses": [{"id": 1, "name": "CC BY 4.0", "url": "there"}, {"id": 2}]}
    _coco.write(tmp_path / "toys", document)
    assert "- Data: CC BY 4.0 there." in card(**facts)
    (tmp_path / "toys" / "LICENSE.txt").write_text("\n# MIT License\n\nfree")
    assert "- Data: CC BY 4.0 there; MIT License (file LICENSE.txt)." in card(**facts)
    for yaml in ("license: CC0\n", "roboflow:\n  license: CC0\n"):
        root = _yolo.write(tmp_path / "yolo", _yolo.YAML + yaml)
        assert "- Data: CC0." in card(**{**facts, "data": root})


def test_a_licence_that_cannot_be_read_stops_nothing(facts, tmp_path):
    for file in (tmp_path / "toys" / "annotations").glob("*.json"):
        file.unlink()
    assert "licence unknown" in card(**facts)
    shutil.rmtree(tmp_path / "toys")
    assert "licence unknown" in card(**facts)
    (tmp_path / "list.yaml").mkdir()
    assert "licence unknown" in card(**{**facts, "data": tmp_path / "list.yaml"})
    root = _yolo.write(tmp_path / "yolo", _yolo.YAML + f"license: {'[' * 3000}\n")
    assert "licence unknown" in card(**{**facts, "data": root})


def test_a_file_of_a_licence_that_is_a_broken_link_is_left_out(facts, tmp_path):
    (tmp_path / "toys" / "LICENSE").symlink_to(tmp_path / "absent")
    assert "licence unknown" in card(**facts)
