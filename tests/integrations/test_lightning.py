import logging
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from kdtoolkit import Distiller, KDError
from kdtoolkit.integrations.lightning import DistillationModule, collate
from kdtoolkit.methods import PKD
from tests.conftest import tiny_fcos, tiny_gfl

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and logging


def module(methods=None):
    torch.manual_seed(0)
    distiller = Distiller(
        tiny_gfl(seed=1, num_classes=2),
        tiny_fcos(seed=2, num_classes=2, head_channels=8, neck_channels=8),
        methods or [PKD()],
    )
    return DistillationModule(distiller, partial(torch.optim.AdamW, lr=1e-3))


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(taught, batch, folder, *callbacks, steps=4, resume=None, **changes):
    pairs = list(zip(*batch, strict=True))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1), *callbacks],
        **changes,
    )
    loaders = [DataLoader(pairs, batch_size=2, collate_fn=collate) for _ in range(2)]
    trainer.fit(taught, *loaders, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_student_learns_from_the_teacher(precision, batch, tmp_path):
    taught, losses = module(), Losses()
    before = {name: value.clone() for name, value in taught.distiller.state_dict().items() if "extra" not in name}
    trainer = fit(taught, batch, tmp_path, losses, steps=20, precision=precision)
    assert losses.seen[-1]["pkd/feature"] < 0.8 * losses.seen[0]["pkd/feature"]
    assert trainer.callback_metrics["val/loss"] > 0
    after = taught.distiller.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(name.startswith("methods.") for name in changed)
    assert any(name.startswith("student.backbone") for name in changed)


def test_resuming_goes_on_as_if_it_had_not_stopped(batch, tmp_path):
    methods = lambda: [PKD().scheduled(warmup=10)]  # noqa: E731
    whole, losses = module(methods()), Losses()
    fit(whole, batch, tmp_path, losses)
    again, later = module(methods()), Losses()
    fit(again, batch, tmp_path, later, resume=tmp_path / "step=2.ckpt")
    assert later.seen[-1]["pkd/feature"] == pytest.approx(losses.seen[-1]["pkd/feature"], rel=1e-5)
    for first, second in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(first, second)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == whole.state_dict().keys()
    assert not [name for name in saved["state_dict"] if "teacher" in name]


def test_schedules_count_optimiser_steps(batch, tmp_path):
    taught = module()
    fit(taught, batch, tmp_path, steps=3, accumulate_grad_batches=2)
    assert taught.distiller.step == 3  # the last of two batches of step 2, and the call itself


def test_schedules_in_shares_know_the_number_of_steps_of_the_run(batch, tmp_path):
    taught = module([PKD().scheduled(stop=0.5)])
    fit(taught, batch, tmp_path, steps=-1, max_epochs=3, accumulate_grad_batches=2)
    assert taught.distiller.run_steps == 3  # each epoch has two batches


def test_the_averaged_student_learns_too(batch, tmp_path):
    taught = module()
    begun = {name: value.clone() for name, value in taught.student.state_dict().items()}
    fit(taught, batch, tmp_path, EMAWeightAveraging(decay=0.5))  # at the end it hands its weights to the module
    assert any(not torch.equal(value, begun[name]) for name, value in taught.student.state_dict().items())
    plain = tiny_fcos(seed=3, num_classes=2, head_channels=8, neck_channels=8)
    plain.load_state_dict(taught.student.state_dict())
    detections = taught.eval()(batch[0])
    assert len(detections) == len(batch[0])
    assert set(detections[0]) == {"boxes", "scores", "labels"}


@pytest.mark.slow
def test_two_processes_train(batch, tmp_path):
    taught = module()
    before = next(taught.student.parameters()).clone()
    fit(taught, batch, tmp_path, steps=2, strategy="ddp_spawn", devices=2)
    assert not torch.equal(next(taught.student.parameters()), before)


def test_accumulation_is_left_to_the_trainer():
    distiller = Distiller(tiny_gfl(seed=1), tiny_fcos(seed=2), [PKD()], accumulation=2)
    with pytest.raises(KDError, match="accumulate_grad_batches"):
        DistillationModule(distiller, torch.optim.SGD)
