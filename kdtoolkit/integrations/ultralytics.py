"""Distillation inside Ultralytics' own trainer.

Ultralytics is AGPL-3.0, which binds what is built with it. kdtoolkit contains none of its code. This follows
ultralytics 8.4.190. Undocumented names used: `_load_checkpoint_state`, which the trainer calls to resume and to recover
from losses that are not finite; a checkpoint's `epoch`; a model's `criterion`; `_build_train_pipeline` and
`_get_warmup_iterations`, which settle the number of steps.

The trainer trains, averages, validates, saves and exports one module, the model. Here this module is a
`TaughtModel`: the library's DetectionModel, whose `loss` asks the distiller. Copies of it are plain DetectionModels, so
the averaged model and all files are plain too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from ultralytics.engine.model import Model
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from kdtoolkit.classes import ClassMap
from kdtoolkit.contract import DetectorAdapter, Method, Target
from kdtoolkit.detector import Detector
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import KDError
from kdtoolkit.integrations.learned import load_learned, save_learned
from kdtoolkit.libraries import adapt
from kdtoolkit.models import open_detector

Teacher = nn.Module | DetectorAdapter | Detector | str | Path
Loss = tuple[Tensor, dict[str, Tensor]]


class DistillationTrainer(DetectionTrainer):
    """Ultralytics' trainer for detection, with a teacher.

    `YOLO("yolo11n.pt").train(trainer=DistillationTrainer.of(teacher, [CrossKD(), PKD()]), data=..., epochs=...)` trains
    as without it: the same augmentation, optimiser, averaged weights, validation, files and export. The losses of the
    methods are added to the student's own, times the batch size, as the library does with its own losses.

    `weights/last.pt` and `best.pt` hold the plain student and open without kdtoolkit. What the methods learn is
    trained by the same optimiser. It lies in `weights/methods-EPOCH.safetensors` until the run is finished; to resume,
    the trainer reads it from there.

    Attributes:
        teacher: a detector of any library, the adapter of one, or what `open_detector` takes, such as "best.pt". It is
            frozen.
        methods: what to distil by. Each run works on copies of them.
        class_map: the teacher's name for a class of the data, where the names differ: {"parrot": "bird"}. Classes of
            the same name need none. If the names of the teacher's classes are not known, because it is a plain module,
            they must be the data's, in the same order.
        teacher_scale: size of the teacher's images relative to the student's, as in `Distiller`.
    """

    teacher: ClassVar[Teacher | None] = None
    methods: ClassVar[Sequence[Method]] = ()
    class_map: ClassVar[Mapping[str, str]] = {}
    teacher_scale: ClassVar[float] = 1.0
    model: Any
    args: Any
    distiller: Distiller

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        methods: Sequence[Method],
        *,
        class_map: Mapping[str, str] | None = None,
        teacher_scale: float = 1.0,
    ) -> type[DistillationTrainer]:
        """This class with its attributes set, for `YOLO.train(trainer=...)`."""
        settings = {
            "teacher": teacher,
            "methods": tuple(methods),
            "class_map": class_map or {},
            "teacher_scale": teacher_scale,
        }
        return type(cls.__name__, (cls,), settings)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refused = {"distill_model": self.args.distill_model, "compile": self.args.compile}
        if named := [name for name, value in refused.items() if value]:
            raise KDError(f"DistillationTrainer does not work with {named[0]}={refused[named[0]]}: leave it out")
        if self.args.quantize == 8:
            raise KDError(
                "DistillationTrainer does not train for int8 (quantize=8): leave it out, and quantise at export"
            )
        if self.args.time and (shares := [m for m in self.methods if m.schedule.has_shares]):
            raise KDError(
                f"the schedule of {type(shares[0]).__name__} has shares of the run, and with time={self.args.time} its "
                "number of steps is not known: give the schedule in steps, or epochs in place of time"
            )

    def get_model(self, *args: Any, **kwargs: Any) -> TaughtModel:
        """Build the library's model, with its weights."""
        return TaughtModel(super().get_model(*args, **kwargs))

    def set_model_attributes(self) -> None:
        """Give the model its settings, and its teacher. Raises KDError if the methods cannot work between the two."""
        super().set_model_attributes()
        if self.teacher is None:
            raise KDError("DistillationTrainer has no teacher: use DistillationTrainer.of(teacher, methods=[...])")
        teacher = open_detector(self.teacher) if isinstance(self.teacher, str | Path) else self.teacher
        adapter = adapt(teacher.model if isinstance(teacher, Detector) else teacher)
        adapter.model.to(self.device)
        self.distiller = Distiller(
            adapter,
            self.model,
            copy.deepcopy(list(self.methods)),
            teacher_scale=self.teacher_scale,
            class_map=self._shared_classes(_class_names(teacher)),
        )
        self.model.learn_from(self.distiller)

    def _build_train_pipeline(self) -> None:
        """Build data loaders and optimiser. From then on the schedules know the number of steps of the run."""
        super()._build_train_pipeline()
        batches = len(self.train_loader)
        warmup = self._get_warmup_iterations(batches)
        self.distiller.run_steps = _optimizer_steps(batches * self.epochs, warmup, self.accumulate)

    def _shared_classes(self, names: tuple[str, ...] | None) -> ClassMap | None:
        """The classes that the data and the teacher share. None if no method needs them, or if they are the same."""
        own = tuple(self.data["names"].values())
        if not any(method.compares_classes for method in self.methods):
            return None
        if names is None and self.class_map:
            raise KDError(
                "the teacher's class names are not known, so class_map cannot be used: name the teacher's file"
            )
        return None if names is None or names == own else ClassMap.by_name(own, names, self.class_map)

    def label_loss_items(self, loss_items: dict[str, Tensor] | None = None, prefix: str = "train") -> Any:
        """Name the losses for logs. Validation has only the student's own: the teacher takes no part in it."""
        labelled = super().label_loss_items(loss_items, prefix)
        if prefix == "train":
            return labelled
        if isinstance(labelled, dict):
            return {name: value for name, value in labelled.items() if name.count("/") == 1}
        return [name for name in labelled if name.count("/") == 1]

    def optimizer_step(self) -> None:
        """Step, and count it for the methods' schedules."""
        super().optimizer_step()
        self.taught.steps += 1

    def save_model(self) -> Any:
        """Write the library's files, and before them what the methods have learned."""
        save_learned(self.distiller, self._learned(self.epoch), step=self.taught.steps)
        saved = super().save_model()
        kept = {self._learned(self.epoch)}
        if self.save_period > 0:
            kept |= {self._learned(epoch) for epoch in range(0, self.epoch, self.save_period)}
        self._remove_learned(keep=kept)
        return saved

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        self.taught.steps = load_learned(self.distiller, self._learned(ckpt["epoch"]))
        super()._load_checkpoint_state(ckpt)

    def final_eval(self) -> None:
        """Evaluate the best weights. The run is finished, so what the methods learned is deleted."""
        super().final_eval()
        if RANK in {-1, 0}:
            self._remove_learned(keep=set())

    @property
    def taught(self) -> TaughtModel:
        """The model that is trained, without the wrappers that the trainer puts around it."""
        return cast(TaughtModel, unwrap_model(self.model))

    def _learned(self, epoch: int) -> Path:
        """The file of what the methods had learned after an epoch, counted from 0 as in the library's checkpoints."""
        return Path(self.wdir) / f"methods-{epoch}.safetensors"

    def _remove_learned(self, keep: set[Path]) -> None:
        for path in set(Path(self.wdir).glob("methods-*.safetensors")) - keep:
            path.unlink()


