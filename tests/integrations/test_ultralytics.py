import csv
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("ultralytics")

from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils.dist import generate_ddp_file

from kdtoolkit import Distiller, KDError
from kdtoolkit.adapters.torchvision.dense import FCOSAdapter
from kdtoolkit.classes import ClassMap
from kdtoolkit.integrations.ultralytics import DistillationTrainer, TaughtModel
from kdtoolkit.methods import PKD, CrossKD
from tests.adapters.test_ultralytics import tiny

TINY = [0.33, 0.0625, 1024]  # depth, width, and most channels


@pytest.fixture(scope="session")
def student_file(tmp_path_factory):
    config = {**yaml_model_load("yolo11n.yaml"), "nc": 2, "scales": {"n": TINY}}
    file = tmp_path_factory.mktemp("model") / "yolo11n-tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def teacher(seed=1, name="yolo11n"):
    return tiny(name, seed=seed, num_classes=2)


def wider_teacher():
    """Of more channels than the student: PKD and CrossKD then learn projections."""
    return tiny(seed=1, width=0.125, num_classes=2)


def settings(data, folder, **changes):
    return {
        "data": str(data),
        "imgsz": 64,
        "epochs": 3,
        "batch": 4,
        "nbs": 4,
        "optimizer": "AdamW",
        "warmup_epochs": 0,
        "device": "cpu",
        "plots": False,
        "project": str(folder),
        "name": "run",
        "exist_ok": True,
        **changes,
    }


