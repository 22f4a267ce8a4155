"""Distillation inside the Trainer of transformers.

The Trainer trains one module: here the distiller, whose student is one of the library's detectors. Batches are the
library's: what an image processor makes of images and annotations. The distiller takes images in [0, 1], so they are
brought back there by the processor's mean and std. It normalises them again for each detector as that one needs.

This follows transformers 5.24. Undocumented names used: the Trainer's `_save`, `_load_from_checkpoint` and
`_load_best_model`, which write and read a model's files, and `_set_signature_columns_if_needed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import Trainer

from kdtoolkit.adapters.transformers import build_model
from kdtoolkit.adapters.transformers.base import TransformersAdapter
from kdtoolkit.adapters.transformers.processing import Processing
from kdtoolkit.contract import Target
from kdtoolkit.distiller import Distiller, Losses
from kdtoolkit.errors import KDError
from kdtoolkit.integrations.learned import load_learned, save_learned

LEARNED = "methods.safetensors"


class DistillationTrainer(Trainer):
    """The library's Trainer for a distiller: `DistillationTrainer(Distiller(teacher, student, methods), args, ...)`.

    It takes what Trainer takes. Its `model` is a Distiller, whose student is a detector of transformers; the teacher
    may be of any library. Its data give `pixel_values` and `labels`, and may give `pixel_mask`, as the library's image
    processors do; `collate` makes batches of them. Give the processor as `processing_class`: its normalisation is then
    undone, and it is saved with the student.

    Each checkpoint is a folder of `save_pretrained` with the plain student. What the methods learn lies beside it, in
    `methods.safetensors`; to resume, the trainer reads both. Evaluation runs the plain student, with its own loss.

    Raises:
        KDError: the model is no Distiller, its student is not of transformers, the distiller counts accumulation
            itself, which is the Trainer's part here, or the Trainer would use several GPUs in one process.
    """

    model: Distiller
    processing_class: Any
    loss_is_scaled_for_ga = False  # the Trainer divides it by the number of accumulated batches

    def __init__(self, model: Distiller, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, Distiller):
            raise KDError(
                f"model is a {type(model).__name__}: hand in a distiller, as in "
                "DistillationTrainer(Distiller(teacher, student, methods=[...]), args)"
            )
        adapter = model.student_adapter
        if not isinstance(adapter, TransformersAdapter):
            raise KDError(
                f"the student is a {type(model.student).__name__}, which is not of transformers, so its Trainer cannot "
                "save it: use kdtoolkit.engine.train.train, or a loop of your own (docs/integrations.md)"
            )
        if model.accumulation != 1:
            raise KDError(
                f"the distiller has accumulation={model.accumulation}: leave it out. The Trainer accumulates "
                "(gradient_accumulation_steps) and tells the distiller its steps"
            )
        super().__init__(model, *args, **kwargs)
        if self.args.n_gpu > 1:
            raise KDError(
                f"the Trainer sees {self.args.n_gpu} GPUs in one process, and a distiller trains on one: start your "
                "script with torchrun --nproc-per-node, or let it see one GPU, as in CUDA_VISIBLE_DEVICES=0"
            )
        self.label_names = ["labels"]
        processing = None if self.processing_class is None else Processing(self.processing_class)
        self._mean = torch.tensor(adapter.image_mean if processing is None else processing.mean).view(3, 1, 1)
        self._std = torch.tensor(adapter.image_std if processing is None else processing.std).view(3, 1, 1)
        self._masked = adapter.masked
        self._terms: dict[str, tuple[Tensor, int]] = {}  # each term's sum since the last log, and of how many

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of the distiller's losses; in evaluation, the student's own loss and its outputs.

        Raises KDError if boxes are relative to images that are smaller than the canvas, and the student masks no
        padding: to the library, its boxes are relative to the canvas.
        """
        if not self._masked:
            self._check_sizes(inputs)
        if model is self.model.student:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.model.set_extra_state({"step": self.state.global_step})
        self.model.run_steps = self.state.max_steps or self.model.run_steps
        losses: Losses = model(*self._unprocessed(inputs))
        for name, value in {**losses, **losses.metrics}.items():
            known, count = self._terms.get(name, (torch.zeros_like(value), 0))
            self._terms[name] = known + value.detach(), count + 1
        total = sum(losses.values(), start=torch.zeros((), device=self.args.device))
        return (total, losses) if return_outputs else total

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the plain student on the library's batch."""
        return super().prediction_step(self.model.student, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with the loss the mean of each of its terms since the last time."""
        if "loss" in logs:
            logs |= {name: float(known) / count for name, (known, count) in self._terms.items()}
            self._terms = {}
        super().log(logs, *args, **kwargs)

    def _unprocessed(self, inputs: Mapping[str, Any]) -> tuple[list[Tensor], list[Target]]:
        """Images in [0, 1] without padding, and boxes in pixels, of a batch of the library."""
        pixels = inputs["pixel_values"].float()
        canvas = pixels.shape[-2:]
        mask = inputs.get("pixel_mask")
        sizes = [canvas] * len(pixels) if mask is None else _sizes(mask)
        pixels = pixels * self._std.to(pixels.device) + self._mean.to(pixels.device)
        images = [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]
        targets = []
        for label, content in zip(inputs["labels"], sizes, strict=True):
            # Boxes are shares of `size`: the image, or the canvas where the library's processor has padded.
            size = torch.as_tensor(label.get("size", content if self._masked else canvas))
            boxes = box_convert(label["boxes"].float().reshape(-1, 4), "cxcywh", "xyxy")
            targets.append(Target(boxes=boxes * size.to(boxes).flip(0).repeat(2), labels=label["class_labels"]))
        return images, targets

    def _check_sizes(self, inputs: Mapping[str, Any]) -> None:
        """Raise KDError if boxes of a batch are relative to anything but the canvas."""
        canvas = tuple(inputs["pixel_values"].shape[-2:])
        for label in inputs["labels"]:
            size = tuple(torch.as_tensor(label.get("size", canvas)).tolist())
            if size != canvas:
                raise KDError(
                    f"an image of {size} pixels (height, width) is padded to {canvas}, and "
                    f"{type(self.model.student).__name__} does not mask padding: let the image processor resize all "
                    "images to one size, as in size={'height': 640, 'width': 640}"
                )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the plain student; into a checkpoint also what the methods have learned."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            save_learned(self.model, Path(output_dir) / LEARNED, step=self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        student: Any = self.model.student
        student.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load(str(self.state.best_model_checkpoint))

    def _load(self, folder: str) -> None:
        """Load the student and what the methods had learned from a checkpoint."""
        load_learned(self.model, Path(folder) / LEARNED)
        saved = build_model(folder, self.model.student_adapter.spec.num_classes, {})
        self.model.student.load_state_dict(saved.state_dict())

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["pixel_values", "pixel_mask", *self.label_names]


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch of what an image processor gave for single images, for `data_collator`.

    Images of different sizes are padded at the right and bottom, and `pixel_mask` says where they are. Boxes stay as
    they are; `size` of an image's labels is what they are relative to.
    """
    images = [torch.as_tensor(item["pixel_values"]) for item in items]
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[-2], : image.shape[-1]] = image
        mask[i, : image.shape[-2], : image.shape[-1]] = torch.as_tensor(items[i].get("pixel_mask", 1))
    labels = [
        {"size": torch.tensor(image.shape[-2:]), **item["labels"]} for image, item in zip(images, items, strict=True)
    ]
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}


def _sizes(mask: Tensor) -> list[tuple[int, int]]:
    """Height and width of each image of a mask (N, H, W), which is 1 where the image is: at the top left."""
    sides = torch.stack([mask.amax(2).sum(1), mask.amax(1).sum(1)], 1)
    return [(height, width) for height, width in sides.tolist()]