class TaughtModel(DetectionModel):
    """A DetectionModel that learns from a distiller too. Its copies are plain DetectionModels, without a teacher.

    `model` is built by the library; a TaughtModel takes over its layers and attributes. What the methods learn is a
    submodule, `methods`, so the trainer's optimiser, clipping of gradients and process group include it.

    Attributes:
        steps: the number of optimiser steps done, which the methods' schedules count.
    """

    def __init__(self, model: DetectionModel) -> None:
        nn.Module.__init__(self)  # the layers are there already
        self.__dict__.update(vars(model))
        self.steps = 0
        self._distiller: tuple[Distiller, ...] = ()  # not a submodule: the distiller holds this model
        self._metrics: dict[str, Tensor] = {}  # the last finite value of each

    def learn_from(self, distiller: Distiller) -> None:
        """From now on, losses in training are the distiller's. Its student must be this model."""
        self._distiller = (distiller,)
        self.methods = distiller.methods
        self.criterion = self.init_criterion()  # the trainer asks for it after each epoch

    def loss(self, batch: dict[str, Any], preds: Any = None) -> Loss:
        """The library's losses; in training with the methods' added to them.

        Returns the terms times the batch size, which the trainer sums up, and each term and metric for its logs.
        The logs need the same names in each step. So a term that is not at work is 0 there, and a metric keeps its last
        value; it is NaN before the first one.
        """
        if not (self._distiller and self.training) or preds is not None:
            own: Loss = super().loss(batch, preds)
            return own
        (distiller,) = self._distiller
        distiller.set_extra_state({"step": self.steps})
        images = batch["img"]
        losses = distiller(images, _targets(batch))
        count = len(images)
        terms = {f"{name.removeprefix('task/')}_loss": value for name, value in losses.items()}
        # The student's own terms are times the batch size already, and so are terms whose share beside them is held.
        plain = {name for name in terms if "/" in name and name.partition("/")[0] not in distiller.held}
        terms = {name: value * count if name in plain else value for name, value in terms.items()}
        shown = {name: value.detach() / count for name, value in terms.items()}
        shown |= {name: images.new_zeros(()) for term in distiller.terms if (name := f"{term}_loss") not in shown}
        order = [name for name in shown if "/" not in name] + [f"{term}_loss" for term in distiller.terms]
        for name in distiller.metrics:
            known = self._metrics.get(name, images.new_full((), torch.nan))
            value = losses.metrics.get(name, known)
            self._metrics[name] = torch.where(value.isfinite(), value, known)
        return torch.stack([*terms.values()]), {name: shown[name] for name in order} | self._metrics

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state. If it is a plain student's, what the methods have learned stays as it is."""
        learned = {name: value for name, value in self.state_dict().items() if name.startswith("methods.")}
        return super().load_state_dict({**learned, **state_dict}, strict, assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> DetectionModel:
        state = {name: value for name, value in vars(self).items() if name not in ("steps", "_distiller", "_metrics")}
        state["_modules"] = {name: module for name, module in self._modules.items() if name != "methods"}
        plain: DetectionModel = DetectionModel.__new__(DetectionModel)
        memo[id(self)] = plain
        plain.__dict__.update(copy.deepcopy(state, memo))
        return plain


def _optimizer_steps(batches: int, warmup: int, accumulate: int) -> int:
    """The number of optimiser steps of a run, whose steps grow from 1 to `accumulate` batches in the warm-up."""
    steps, last = 0, -1
    for batch in range(batches):
        wanted = round(np.interp(batch, [0, warmup], [1, accumulate])) if batch < warmup else accumulate
        if batch - last >= wanted:
            steps, last = steps + 1, batch
    return steps


def _class_names(teacher: nn.Module | DetectorAdapter | Detector) -> tuple[str, ...] | None:
    """The names of a teacher's classes; None if nobody has given them names."""
    if isinstance(teacher, Detector):
        return teacher.class_names
    if not isinstance(teacher, Model):
        return None
    names = tuple(teacher.names.values())
    return None if names == tuple(map(str, range(len(names)))) else names  # a model from a YAML has numbers


def _targets(batch: dict[str, Any]) -> list[Target]:
    """Ground truth of a batch of the library: one list of all boxes, sorted by image, as shares of the canvas."""
    height, width = batch["img"].shape[-2:]
    boxes = box_convert(batch["bboxes"].float(), "cxcywh", "xyxy")
    boxes = boxes * boxes.new_tensor([width, height, width, height])
    solid = (boxes[:, 2:] > boxes[:, :2]).all(1)  # the library takes boxes without an area too, and ignores them
    boxes, labels, owners = (each[solid] for each in (boxes, batch["cls"].flatten().long(), batch["batch_idx"].long()))
    counts = owners.bincount(minlength=len(batch["img"])).tolist()
    return [
        Target(boxes=own, labels=classes)
        for own, classes in zip(boxes.split(counts), labels.split(counts), strict=True)
    ]