def log(folder):
    with (folder / "run" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(student_file, yolo_data, tmp_path_factory):
    """A folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    YOLO(student_file).train(
        trainer=DistillationTrainer.of(wider_teacher(), [CrossKD(), PKD()]), **settings(yolo_data, folder)
    )
    return folder


def test_loss_terms_stand_in_the_trainers_log(trained):
    row = log(trained)[-1]
    methods = ["train/crosskd/cls_loss", "train/crosskd/box_loss", "train/pkd/feature_loss"]
    assert [name for name in row if name.startswith("train/")][:3] == [
        "train/box_loss",
        "train/cls_loss",
        "train/dfl_loss",
    ]
    assert all(float(row[name]) > 0 for name in methods)
    assert not [name for name in row if name.startswith("val/") and "pkd" in name]


PLAIN = """
import sys
sys.modules["kdtoolkit"] = None  # from now on it cannot be imported
from ultralytics import YOLO
for file in sys.argv[2:]:
    model = YOLO(file)
    print(type(model.model).__name__, sum(p.numel() for p in model.model.parameters()))
    model.predict(sys.argv[1], imgsz=64, verbose=False, save=False)
print(model.export(format="torchscript", imgsz=64))
"""


@pytest.mark.slow
def test_files_open_without_kdtoolkit(trained, student_file, yolo_data):
    files = [trained / "run" / "weights" / f"{name}.pt" for name in ("best", "last")]
    assert all(b"kdtoolkit" not in file.read_bytes() for file in files)
    picture = yolo_data.parent / "images" / "val" / "0.png"
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(picture), *map(str, files)], capture_output=True, text=True, check=True
    )
    numbers = sum(p.numel() for p in YOLO(student_file).model.parameters())
    assert done.stdout.count(f"DetectionModel {numbers}") == 2
    assert done.stdout.rstrip().endswith("last.torchscript")


def test_a_finished_run_leaves_nothing_of_the_methods_in_its_folder(trained):
    assert not [*(trained / "run" / "weights").glob("*.safetensors")]


@pytest.mark.slow
def test_the_averaged_student_comes_to_resemble_the_teacher(student_file, yolo_data, tmp_path, batch):
    guide, apart = teacher(), {}
    for name, methods in {"plain": [], "taught": [PKD()]}.items():
        torch.manual_seed(0)
        YOLO(student_file).train(
            trainer=DistillationTrainer.of(guide, methods),
            **settings(yolo_data, tmp_path / name, epochs=20, batch=2, nbs=2, mosaic=0.0, lr0=0.01, val=False),
        )
        apart[name] = features_apart(guide, YOLO(tmp_path / name / "run" / "weights" / "last.pt").model, batch)
    losses = [float(row["train/pkd/feature_loss"]) for row in log(tmp_path / "taught")]
    assert losses[-1] < 0.7 * losses[0]
    assert apart["taught"] < 0.7 * apart["plain"]


def features_apart(guide, student, batch):
    """PKD's loss between two detectors of equal channels, where it learns nothing."""
    distiller = Distiller(guide, student.float().requires_grad_(True), [PKD()])
    distiller.eval()
    with torch.no_grad():
        return float(distiller(*batch)["pkd/feature"])


def library_batch(batch):
    images, targets = batch
    boxes = torch.cat([target["boxes"] for target in targets])
    return {
        "img": torch.stack(images),
        "cls": torch.cat([target["labels"] for target in targets]).float()[:, None],
        "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / 64,
        "batch_idx": torch.arange(len(images)).float(),
    }


def taught(methods, name="yolo11n", guide=None):
    from ultralytics.cfg import get_cfg

    model = TaughtModel(teacher(seed=2, name=name))
    model.args = get_cfg()
    model.requires_grad_(True)
    model.learn_from(Distiller(wider_teacher() if guide is None else guide, model, methods))
    return model.train()


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_without_methods_the_losses_are_the_librarys(name, batch):
    model, plain = taught([], name), teacher(seed=2, name=name).train()
    plain.args = model.args
    if name == "yolo26n":
        model.criterion.update()  # at the second epoch, which shifts weight between its two heads
        plain.criterion = plain.init_criterion()
        plain.criterion.update()
    total, _ = model(library_batch(batch))
    expected, _ = plain(library_batch(batch))
    torch.testing.assert_close(total.sum(), expected.sum())


def test_losses_of_methods_are_times_the_batch_size_as_the_librarys_are(batch):
    model = taught([PKD()], guide=teacher())
    distiller = Distiller(teacher(), teacher(seed=2).requires_grad_(True).train(), [PKD()])
    total, logged = model(library_batch(batch))
    losses = distiller(*batch)
    own = sum(loss for name, loss in losses.items() if name.startswith("task/"))
    torch.testing.assert_close(total.sum(), own + 4 * losses["pkd/feature"])
    torch.testing.assert_close(logged["pkd/feature_loss"], losses["pkd/feature"].detach())


def test_a_share_is_held_beside_the_librarys_losses(batch):
    model = taught([PKD().held_at(share=0.2)], guide=teacher())
    total, logged = model(library_batch(batch))
    parameters = [p for name, p in model.named_parameters() if not name.startswith("methods.")]
    own, task = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in (total[-1], total[:-1].sum())
    )
    norms = [
        torch.stack([each[i].norm() for i, g in enumerate(own) if g is not None and task[i] is not None]).norm()
        for each in (own, task)
    ]
    assert (norms[0] / sum(norms)).item() == pytest.approx(0.2, rel=1e-3)
    assert logged["pkd/factor"] > 0


