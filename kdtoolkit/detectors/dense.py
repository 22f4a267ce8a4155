"""What one-stage detectors with two convolutional towers share: backbone, pyramid, towers, decoding, NMS.

Each detector is one file: its predictors, its loss, its assigner. Shapes and terms are as in kdtoolkit/contract.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, ParamSpec, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from kdtoolkit.boxes import clip
from kdtoolkit.canvas import Layout, lay_out
from kdtoolkit.contract import Assignment, Batch, Detections, Predictions, PriorKind, Priors, State, Target
from kdtoolkit.detectors.backbone import Pyramid, build_backbone
from kdtoolkit.detectors.precision import without_autocast
from kdtoolkit.detectors.towers import flatten, walk_towers
from kdtoolkit.errors import KDError
from kdtoolkit.winograd import over_maps

P = ParamSpec("P")
BACKBONE_STRIDES = (8, 16, 32)
PADDING = 32  # images are padded to a multiple of it
# Of each class at the start of training: otherwise the loss of the first steps is nearly all background.
PRIOR_PROBABILITY = 0.01
MAX_CANDIDATES = 1000  # per level, before NMS
EPS = torch.finfo(torch.float32).eps


class ExtraLevels(ExtraFPNBlock):
    """Coarser pyramid levels by 3x3 convolutions of stride 2, each computed from the level before it.

    With `from_input` (a number of channels) the first one is computed from the backbone's last map. With `relu` a ReLU
    stands between them. All are computed in float32 even under autocast: on some CPUs the bfloat16 weight gradient of a
    strided convolution is uninitialised memory if its map is one cell wide (torch 2.14, oneDNN).
    """

    def __init__(self, channels: int, count: int, *, from_input: int = 0, relu: bool = False) -> None:
        super().__init__()
        self.from_input = from_input
        self.relu = relu
        sources = [from_input or channels] + [channels] * count
        self.convs = nn.ModuleList(nn.Conv2d(c, channels, 3, stride=2, padding=1) for c in sources[:count])
        for conv in self.convs:
            nn.init.xavier_uniform_(cast(Tensor, conv.weight))
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the coarser levels to the pyramid's `results`."""
        levels = list(results)
        source = x[-1] if self.from_input else levels[-1]
        with without_autocast(source):
            for conv in self.convs:
                levels.append(conv(source.float()))
                source = F.relu(levels[-1]) if self.relu else levels[-1]
        return levels, [str(i) for i in range(len(levels))]


