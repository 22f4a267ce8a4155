"""What all adapters of transformers share: batches, labels, priors made of queries, matching, postprocessing.

Follows transformers 5.23. Its detectors give boxes as (centre x, centre y, width, height) in [0, 1].
`Predictions.regression` holds them so (the library's `pred_boxes`), and `decode` turns them into xyxy pixels.

Private name used: `TimmBackbone._backbone`, for its strides.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.ops import box_convert

from kdtoolkit import processes
from kdtoolkit.adapters.transformers.processing import Processing, published_processing
from kdtoolkit.canvas import Layout, check_images, lay_out
from kdtoolkit.contract import (
    Assignment,
    Batch,
    ClassRows,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    Stage,
    State,
    Target,
)
from kdtoolkit.errors import KDError
from kdtoolkit.graph import Detected, best, best_first, normalised, pad

BRANCH = "decoder"
# The library's names of what predicts classes.
_CLASS_LAYERS = ("class_labels_classifier", "class_embed", "enc_score_head", "enc_out_class_embed")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Queries:
    """What enters a decoder: the `context` of priors that are queries.

    `content` and `positions` are (N, Q, C). `references` are points (N, Q, 2) or boxes (N, Q, 4) as (centre x, centre
    y, width, height), in [0, 1]. A detector that has no positions or references has None.
    """

    content: Tensor
    positions: Tensor | None = None
    references: Tensor | None = None


class TransformersAdapter(DetectorAdapter):
    """Base of all adapters of transformers' detectors.

    Stage 0 is the queries; stage i is the state after decoder layer i.

    Args:
        model: the detector, one of the library's `...ForObjectDetection`.
        image_mean: subtracted from images in [0, 1], one number per channel. None: the mean of the image processor
            that lies with the loaded model (in its folder or repository). If there is none, the default of the
            adapter's class.
        image_std: images are then divided by it, one number per channel. None: as for `image_mean`.
        size_divisor: images are padded to multiples of it, in pixels.

    Raises:
        KDError: the adapter cannot show such a model, or the library itself cannot run it.
    """

    model: Any
    kind: ClassVar[type[nn.Module]]
    family: ClassVar[str]
    default_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    default_std: ClassVar[tuple[float, ...]] = IMAGENET_STD
    # Whether the model masks padding. Then boxes are relative to each image's content, else to the canvas.
    masked: ClassVar[bool] = True
    square: ClassVar[bool] = False  # whether canvases are padded to squares
    activation: ClassVar[Literal["sigmoid", "softmax"]] = "sigmoid"
    # The library's image processor, used for its postprocessing only.
    processor: ClassVar[type[Any]]

    def __init__(
        self,
        model: nn.Module,
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        size_divisor: int = 32,
    ) -> None:
        super().__init__(model)
        if reason := self.refuses():
            raise KDError(f"{type(model).__name__} {reason}")
        self.processing: Processing | None = published_processing(model, self.processor)
        mean, std = (self.processing.mean, self.processing.std) if self.processing else self.default_normalisation()
        self.image_mean = tuple(mean if image_mean is None else image_mean)
        self.image_std = tuple(std if image_std is None else image_std)
        self.size_divisor = size_divisor

    @classmethod
    @abstractmethod
    def tiny(cls, num_classes: int) -> nn.Module:
        """Build a narrow and shallow detector of this kind."""

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """One example: a narrow and shallow detector, with noise on its weights."""
        return {cls.family: partial(stirred, cls.tiny)}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is of the class that this adapter is for."""
        return isinstance(model, cls.kind)

    @property
    def backbone(self) -> tuple[str, ...]:
        """The backbone; in RF-DETR and LW-DETR without the projector, in DEIMv2 with it."""
        return ("model.backbone", "model.conv_encoder")

    @property
    def class_layers(self) -> Mapping[str, ClassRows]:
        """The predictors of classes, of decoder and encoder, and the embedding of classes for denoising."""
        background = ClassRows(after=int(self.activation == "softmax"))
        found = {}
        for name, module in self.model.named_modules():
            last = name.removesuffix(f".{name.rpartition('.')[2]}") if name.rpartition(".")[2].isdigit() else name
            if last.rpartition(".")[2] in _CLASS_LAYERS and not isinstance(module, nn.ModuleList):
                found[name] = background
            elif last.rpartition(".")[2] == "denoising_class_embed":
                found[name] = ClassRows(after=1)  # the last row pads
        return found

    def default_normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and std that published models of this kind need."""
        return self.default_mean, self.default_std

    def refuses(self) -> str | None:
        """Why this model cannot be adapted; None if it can. Asked once."""
        return None

    def image_processor(self) -> Any:
        """The library's image processor that prepares images as the adapter does.

        It is the one that the model was loaded with. Without one it normalises only. The library's processors cannot
        say "at most so large": each size that they are given enlarges smaller images, which the adapter never does.
        """
        if self.processing is not None:
            return self.processing.processor
        return self.processor(do_resize=False, image_mean=list(self.image_mean), image_std=list(self.image_std))

    def decoder_spec(
        self, *, strides: Sequence[int], width: int, layers: int, prior_form: str, channels: Sequence[int] = ()
    ) -> DetectorSpec:
        """The facts about a detector whose decoder has `layers` layers of `width` channels.

        `channels`: the channels of the encoder's levels; if empty, each has `width`.
        """
        return DetectorSpec(
            name=type(self.model).__name__,
            num_classes=self.model.config.num_labels,
            strides=tuple(strides),
            channels=tuple(channels) or (width,) * len(strides),
            priors=PriorKind.QUERIES,
            stages=tuple(
                Stage(f"decoder layer {i}" if i else "queries", {BRANCH: (width,)}, spatial=False)
                for i in range(layers + 1)
            ),
            activation=self.activation,
            prior_form=prior_form,
            masks_padding=self.masked,
        )

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Normalise, and pad at the right and bottom to the largest size, a multiple of `size_divisor`.

        Images are resized to the sizes in `like`. Without `like` they are resized only if the model was loaded with an
        image processor that does so.

        Raises KDError for images that are not (3, H, W) floats.
        """
        check_images(images)
        originals = tuple((image.shape[-2], image.shape[-1]) for image in images)
        if like is None and self.processing is not None:
            images, targets = self.processing.resized(images, targets)
        layout = Layout.padded(images, self.size_divisor) if like is None else Layout.of(like, self.size_divisor)
        return replace(self.lay_out(images, targets, layout), original_sizes=originals)

    def lay_out(self, images: Sequence[Tensor], targets: Sequence[Target] | None, layout: Layout) -> Batch:
        """Normalise the images and place them as the layout says. Padding is 0, which is the mean."""
        return lay_out(images, targets, layout, mean=self.image_mean, std=self.image_std)

    def scale(self, batch: Batch) -> Tensor:
        """(N, 4): the pixels (width, height, width, height) that each image's boxes in [0, 1] are relative to."""
        canvas = batch.images.shape[-2], batch.images.shape[-1]
        sizes = batch.sizes if self.masked else (canvas,) * len(batch.sizes)
        return torch.tensor(
            [(width, height) * 2 for height, width in sizes], dtype=torch.float32, device=batch.images.device
        )

    def library_labels(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The batch's ground truth as the library's losses take it."""
        return [
            {"class_labels": labels, "boxes": box_convert(boxes, "xyxy", "cxcywh") / scale}
            for labels, boxes, scale in zip(batch.labels, batch.boxes, self.scale(batch), strict=True)
        ]

    def priors(self, queries: Queries, batch: Batch) -> Priors:
        """Make priors of queries.

        Their boxes (N, Q, 4) are the references' boxes, or the whole image if there are no references.
        """
        scale = self.scale(batch)[:, None]
        if queries.references is None:
            whole = torch.cat([torch.zeros_like(scale[..., 2:]), scale[..., 2:]], -1)
            boxes = whole.expand(-1, queries.content.shape[1], -1)
        elif queries.references.shape[-1] == 2:
            boxes = queries.references.detach().float().repeat(1, 1, 2) * scale
        else:
            boxes = corners(queries.references.detach().float(), scale)
        return Priors(boxes, boxes.new_zeros(0), context=queries)

    def references_at(self, boxes: Tensor, batch: Batch) -> Tensor:
        """References (N, Q, 4) in [0, 1] at boxes (N, Q, 4) in pixels of the batch's canvas."""
        return box_convert(boxes.float(), "xyxy", "cxcywh") / self.scale(batch)[:, None]

    def given_queries(self, priors: Priors, batch: Batch) -> Queries:
        """The queries of given priors, with references at the priors' boxes (N, Q, 4) on this batch's canvas.

        References of another detector may be relative to something different: an image's content, or a canvas with
        other padding.
        """
        queries, scale = queries_of(priors), self.scale(batch)[:, None]
        if queries.references is None:
            return queries
        # References that are relative to the same stay as they are, to the bit. Each box is chosen by itself, because
        # a question would make a GPU's host wait.
        same = (self.priors(queries, batch).boxes == priors.boxes).all(-1, keepdim=True)
        if queries.references.shape[-1] == 2:
            moved = priors.boxes[..., :2] / scale[..., :2]
        else:
            moved = box_convert(priors.boxes, "xyxy", "cxcywh") / scale
        return replace(queries, references=torch.where(same, queries.references, moved))

    def predictions(self, logits: Tensor, boxes: Tensor, priors: Priors, batch: Batch) -> Predictions:
        """Make predictions of the library's `logits` (N, Q, K) or (N, Q, K + 1) and `pred_boxes` (N, Q, 4)."""
        return Predictions(
            logits=logits.float(),
            regression=boxes.float(),
            priors=priors,
            decode=partial(_decode, self.scale(batch)[:, None]),
            activation=self.activation,
        )

    def check_cells(self, queries: int, cells: int, field: str) -> None:
        """Raise KDError if images have fewer `cells` than the config's `field` selects of them: `queries`."""
        if cells < queries:
            raise KDError(
                f"{type(self.model).__name__} selects {queries} queries of an image's cells, and the images of this "
                f"batch have {cells}: hand in larger images, or build the model with fewer {field}"
            )

    def matcher(self) -> Any:
        """Build the library's matcher as its loss does.

        It takes outputs and labels, and returns pairs of indices per image.
        """
        raise NotImplementedError

    def criticise(
        self,
        batch: Batch,
        loss: Callable[[list[dict[str, Tensor]]], tuple[Any, Mapping[str, Tensor], Any]],
        queries: int,
    ) -> tuple[Mapping[str, Tensor], Assignment]:
        """Run the library's `loss` function on labels.

        Returns its terms, and the matching that it made for the last layer. The first `queries` queries detect.
        """
        labels = self.library_labels(batch)
        matchings: list[Any] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(args) > 1 and args[1] is labels:  # the matcher, or at the end the whole criterion
                matchings.append(output)

        # The library builds its criterion inside the function. The hook only looks on.
        with register_module_forward_hook(keep):
            _, terms, _ = loss(labels)
        return terms, self._assignment(matchings[0], queries, batch)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Match the last layer's predictions one to one, as the library does. The normaliser is the number of boxes."""
        predictions = trace.predictions
        outputs = {"logits": predictions.logits.detach(), "pred_boxes": predictions.regression.detach()}
        indices = self.matcher()(outputs, self.library_labels(batch))
        return self._assignment(indices, predictions.logits.shape[1], batch)

    def _assignment(self, indices: Sequence[tuple[Tensor, Tensor]], queries: int, batch: Batch) -> Assignment:
        """The assignment from the matcher's pairs (query, box) of each image, which lie on the host."""
        images, count = len(batch.labels), sum(map(len, batch.labels))
        device, starts = batch.images.device, accumulate(map(len, batch.labels), initial=0)
        pairs = [
            torch.stack([query, query + i * queries, box + start])
            for i, ((query, box), start) in enumerate(zip(indices, starts, strict=False))
        ]
        found = torch.cat(pairs, 1)
        rows, chosen = found[1:, found[0] < queries].to(device, non_blocking=True)
        background = self.model.config.num_labels
        labels = torch.full((images * queries,), background, device=device)
        boxes = torch.zeros(images * queries, 4, device=device)
        labels[rows], boxes[rows] = torch.cat(batch.labels)[chosen], torch.cat(batch.boxes)[chosen]
        labels = labels.view(images, queries)
        return Assignment(
            positive=labels < background,
            labels=labels,
            boxes=boxes.view(images, queries, 4),
            weights=torch.ones(images, queries, device=device),
            normaliser=processes.share(torch.full((), float(count), device=device), at_least=1),
        )

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Run the library's own postprocessing without a score threshold; sorted by falling score."""
        outputs = SimpleNamespace(logits=trace.predictions.logits, pred_boxes=trace.predictions.regression)
        height, width = batch.images.shape[-2:]
        # A box relative to the canvas reaches over that much of the original image.
        sizes = [
            (h, w) if self.masked else (h * height / content_h, w * width / content_w)
            for (h, w), (content_h, content_w) in zip(batch.original_sizes, batch.sizes, strict=True)
        ]
        found = self.processor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        orders = [result["scores"].argsort(descending=True, stable=True) for result in found]
        return [
            Detections(boxes=result["boxes"][order], scores=result["scores"][order], labels=result["labels"][order])
            for result, order in zip(found, orders, strict=True)
        ]

    def graph(self) -> nn.Module:
        """The library's own forward, with its post-processing."""
        return _Graph(self)


class _Graph(nn.Module):
    """The library's own forward on a batch of images of one size, by tensors alone."""

    def __init__(self, adapter: TransformersAdapter) -> None:
        super().__init__()
        self.model = adapter.model
        self._adapter = adapter
        parameters = inspect.signature(adapter.processor.post_process_object_detection).parameters
        self._top = parameters["top_k"].default if "top_k" in parameters else None

    def forward(self, images: Tensor) -> Detected:
        adapter, (height, width) = self._adapter, images.shape[-2:]
        resized = images if adapter.processing is None else adapter.processing.on_batch(images)
        own_height, own_width = resized.shape[-2:]
        normal = normalised(resized, adapter.image_mean, adapter.image_std)
        canvas = pad(normal, adapter.size_divisor, adapter.square, 0.0)
        mask = pad(torch.ones_like(resized[:, :1]), adapter.size_divisor, adapter.square, 0.0)[:, 0]
        outputs = self.model(pixel_values=canvas, pixel_mask=mask.long() if adapter.masked else None)
        across, down = width, height
        if not adapter.masked:  # then boxes are relative to the canvas, which reaches over more than the images
            across, down = width * canvas.shape[-1] / own_width, height * canvas.shape[-2] / own_height
        x1, y1, x2, y2 = box_convert(outputs.pred_boxes, "cxcywh", "xyxy").unbind(-1)
        boxes = torch.stack([x1 * across, y1 * down, x2 * across, y2 * down], -1)
        if adapter.activation == "softmax":  # a detection for each query, of its best class
            scores = outputs.logits.softmax(-1)[..., :-1]
            scores = scores * (scores == scores.amax(-1, keepdim=True))
        else:
            scores = outputs.logits.sigmoid()
        count = min(self._top or boxes.shape[1], scores.shape[1] * scores.shape[2])
        boxes, scores, labels = best(boxes, scores, count)
        if not adapter.masked:  # as `detections`: no boxes whose centre lies in padding
            inside = (boxes[..., 0] + boxes[..., 2] <= 2 * width) & (boxes[..., 1] + boxes[..., 3] <= 2 * height)
            boxes, scores, labels = best_first(boxes, scores * inside, labels)
        return boxes, scores, labels


def pixel_mask(batch: Batch) -> Tensor:
    """(N, H, W) int64, as the library takes it: 1 in an image's content, 0 in padding."""
    mask = torch.zeros((len(batch.sizes), *batch.images.shape[-2:]), dtype=torch.long, device=batch.images.device)
    for i, (height, width) in enumerate(batch.sizes):
        mask[i, :height, :width] = 1
    return mask


def to_tokens(level: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C)."""
    return level.flatten(2).transpose(1, 2)


def level_layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> dict[str, Any]:
    """How levels of (H, W) cells lie one after the other: keyword arguments of the library's deformable attention."""
    spatial_shapes = torch.as_tensor(shapes, dtype=torch.long, device=device)
    starts = torch.cat((spatial_shapes.new_zeros((1,)), spatial_shapes.prod(1).cumsum(0)[:-1]))
    return {"spatial_shapes": spatial_shapes, "spatial_shapes_list": list(shapes), "level_start_index": starts}


def to_state(hidden: Tensor) -> State:
    """A stage's state from hidden states (N, Q, C)."""
    return {BRANCH: (hidden.transpose(1, 2),)}


def from_state(state: State) -> Tensor:
    """The inverse of `to_state`: (N, Q, C)."""
    return state[BRANCH][0].transpose(1, 2)


def corners(boxes: Tensor, scale: Tensor) -> Tensor:
    """Turn boxes (..., 4) as (centre x, centre y, width, height) in [0, 1] into xyxy pixels; `scale` is (..., 4)."""
    return box_convert(boxes, "cxcywh", "xyxy") * scale


def _decode(scale: Tensor, regression: Tensor, priors: Priors) -> Tensor:
    return corners(regression, scale)


def queries_of(priors: Priors) -> Queries:
    """The queries that priors are made of. Raises KDError if they are made of something else."""
    if not isinstance(priors.context, Queries):
        raise KDError("these priors are not made of queries: pass trace.predictions.priors of a transformers detector")
    return priors.context


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The library's terms times their weights. Terms without a weight (counts for logging) are left out.

    A term of auxiliary outputs has a suffix, as in `loss_ce_0`, and the same weight as the term without it.
    """
    terms = {}
    for name, loss in losses.items():
        term = next((term for term in weights if name == term or name.startswith(f"{term}_")), None)
        if term is not None:
            terms[name] = loss * weights[term]
    return terms


def backbone_strides(backbone: nn.Module) -> tuple[int, ...]:
    """The strides of a backbone's maps, finest first. The backbone is one of timm's or of the library's own."""
    module: Any = getattr(backbone, "_backbone", backbone)
    if hasattr(module, "feature_info"):  # timm's
        return tuple(module.feature_info.reduction())
    config = module.config
    if hasattr(config, "patch_size") and not hasattr(config, "depths"):  # a plain vision transformer
        return (config.patch_size,) * len(module.out_indices)
    # The stem (0) and mostly the first stage have stride 4, each further stage halves: ResNet, Swin, ConvNeXt etc.
    first = 8 if getattr(config, "downsample_in_first_stage", False) else 4
    return tuple(4 if index == 0 else first * 2 ** (index - 1) for index in module.out_indices)


def stirred(build: Callable[[int], nn.Module], num_classes: int) -> nn.Module:
    """Build a detector for examples, with noise on its weights.

    Without noise some detectors answer nearly alike for all queries, and some have box layers of zeros. D-FINE's
    gradients overflow in the library for black images.
    """
    built = build(num_classes)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built