@pytest.mark.parametrize(
    ("schedule", "works"),
    [({"start": 1}, [False, True, True]), ({"every": 2}, [True, False, True]), ({"stop": 1}, [True, False, False])],
)
def test_the_log_has_the_same_names_in_each_step(schedule, works, batch):
    model = taught([PKD().scheduled(**schedule).held_at(share=0.2)], guide=teacher())
    found = []
    for step in range(3):
        model.steps = step
        found.append(model(library_batch(batch))[1])
    own = ["box_loss", "cls_loss", "dfl_loss"]
    assert all([*items] == [*own, "pkd/feature_loss", "pkd/factor", "pkd/share"] for items in found)
    assert [float(items["pkd/feature_loss"]) > 0 for items in found] == works
    assert [bool(items["pkd/share"].isfinite()) for items in found] == [any(works[: i + 1]) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_student_and_what_methods_learn(dtype, batch):
    model = taught([PKD()])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total, _ = model(library_batch(batch))
    total[-1].backward()  # of PKD alone
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "model.0.conv.weight" in names
    assert any(name.startswith("methods.") for name in names)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_images_without_objects_train(batch):
    model = taught([CrossKD(), PKD()])
    total, _ = model(
        {**library_batch(batch), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    )
    assert total.sum().isfinite()


class Stop(Exception):
    pass


def stop(trainer):
    """At the end of the second epoch, after its checkpoint."""
    if trainer.epoch == 1:
        raise Stop


@pytest.fixture
def stopped(student_file, yolo_data, tmp_path):
    """A run that was stopped, and what its methods had learned by then."""
    model = YOLO(student_file)
    model.add_callback("on_model_save", stop)
    with pytest.raises(Stop):
        model.train(
            trainer=DistillationTrainer.of(wider_teacher(), [PKD()]), **settings(yolo_data, tmp_path, save_period=1)
        )
    return tmp_path, {name: value.clone() for name, value in model.trainer.taught.methods.state_dict().items()}


def test_resuming_goes_on_with_what_methods_learned_and_their_step(stopped):
    folder, learned = stopped
    found = {}

    def keep(trainer):
        found["steps"], found["epoch"] = trainer.taught.steps, trainer.start_epoch
        found["state"] = {name: value.clone() for name, value in trainer.taught.methods.state_dict().items()}

    model = YOLO(folder / "run" / "weights" / "last.pt")
    model.add_callback("on_pretrain_routine_end", keep)
    model.train(resume=True, trainer=DistillationTrainer.of(wider_teacher(), [PKD()]))
    assert (found["steps"], found["epoch"]) == (4, 2)  # two epochs of two batches
    assert found["state"].keys() == learned.keys()
    assert all(torch.equal(found["state"][name], learned[name]) for name in learned)
    assert len(log(folder)) == 3
    assert model.trainer.taught.steps == 6


def test_resuming_with_different_methods_is_refused(stopped):
    folder, _ = stopped
    model = YOLO(folder / "run" / "weights" / "last.pt")
    with pytest.raises(KDError, match="written with the methods PKD, and this run has CrossKD"):
        model.train(resume=True, trainer=DistillationTrainer.of(wider_teacher(), [CrossKD()]))
    (folder / "run" / "weights" / "methods-1.safetensors").unlink()
    model = YOLO(folder / "run" / "weights" / "last.pt")
    with pytest.raises(KDError, match=r"methods-1.safetensors is missing"):
        model.train(resume=True, trainer=DistillationTrainer.of(wider_teacher(), [PKD()]))


@pytest.mark.slow
def test_losses_that_are_not_finite_are_recovered_from_the_last_checkpoint(student_file, yolo_data, tmp_path):
    model = YOLO(student_file)

    def spoil(trainer):
        if trainer.epoch == 1 and not trainer.nan_recovery_attempts:
            trainer.loss = torch.tensor(float("nan"))

    model.add_callback("on_train_epoch_end", spoil)
    model.train(trainer=DistillationTrainer.of(wider_teacher(), [PKD()]), **settings(yolo_data, tmp_path))
    assert [row["epoch"] for row in log(tmp_path)] == ["1", "2", "3"]
    assert model.trainer.taught.steps == 6


@pytest.mark.slow
def test_a_teacher_of_a_different_library(student_file, yolo_data, tmp_path):
    torch.manual_seed(1)
    fcos = FCOSAdapter.examples()["torchvision FCOS"](2)
    model = YOLO(student_file)
    model.train(trainer=DistillationTrainer.of(fcos, [PKD()]), **settings(yolo_data, tmp_path, epochs=1))
    assert float(log(tmp_path)[0]["train/pkd/feature_loss"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("opened", [str, YOLO])
def test_classes_are_matched_by_name_with_a_teacher_from_a_file(opened, trained, student_file, yolo_data, tmp_path):
    swapped = tmp_path / "data.yaml"
    swapped.write_text(yolo_data.read_text().replace("[red, green]", "[green, pink]"))
    file = trained / "run" / "weights" / "best.pt"
    model = YOLO(student_file)
    model.train(
        trainer=DistillationTrainer.of(opened(file), [CrossKD()], class_map={"pink": "red"}),
        **settings(swapped, tmp_path, epochs=1),
    )
    assert model.trainer.distiller.class_map == ClassMap(student=(0, 1), teacher=(1, 0))
    with pytest.raises(KDError, match="class_map cannot be used"):
        model.train(
            trainer=DistillationTrainer.of(teacher(), [CrossKD()], class_map={"pink": "red"}),
            **settings(swapped, tmp_path, epochs=1),
        )


def test_schedules_in_shares_know_the_number_of_steps_of_the_run(student_file, yolo_data, tmp_path):
    model = YOLO(student_file)
    model.train(
        trainer=DistillationTrainer.of(teacher(), [PKD().scheduled(start=0.3, stop=0.6)]),
        **settings(yolo_data, tmp_path, batch=2, nbs=6, warmup_epochs=1, val=False),
    )
    assert model.trainer.distiller.run_steps == model.trainer.taught.steps == 5  # 1 + 1 + 2 + 3 + 3 of 12 batches
    assert [float(row["train/pkd/feature_loss"]) > 0 for row in log(tmp_path)] == [True, True, False]
    with pytest.raises(KDError, match=r"with time=1\.0 its number of steps is not known"):
        model.train(
            trainer=DistillationTrainer.of(teacher(), [PKD().scheduled(stop=0.6)]),
            **settings(yolo_data, tmp_path, time=1.0),
        )


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"distill_model": "x.pt"}, "distill_model=x.pt"), ({"compile": True}, "compile"), ({"quantize": 8}, "int8")],
)
def test_options_that_would_not_work_are_refused(option, reason, student_file, yolo_data, tmp_path):
    with pytest.raises(KDError, match=reason):
        YOLO(student_file).train(
            trainer=DistillationTrainer.of(teacher(), [PKD()]), **settings(yolo_data, tmp_path, **option)
        )


