"""Two processes that train as one: the same losses, the same result in both, evaluation of each image once."""

import json

import pytest
import torch

from kdtoolkit import Distiller, KDError
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine import group
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.train import RunFolder, TrainConfig, Validation, train
from kdtoolkit.methods import FGD, LD, PKD, CrossKD
from tests.conftest import tiny_gfl

CLASSES = len(ProceduralShapes(1).class_names)


def run(folder):
    """Train for 20 steps; batch norm keeps its statistics, for two processes have two of them."""
    torch.set_num_threads(1)
    data = ProceduralShapes(13, image_size=64, seed=0)
    teacher = tiny_gfl(seed=1, num_classes=CLASSES)
    student = tiny_gfl(seed=2, num_classes=CLASSES, score_threshold=0.001)
    with torch.no_grad():
        for weight in teacher.predictors.parameters():  # as if trained: LD's term is lost in rounding if it is near 0
            weight.mul_(20)
    distiller = Distiller(teacher, student, [CrossKD(), PKD(), FGD(), LD()])
    config = TrainConfig(
        steps=20, batch_size=4, optimizer="sgd", lr=1e-3, warmup_steps=2, frozen_statistics=("backbone",)
    )
    train(distiller, data, config, seed=0, folder=RunFolder(folder / "run"), validation=Validation(data))
    found, alone = (evaluate(student, data, batch_size=1, together=together) for together in (True, False))
    assert found == alone  # each image once, whichever process it was in
    return student, {"ap": found.ap, "images": found.images, "detections": found.detections}


def work(rank, folder, meeting):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    student, found = run(folder)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.save(student.state_dict(), folder / f"{rank}.pt")
    (folder / "file").touch()
    unwritable = RunFolder(folder / "file" / "run")
    for name, size, where in (("batch", 3, None), ("folder", 2, unwritable)):
        try:
            train(
                Distiller(None, student),
                ProceduralShapes(8),
                TrainConfig(steps=1, batch_size=size),
                seed=0,
                folder=where,
            )
        except KDError as error:
            (folder / f"{rank}.{name}").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path, str(tmp_path / "meeting")), nprocs=2)
    _, found = run(tmp_path / "alone")
    alone, together = (
        [json.loads(line) for line in (path / "run" / "log.jsonl").read_text().splitlines()]
        for path in (tmp_path / "alone", tmp_path)
    )
    assert len(alone) == len(together) == 21  # with the evaluation at the end
    for one, two in zip(alone[:20], together[:20], strict=True):
        assert one.keys() == two.keys()
        assert two == pytest.approx(one, rel=1e-5)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0]["images"] == found["images"] == 13
    assert results[0]["detections"] > 100
    assert results[0]["ap"] == pytest.approx(found["ap"], abs=1)
    weights = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for rank in range(2):
        assert "batch_size (3) must be a multiple of 2" in (tmp_path / f"{rank}.batch").read_text()
        assert "Not a directory" in (tmp_path / f"{rank}.folder").read_text()  # the first process alone opens it


def test_processes_that_have_not_joined_are_told_to(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    distiller = Distiller(None, tiny_gfl(seed=2, num_classes=CLASSES))
    with pytest.raises(
        KDError, match=r"torchrun has started 2 processes, .* call kdtoolkit.engine.group.join\(\) first"
    ):
        train(distiller, ProceduralShapes(4, image_size=64), TrainConfig(steps=1, batch_size=2), seed=0)


def test_join_without_torchrun_names_the_device(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert group.join("cpu") == torch.device("cpu")
    assert group.join().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert group.rank() == 0
    assert group.gathered([1, 2]) == [1, 2]
