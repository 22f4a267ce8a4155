import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DetrImageProcessor, Trainer, TrainingArguments
from transformers import RTDetrImageProcessor as PlainProcessor

from kdtoolkit import Distiller, KDError
from kdtoolkit.adapters.transformers import ADAPTERS
from kdtoolkit.integrations.transformers import DistillationTrainer, collate
from kdtoolkit.methods import PKD, CrossKD
from tests.conftest import tiny_gfl

EXAMPLES = {name: build for cls in ADAPTERS for name, build in cls.examples().items()}
DETR, RT_DETR = "DETR", "RT-DETR"


def detector(family=RT_DETR, seed=1):
    torch.manual_seed(seed)
    return EXAMPLES[family](2)


@pytest.fixture(scope="module")
def processor():
    return PlainProcessor(do_resize=False)  # its images are in [0, 1]


def examples(processor, boxes, pictures):
    """What a user's data set gives: each image and its annotations, processed."""
    found = []
    for i, (picture, (label, *box)) in enumerate(zip(pictures, boxes, strict=True)):
        annotation = {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0}
        given = processor(images=picture, annotations={"image_id": i, "annotations": [annotation]}, return_tensors="pt")
        found.append({name: value[0] for name, value in given.items()})
    return found


@pytest.fixture(scope="module")
def data(processor, boxes, pictures):
    return examples(processor, boxes, pictures)


def settings(folder, **changes):
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **changes,
        },
    )


