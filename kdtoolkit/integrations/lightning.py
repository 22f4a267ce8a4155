"""Distillation inside Lightning's Trainer. This follows lightning 2.6."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from kdtoolkit.contract import Detections, Target
from kdtoolkit.distiller import Distiller, Losses
from kdtoolkit.errors import KDError

Batch = tuple[Sequence[Tensor], Sequence[Target]]


class DistillationModule(LightningModule):
    """A LightningModule that trains a distiller, with automatic optimisation.

    Batches are `(images, targets)` in torchvision's convention, as `Distiller` takes them; `collate` makes them of
    single pairs. Each loss term is logged under its name (`task/cls`, `pkd/feature`), and their sum as `loss`. In
    validation, the student's own losses are logged as `val/cls` and so on, and their sum as `val/loss`. Called with
    images, the module returns the student's detections.

    Checkpoints hold the student, what the methods have learned and their step; the teacher is in none. For metrics or a
    different schedule, subclass it.

    Args:
        distiller: what is trained. It must leave accumulation to the Trainer (`accumulate_grad_batches`).
        optimizer: makes the optimiser of the parameters, or what Lightning's `configure_optimizers` may return, with a
            schedule: `lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)`.

    Raises:
        KDError: the distiller counts accumulation itself.
    """

    def __init__(self, distiller: Distiller, optimizer: Callable[[list[nn.Parameter]], Any]) -> None:
        super().__init__()
        if distiller.accumulation != 1:
            raise KDError(
                f"the distiller has accumulation={distiller.accumulation}: leave it out. Lightning's Trainer "
                "accumulates (accumulate_grad_batches) and tells the distiller its steps"
            )
        self.distiller = distiller
        self._optimizer = optimizer

    @property
    def student(self) -> nn.Module:
        """The plain student. Save it when training is done: `torch.save(module.student.state_dict(), FILE)`."""
        return self.distiller.student

    def forward(self, images: Sequence[Tensor]) -> list[Detections]:
        """The student's detections in images (3, H, W), in [0, 1]."""
        adapter = self.distiller.student_adapter
        batch = adapter.prepare(images)
        return adapter.detections(adapter.head(adapter.features(batch), batch), batch)

    def on_train_start(self) -> None:
        """Tell the methods' schedules the number of steps of the run, if the Trainer knows it."""
        steps = self.trainer.estimated_stepping_batches
        if math.isfinite(steps):
            self.distiller.run_steps = int(steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of all losses."""
        self.distiller.set_extra_state({"step": self.global_step})
        images, targets = batch
        losses: Losses = self.distiller(images, targets)
        self.log_dict({**losses, **losses.metrics, "loss": losses.total}, batch_size=len(images))
        return losses.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the student's own losses."""
        images, targets = batch
        losses: Losses = Distiller(None, self.distiller.student_adapter)(images, targets)
        named = {f"val/{name.removeprefix('task/')}": loss for name, loss in losses.items()}
        self.log_dict({**named, "val/loss": losses.total}, batch_size=len(images), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """What the function `optimizer` makes of the trainable parameters: the student's and the methods'."""
        return self._optimizer([p for p in self.distiller.parameters() if p.requires_grad])


def collate(pairs: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Make a batch of pairs (image, target), for `DataLoader(collate_fn=collate)`."""
    images, targets = zip(*pairs, strict=True)
    return images, targets