class GroupNorm(nn.GroupNorm):
    """Group norm in float32 even under autocast.

    On a CPU with channels last, it is also 7 times as fast in float32 as in bfloat16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        return super().forward(input.float())


class DenseDetector(nn.Module, ABC):
    """A timm backbone, a feature pyramid, and two towers that all levels share, with one prediction for each prior.

    It follows torchvision's convention: `model(images, targets)` returns a dict of losses in training mode,
    `model(images)` a list of {"boxes", "scores", "labels"} in eval mode. Images are (3, H, W) in [0, 1], boxes xyxy in
    pixels, labels in [0, num_classes).

    Args:
        num_classes: without background.
        backbone: name of a timm model with feature levels of strides 8, 16 and 32.
        backbone_args: further arguments of timm.create_model.
        pretrained: True loads timm's ImageNet weights of the backbone, and downloads them the first time. A path loads
            them from a file.
        strides: of the pyramid's levels: 8, 16, 32, and any number of coarser ones, each twice the one before.
        neck_channels: of the pyramid's levels.
        head_channels: of the towers.
        head_blocks: number of convolution blocks in each tower.
        head_groups: number of groups in the towers' group norm; 0 for no norm, None for what the detector's paper has.
        score_threshold: detections with a lower score are dropped before NMS.
        nms_iou: if two detections of a class have a larger IoU, the one of lower score is dropped. None for what the
            detector's paper has.
        detections_per_image: the largest number of detections that are kept.
        image_mean: subtracted from images in [0, 1], one number per channel. None for what timm names for the backbone.
        image_std: images are then divided by it, one number per channel. None for what timm names for the backbone.

    Raises:
        KDError: the backbone has no such levels or takes images of one size only, strides are not as described above,
            or channels are not divisible by groups.
    """

    usual_head_groups: ClassVar[int] = 32
    usual_nms_iou: ClassVar[float] = 0.6
    kind: ClassVar[PriorKind] = PriorKind.ANCHORS
    priors_per_cell: ClassVar[int] = 1
    has_quality: ClassVar[bool] = False
    has_scales: ClassVar[bool] = True  # a learned factor of each level's regression
    extra_levels_from_input: ClassVar[bool] = False
    extra_levels_relu: ClassVar[bool] = False
    quality_branch: Literal["cls", "reg"] = "reg"
    bins: int = 0
    # Published name of each predictor -> name here; see kdtoolkit/detectors/published.py.
    published_predictors: ClassVar[Mapping[str, str]]

    image_mean: Tensor
    image_std: Tensor
    scales: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet50",
        backbone_args: Mapping[str, object] | None = None,
        pretrained: bool | str = False,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        neck_channels: int = 256,
        head_channels: int = 256,
        head_blocks: int = 4,
        head_groups: int | None = None,
        score_threshold: float = 0.05,
        nms_iou: float | None = None,
        detections_per_image: int = 100,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        expected = tuple(8 * 2**i for i in range(max(len(strides), len(BACKBONE_STRIDES))))
        if tuple(strides) != expected:
            raise KDError(
                f"strides are {tuple(strides)}: they must be {', '.join(map(str, expected))}. A pyramid has at least "
                "levels of strides 8, 16 and 32, and each further level has twice the stride of the one before."
            )
        head_groups = self.usual_head_groups if head_groups is None else head_groups
        if head_groups and head_channels % head_groups:
            raise KDError(f"head_channels ({head_channels}) must be a multiple of head_groups ({head_groups})")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.neck_channels = neck_channels
        self.head_channels = head_channels
        self.head_blocks = head_blocks
        self.score_threshold = score_threshold
        self.nms_iou = self.usual_nms_iou if nms_iou is None else nms_iou
        self.detections_per_image = detections_per_image

        self.backbone, levels = build_backbone(backbone, BACKBONE_STRIDES, pretrained=pretrained, args=backbone_args)
        for name, value in (
            ("image_mean", levels.mean if image_mean is None else image_mean),
            ("image_std", levels.std if image_std is None else image_std),
        ):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        extra = ExtraLevels(
            neck_channels,
            len(strides) - len(BACKBONE_STRIDES),
            from_input=levels.channels[-1] if self.extra_levels_from_input else 0,
            relu=self.extra_levels_relu,
        )
        self.neck = Pyramid(levels, neck_channels, extra)
        tower = [neck_channels] + [head_channels] * head_blocks
        self.towers = nn.ModuleDict(
            {
                branch: nn.ModuleList(conv_block(c, head_channels, head_groups) for c in tower[:-1])
                for branch in ("cls", "reg")
            }
        )
        self.predictors = nn.ModuleDict(
            {
                "cls": predictor(tower[-1], self.priors_per_cell * num_classes, bias=_logit(PRIOR_PROBABILITY)),
                "reg": predictor(tower[-1], self.priors_per_cell * 4),
            }
        )
        if self.has_quality:
            self.predictors["quality"] = predictor(tower[-1], self.priors_per_cell)
        if self.has_scales:
            self.scales = nn.Parameter(torch.ones(len(strides)))
        else:
            self.register_buffer("scales", torch.ones(len(strides)), persistent=False)

    # What a detector adds.

    @property
    @abstractmethod
    def assigner(self) -> Hashable:
        """The assigner's settings.

        If the settings of two detectors are equal (`==`), they assign the same boxes to the same priors.
        """

    @abstractmethod
    def priors(self, grid: tuple[tuple[int, int], ...]) -> Priors:
        """Priors of levels with (H, W) cells each."""

    @abstractmethod
    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Decode what is predicted for priors (A, 4) into boxes (..., A, 4)."""

    @abstractmethod
    def assign(self, predictions: Predictions, batch: Batch) -> Assignment:
        """Assign the batch's ground truth to the priors."""

    @abstractmethod
    def losses(self, predictions: Predictions, assignment: Assignment) -> dict[str, Tensor]:
        """Compute the loss terms, float32 scalars."""

    # The pipeline.

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Return losses in training mode, detections in eval mode."""
        if self.training and targets is None:
            raise KDError("a detector in training mode needs targets; call model.eval() to detect")
        if targets is not None:
            self._check_labels(torch.cat([target["labels"] for target in targets]))
        batch = self.prepare(images, targets)
        *_, state = self.walk_towers(self.entry(self.features(batch.images)))
        predictions = self.predict(state)
        if self.training:
            return self.losses(predictions, self.assign(predictions, batch))
        return self.postprocess(predictions, batch)

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Normalise images (3, H, W) in [0, 1], and pad them at the right and bottom to one canvas.

        `like`: a batch of the same images. With it the images get the same sizes, and the canvas the same size, as
        there. The canvas is padded further if the detector needs it.
        """
        layout = Layout.padded(images, PADDING) if like is None else Layout.of(like, PADDING)
        return lay_out(images, targets, layout, mean=self.image_mean, std=self.image_std)

    def _check_labels(self, labels: Tensor) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise KDError(
                f"targets have labels {int(labels.min())} to {int(labels.max())}; "
                f"this detector's {self.num_classes} classes are 0 to {self.num_classes - 1}"
            )

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute pyramid levels (N, C, H, W), finest first, from normalised images (N, 3, H, W)."""
        return tuple(self.neck.of(self.backbone(images)).values())

    def entry(self, features: tuple[Tensor, ...]) -> State:
        """The state at stage 0: the pyramid enters both towers."""
        return dict.fromkeys(self.towers, features)

    def walk_towers(self, state: State, stage: int = 0) -> Iterator[State]:
        """Yield the hidden states, before the activation, from `stage`, whose state is given, to the end."""
        towers = {branch: [[*cast(nn.ModuleList, tower)]] * len(self.strides) for branch, tower in self.towers.items()}
        return walk_towers(state, towers, stage, F.relu)

    def predict(self, state: State) -> Predictions:
        """Predict for all priors from the towers' last state."""
        cls, reg = ([F.relu(x) if self.head_blocks else x for x in state[branch]] for branch in ("cls", "reg"))
        grid = tuple((level.shape[-2], level.shape[-1]) for level in cls)
        quality = None
        if self.has_quality:
            states = cls if self.quality_branch == "cls" else reg
            quality = flatten(self._predicted("quality", states), 1)[..., 0]
        sides = [level.float() * scale for level, scale in zip(self._predicted("reg", reg), self.scales, strict=True)]
        return Predictions(
            logits=flatten(self._predicted("cls", cls), self.num_classes),
            regression=self.shape_regression(flatten(sides, sides[0].shape[1] // self.priors_per_cell)),
            priors=self.priors(grid),
            decode=self.decode,
            quality=quality,
        )

    def _predicted(self, name: str, maps: Sequence[Tensor]) -> list[Tensor]:
        """What a predictor says of each level."""
        return over_maps(self.predictors[name], maps)

    def shape_regression(self, regression: Tensor) -> Tensor:
        """Turn the scaled output (N, A, C) of the regression predictor into `Predictions.regression`."""
        return regression

    @torch.no_grad()
    def postprocess(self, predictions: Predictions, batch: Batch) -> list[Detections]:
        """Threshold, keep the best of each level, and run NMS by class.

        Threshold and choice use the class probability. Order and NMS use its product with the quality, if there is one.
        Boxes are in pixels of the original images, and clipped to them.
        """
        probabilities = predictions.probabilities
        images, priors, labels = self._candidates(probabilities, predictions.priors.per_level)
        scores = probabilities[images, priors, labels]
        if predictions.quality is not None:
            scores = scores * predictions.quality.sigmoid()[images, priors]
        sizes = torch.tensor(batch.sizes, device=scores.device, dtype=torch.float32)
        boxes = self.decode(predictions.regression[images, priors], select(predictions.priors, priors))
        boxes = clip(boxes, sizes[images])
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(-1)
        images, labels, scores, boxes = images[solid], labels[solid], scores[solid], boxes[solid]
        original = torch.tensor(batch.original_sizes, device=scores.device, dtype=torch.float32)
        factors = (original / sizes).flip(-1).repeat(1, 2)
        counts = torch.bincount(images, minlength=len(sizes)).tolist()
        found: list[Detections] = []
        # Image by image, because the cost of an NMS grows with the square of its number of boxes.
        each = zip(*(torch.split(x, counts) for x in (boxes, scores, labels)), factors, strict=True)
        for image_boxes, image_scores, image_labels, factor in each:
            # batched_nms shifts the boxes of each class. In float64 they keep their precision.
            keep = batched_nms(image_boxes.double(), image_scores.double(), image_labels, self.nms_iou)
            keep = keep[: self.detections_per_image]
            found.append(
                {"boxes": image_boxes[keep] * factor, "scores": image_scores[keep], "labels": image_labels[keep]}
            )
        return found

    def _candidates(self, probabilities: Tensor, per_level: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Image, prior and class of all that pass the threshold, at most MAX_CANDIDATES per image and level."""
        passing = probabilities > self.score_threshold
        levels = (torch.split(x, list(per_level), 1) for x in (probabilities, passing))
        for level, ok in zip(*levels, strict=True):
            if level[0].numel() > MAX_CANDIDATES:
                best = level.flatten(1).topk(MAX_CANDIDATES).indices
                top = torch.zeros_like(level, dtype=torch.bool).flatten(1).scatter_(1, best, True)
                ok &= top.view_as(ok)
        images, priors, labels = passing.nonzero(as_tuple=True)
        return images, priors, labels


def conv_block(in_channels: int, channels: int, groups: int) -> nn.Sequential:
    """Build a 3x3 convolution and group norm, without activation.

    With 0 groups there is no norm, and a bias instead.
    """
    conv = predictor(in_channels, channels)
    if not groups:
        return nn.Sequential(conv)
    conv.bias = None
    return nn.Sequential(conv, GroupNorm(groups, channels))


def predictor(in_channels: int, channels: int, bias: float = 0.0) -> nn.Conv2d:
    """Build a 3x3 convolution with small random weights."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, bias)
    return conv


def select(priors: Priors, index: Tensor) -> Priors:
    """Choose the priors (A, 4) at `index` (P,), to decode only some predictions."""
    return Priors(priors.boxes[index], priors.strides[index])


def cell_priors(
    grid: tuple[tuple[int, int], ...], strides: tuple[int, ...], shapes: Tensor, device: torch.device
) -> Priors:
    """Build priors with the same `shapes` (P, 4) in each cell: xyxy, in strides from the cell's first pixel."""
    boxes, cell_strides = [], []
    for (height, width), stride in zip(grid, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        # Scaled before they are moved, as in published code: rounding decides which anchors tie for an object.
        moved = torch.stack([x, y, x, y], -1).view(-1, 1, 4) * float(stride) + shapes * stride
        boxes.append(moved.view(-1, 4))
        cell_strides.append(torch.full(boxes[-1].shape[:1], float(stride)))
    return Priors(torch.cat(boxes).to(device), torch.cat(cell_strides).to(device), grid)


def cached_by_grid(build: Callable[P, Priors]) -> Callable[P, Priors]:
    """Keep the last 64 priors that `build` has made, but not while an exporter or compiler follows it."""
    # A tensor made in inference mode could not be trained with later.
    cached: Any = lru_cache(maxsize=64)(torch.inference_mode(False)(build))

    def built(*args: P.args, **kwargs: P.kwargs) -> Priors:
        return build(*args, **kwargs) if torch.compiler.is_compiling() else cast(Priors, cached(*args, **kwargs))

    return built


@cached_by_grid
def square_anchors(
    grid: tuple[tuple[int, int], ...], strides: tuple[int, ...], scale: float, device: torch.device
) -> Priors:
    """Build one square anchor per cell, `scale` strides wide, with its centre on the cell's first pixel."""
    half = scale / 2
    return cell_priors(grid, strides, torch.tensor([[-half, -half, half, half]]), device)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