def trainer(folder, data, processor, methods=None, teacher=None, student=None, **changes):
    distiller = Distiller(
        detector(seed=1) if teacher is None else teacher,
        detector(seed=2) if student is None else student,
        [PKD()] if methods is None else methods,
    )
    return DistillationTrainer(
        distiller,
        settings(folder, **changes),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data[:2],
        processing_class=processor,
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_without_methods_the_loss_is_the_librarys(normalised, boxes, pictures, tmp_path):
    family = DETR if normalised else RT_DETR
    processor = (DetrImageProcessor if normalised else PlainProcessor)(do_resize=False)
    small = [picture[: 64 - 8 * i] for i, picture in enumerate(pictures[:2])]  # of two sizes
    batch = (
        collate(examples(processor, boxes[:2], small))
        if normalised
        else collate(examples(processor, boxes[:2], pictures[:2]))
    )
    student = detector(family).train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(student)
    run = trainer(tmp_path, [], processor, methods=[], student=student)
    run.model.train()
    torch.manual_seed(0)
    ours = run.compute_loss(run.model, batch)
    torch.manual_seed(0)
    theirs = plain(**batch).loss
    torch.testing.assert_close(ours, theirs)


def test_boxes_lie_where_the_objects_are_whoever_pads_the_images(boxes, pictures, tmp_path):
    small = [picture[: 64 - 8 * i] for i, picture in enumerate(pictures[:2])]  # of two sizes
    apart = DetrImageProcessor(do_resize=False)
    padding = DetrImageProcessor(do_resize=False, pad_size={"height": 80, "width": 96})
    run = trainer(tmp_path, [], apart, methods=[], student=detector(DETR))
    run.model.eval()
    losses = [run.compute_loss(run.model, collate(examples(each, boxes[:2], small))) for each in (apart, padding)]
    torch.testing.assert_close(*losses)


def test_schedules_in_shares_know_the_number_of_steps_of_the_run(tmp_path, data, processor):
    run = trainer(tmp_path, data, processor, [PKD().scheduled(stop=0.5)], save_strategy="no")
    run.train()
    assert [entry["step"] for entry in run.state.log_history if "pkd/feature" in entry] == [1, 2]


def test_losses_fall_and_stand_in_the_log(tmp_path, data, processor):
    run = trainer(tmp_path, data, processor, max_steps=15, learning_rate=3e-3, save_strategy="no")
    run.train()
    losses = [entry["pkd/feature"] for entry in run.state.log_history if "pkd/feature" in entry]
    assert len(losses) == 15
    assert losses[-1] < 0.7 * losses[0]
    entry = run.state.log_history[0]
    assert entry["loss"] == pytest.approx(sum(value for name, value in entry.items() if "/" in name), rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_gradients_reach_the_student_and_what_methods_learn(changes, tmp_path, data, processor):
    run = trainer(
        tmp_path, data, processor, teacher=tiny_gfl(seed=1, num_classes=2), max_steps=1, save_strategy="no", **changes
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items() if isinstance(value, torch.Tensor)}
    run.train()
    changed = {name for name, value in before.items() if not torch.equal(value, run.model.state_dict()[name])}
    assert any(name.startswith("methods.") for name in changed)
    assert any("backbone" in name and name.endswith("weight") for name in changed)


def test_resuming_goes_on_as_if_it_had_not_stopped(tmp_path, data, processor):
    teacher = tiny_gfl(seed=1, num_classes=2)
    methods = lambda: [PKD().scheduled(warmup=10)]  # noqa: E731
    whole = trainer(tmp_path / "whole", data, processor, methods(), teacher)
    learned = copy.deepcopy(whole.model.methods.state_dict())
    whole.train()
    again = trainer(tmp_path / "whole", data, processor, methods(), teacher, student=detector(seed=3))
    again.model.methods.load_state_dict(learned)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, first), (_, second) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        torch.testing.assert_close(first, second, msg=name)
    assert [entry["step"] for entry in again.state.log_history if "pkd/feature" in entry] == [1, 2, 3, 4]
    with pytest.raises(KDError, match="this run has CrossKD"):
        trainer(tmp_path / "whole", data, processor, [CrossKD()]).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


PLAIN = """
import sys
sys.modules["kdtoolkit"] = None  # from now on it cannot be imported
from transformers import AutoImageProcessor, AutoModelForObjectDetection
AutoImageProcessor.from_pretrained(sys.argv[1])
model, info = AutoModelForObjectDetection.from_pretrained(sys.argv[1], output_loading_info=True)
print(sum(p.numel() for p in model.parameters()), *info["missing_keys"], *info["unexpected_keys"])
"""


@pytest.mark.slow
def test_the_students_folder_opens_without_kdtoolkit(tmp_path, data, processor):
    run = trainer(tmp_path, data, processor, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / "methods.safetensors").exists()
    assert not list(tmp_path.rglob("*.bin"))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "student")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(sum(p.numel() for p in run.model.student.parameters()))


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path, data, boxes, pictures):
    torch.save(boxes, tmp_path / "boxes.pt")
    torch.save([torch.from_numpy(picture) for picture in pictures], tmp_path / "pictures.pt")
    script = Path(__file__).with_name("_two_trainers.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, *command],
        check=True,
        capture_output=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    names = [name for name, value in first.items() if isinstance(value, torch.Tensor) and "running" not in name]
    assert any(name.startswith("methods.") for name in names)
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert (tmp_path / "checkpoint-2" / "methods.safetensors").is_file()


def test_evaluation_runs_the_plain_student_and_the_best_is_loaded(tmp_path, data, processor):
    run = trainer(
        tmp_path, data, processor, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=1e-2
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    plain = Trainer(run.model.student, settings(tmp_path / "plain"), data_collator=collate, eval_dataset=data[:2])
    plain.label_names = ["labels"]
    assert plain.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_what_cannot_work_is_refused(tmp_path, data, processor, boxes, pictures):
    with pytest.raises(KDError, match="hand in a distiller"):
        DistillationTrainer(detector(), settings(tmp_path))
    with pytest.raises(KDError, match="not of transformers"):
        trainer(tmp_path, data, processor, student=tiny_gfl(seed=2, num_classes=2))
    run = trainer(tmp_path, data, processor)
    unequal = collate(examples(processor, boxes[:2], [pictures[0], pictures[1][:56]]))
    for model in (run.model, run.model.student):  # in training and in evaluation
        with pytest.raises(KDError, match=r"an image of \(56, 64\) pixels"):
            run.compute_loss(model, unequal)
    several = settings(tmp_path)
    several._n_gpu = 2
    with pytest.raises(KDError, match="start your script with torchrun"):
        DistillationTrainer(run.model, several)
    with pytest.raises(KDError, match="accumulation=2"):
        DistillationTrainer(Distiller(detector(seed=1), detector(seed=2), [PKD()], accumulation=2), settings(tmp_path))