@pytest.mark.slow
def test_processes_that_the_library_starts_build_the_same_trainer(student_file, yolo_data, tmp_path):
    """For several GPUs the library pickles the trainer's class, and its processes build it again from that file."""
    pytest.importorskip("cloudpickle")
    kind = DistillationTrainer.of(wider_teacher(), [PKD()])
    trainer = kind(overrides=settings(yolo_data, tmp_path, model=str(student_file), epochs=1))
    file = generate_ddp_file(trainer)
    subprocess.run([sys.executable, file], check=True, capture_output=True)
    assert float(log(tmp_path)[0]["train/pkd/feature_loss"]) > 0


def still(model):
    """Batch norms compute their statistics from the images of one process, so here they keep what they have."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def half(rank, folder, batch):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(3)
    model = still(taught([PKD()]))
    whole = library_batch(batch)
    own = {name: value[2 * rank : 2 * rank + 2] for name, value in whole.items()}
    own["batch_idx"] = own["batch_idx"] - 2 * rank
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    total, _ = wrapped(own)
    (2 * total.sum()).backward()  # as in the trainer
    torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_methods_the_gradients_of_one(batch, tmp_path):
    torch.multiprocessing.spawn(half, (str(tmp_path), batch), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(3)
    model = still(taught([PKD()]))
    total, _ = model(library_batch(batch))
    total.sum().backward()
    learned = {name: p.grad for name, p in model.named_parameters() if name.startswith("methods.")}
    assert learned
    for name, gradient in learned.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)
