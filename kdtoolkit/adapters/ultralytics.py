"""Ultralytics' YOLO detectors: any DetectionModel with a Detect head, such as YOLOv8, YOLOv10, YOLO11 and YOLO26.

Ultralytics is AGPL-3.0, which binds what is built with it. kdtoolkit imports it only if the user has installed it, and
contains none of its code.

Layers run in the order of nn/tasks.py, towers in that of Detect. Losses, assignment, box arithmetic and NMS are the
library's functions. This follows ultralytics 8.4.190. Undocumented names used: a layer's `f` and `i` and the model's
`save` (which outputs enter which layer); Detect's towers `cv2`, `cv3`, `one2one_cv2` and `one2one_cv3` and its
`postprocess`; make_anchors and dist2bbox; the criteria's `assigner`, and E2ELoss's `one2many.assigner`.

YOLO26 and YOLOv10 have double heads: towers that give many predictions for an object, and a copy of them that gives
one. The copy is trained on features that are cut off from the graph. States and predictions come from the first
towers, because these are dense, and gradient flows through them into the neck. `task_losses` has the losses of both.
`detections` uses the towers that the library would use: the model's `end2end` says which (in 8.4.190 the first ones,
with NMS, unless the user asks for the copy). During training the library shifts weight from the first towers to the
copy, epoch by epoch. In the library's own trainer the model has a `criterion`, which knows the weights of the epoch. An
adapter knows no epoch. So without that trainer the weights stay at the library's first values, 0.8 and 0.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from ultralytics import __version__
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.nn.modules import Detect, v10Detect
from ultralytics.utils import DEFAULT_CFG_DICT, SETTINGS, loss, ops, tal
from ultralytics.utils.downloads import attempt_download_asset
from ultralytics.utils.nms import non_max_suppression

from kdtoolkit import processes
from kdtoolkit.adapters.yolo_file import checked_config, tensors_of
from kdtoolkit.build import construct
from kdtoolkit.canvas import Layout, lay_out, scaled
from kdtoolkit.contract import (
    Assignment,
    Batch,
    ClassRows,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    HeadOutputs,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    Stage,
    State,
    Target,
    keep_states,
)
from kdtoolkit.detector import Detector, Opened
from kdtoolkit.detectors.assign import pad_targets
from kdtoolkit.detectors.towers import flatten, walk_towers
from kdtoolkit.errors import KDError
from kdtoolkit.graph import Detected, best, clip_to, pad, suppress
from kdtoolkit.options import did_you_mean
from kdtoolkit.weights import fitted

# The library is untyped.
_tasks: Any = tasks
DetectionModel: Any = tasks.DetectionModel
_loss: Any = loss
_ops: Any = ops
_tal: Any = tal
GREY = 114 / 255  # of the library's letterbox
# The settings of the library's validator.
SCORE_THRESHOLD = 0.001
NMS_IOU = 0.7
DETECTIONS_PER_IMAGE = 300

Towers = Mapping[str, Sequence[Sequence[nn.Module]]]
"""For each branch and level: blocks, and the predictor last."""


class UltralyticsAdapter(DetectorAdapter):
    """Adapter of DetectionModel. Stage 0 is the pyramid; stage i is the state of the towers after block i.

    Each level has its own towers, so the numbers of channels may differ from level to level. A `YOLO` object is
    accepted in place of the DetectionModel that it holds.

    Raises KDError if `fuse` has removed the towers that give many predictions for an object.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__(cast(nn.Module, model.model) if isinstance(model, Model) else model)
        if self._head.cv2 is None:
            raise KDError(
                "this model was fused with end2end=True. That removes the one-to-many towers, on which methods work: "
                "pass the model as it was before fuse()"
            )
        self._strides = tuple(round(stride) for stride in self._head.stride.tolist())

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Build three generations, narrow and shallow."""
        return {name: partial(_tiny, stem) for name, stem in _EXAMPLES.items()}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model`, or what a `YOLO` object holds, is a DetectionModel for boxes and classes only."""
        inner: Any = model.model if isinstance(model, Model) else model
        return isinstance(inner, DetectionModel) and type(inner.model[-1]) in (Detect, v10Detect)

    @property
    def _head(self) -> Any:
        return self.model.model[-1]

    @property
    def _towers(self) -> Towers:
        """The towers that give many predictions for an object."""
        return {"cls": self._head.cv3, "reg": self._head.cv2}

    @property
    def padding(self) -> int:
        """Canvases are padded to multiples of it, in pixels."""
        return int(max(32, *self._strides))

    @property
    def is_end_to_end(self) -> bool:
        """Whether the one-to-one towers detect, without NMS."""
        return bool(self._head.end2end)

    @property
    def _is_double(self) -> bool:
        return getattr(self._head, "one2one_cv2", None) is not None

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        towers = self._towers
        bins = self._head.reg_max if self._head.reg_max > 1 else 0
        stages = tuple(
            Stage(
                name=f"block {i}" if i else "pyramid",
                channels={branch: tuple(_channels(tower[i]) for tower in levels) for branch, levels in towers.items()},
            )
            for i in range(len(towers["cls"][0]))
        )
        return DetectorSpec(
            name=_name(self.model),
            num_classes=self._head.nc,
            strides=self._strides,
            channels=stages[0].channels["reg"],
            priors=PriorKind.POINTS,
            priors_per_cell=(1,) * len(self._strides),
            stages=stages,
            bins=tuple(map(float, range(bins))),
        )

    @property
    def backbone(self) -> tuple[str, ...]:
        """The first layers, as many as the model's configuration calls its backbone."""
        return tuple(f"model.{i}" for i in range(len(self.model.yaml["backbone"])))

    @property
    def class_layers(self) -> Mapping[str, ClassRows]:
        """The predictors of classes on each level."""
        head = f"model.{len(self.model.model) - 1}"
        towers = {name: getattr(self._head, name, None) or () for name in ("cv3", "one2one_cv3")}
        return {
            f"{head}.{name}.{i}.{len(tower) - 1}": ClassRows()
            for name, levels in towers.items()
            for i, tower in enumerate(levels)
        }

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Pad with grey to a multiple of the coarsest stride, at least of 32.

        Images are neither resized nor normalised.

        The library puts images in the middle of the canvas; here they lie at its top left.
        """
        layout = Layout.padded(images, self.padding) if like is None else Layout.of(like, self.padding)
        return lay_out(images, targets, layout, fill=GREY)

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and neck: returns the maps that enter the Detect head."""
        *layers, head = self.model.model
        outputs: list[Any] = []  # of the layers so far, if a later one takes it
        x: Any = batch.images
        for layer in layers:
            x = layer(_inputs(layer, x, outputs))
            outputs.append(x if layer.i in self.model.save else None)
        return tuple(_inputs(head, x, outputs))

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Run towers and predictors. The trace's context is the features, for the one-to-one towers."""
        states, outputs = keep_states(walk_towers(dict.fromkeys(self._towers, features), self._towers), stages)
        return HeadTrace(states[:-1], self._predictions(outputs), context=features)

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the rest of the towers, then the predictors. `trace` is not needed."""
        return self._predictions(_outputs(self._towers, state, stage))

    def _predictions(self, outputs: State) -> Predictions:
        """Turn the outputs of the predictors, maps (N, K, H, W) and (N, 4 * B, H, W), into predictions."""
        grid = tuple((level.shape[-2], level.shape[-1]) for level in outputs["reg"])
        logits, regression = (flatten(outputs[branch], outputs[branch][0].shape[1]) for branch in ("cls", "reg"))
        if self._head.reg_max > 1:
            regression = regression.view(*regression.shape[:2], 4, -1)
        return Predictions(logits, regression, self._priors(grid, logits), _decode)

    def _priors(self, grid: tuple[tuple[int, int], ...], like: Tensor) -> Priors:
        """The centres of all cells, on the device of `like`."""
        points, strides = _tal.make_anchors(_as_maps(grid, like), self._strides)
        return Priors((points * strides).repeat(1, 2), strides[:, 0], grid)

    def rebuild(self, outputs: HeadOutputs, batch: Batch) -> HeadTrace:
        """Make a pass again from its predictions."""
        priors = self._priors(outputs.grid, outputs.logits)
        return HeadTrace(
            outputs.states, Predictions(outputs.logits, outputs.regression, priors, _decode), outputs.features
        )

    def detecting(self, trace: HeadTrace) -> Predictions:
        """The predictions that detections come from: of the one-to-one towers if the model is end-to-end."""
        return self._one_to_one(trace) if self.is_end_to_end else trace.predictions

    def _one_to_one(self, trace: HeadTrace) -> Predictions:
        """The predictions of the one-to-one towers for the trace's features."""
        features = tuple(cast(Sequence[Tensor], trace.context))
        if self._head.training:  # as in the library: these towers must not change the features
            features = tuple(level.detach() for level in features)
        towers: Towers = {"cls": self._head.one2one_cv3, "reg": self._head.one2one_cv2}
        return self._predictions(_outputs(towers, dict.fromkeys(towers, features)))

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """Compute `box`, `cls` and `dfl` (`l1` if sides are no distributions), times the batch size as in the library.

        Gains (weights) come from the model's `args`. If it has none, they are the library's defaults.
        """
        one_to_one = self._one_to_one(trace) if self._is_double else None
        return self._criticise(trace.predictions, one_to_one, batch)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign by the library's task-aligned rule.

        It depends on the predictions, so two detectors never assign alike.
        """
        predictions = trace.predictions
        priors, (boxes, labels, real) = predictions.priors, pad_targets(batch.boxes, batch.labels)
        with torch.autocast(boxes.device.type, enabled=False):
            found = self._assigner(
                predictions.probabilities.detach(),
                _corners(predictions.regression.detach(), priors),
                priors.boxes[:, :2],
                labels[..., None].float(),
                boxes,
                real[..., None].float(),
            )
        return self._assignment(found)

    @cached_property
    def _assigner(self) -> Callable[..., tuple[Tensor, ...]]:
        """The library's assigner for the towers that give many predictions for an object."""
        return cast(Callable[..., tuple[Tensor, ...]], self._criteria(double=False)[1].assigner)

    def _criteria(self, *, double: bool) -> tuple[Any, Any]:
        """The library's criterion, and the part of it for the towers that give many predictions for an object."""
        model = self.model
        settings = SimpleNamespace(
            args=_hyperparameters(model),
            model=model.model,
            parameters=model.parameters,
            class_weights=getattr(model, "class_weights", None),
        )
        if not double:
            criterion: Any = _loss.v8DetectionLoss(settings)
            return criterion, criterion
        criterion = _loss.E2ELoss(settings)
        if (trained := getattr(model, "criterion", None)) is not None:
            criterion.o2m, criterion.o2o = trained.o2m, trained.o2o
        return criterion, criterion.one2many

    def _criticise(
        self, predictions: Predictions, one_to_one: Predictions | None, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The library's losses in float32, and the assignment that the losses of `predictions` used."""
        device = predictions.logits.device
        criterion, first = self._criteria(double=one_to_one is not None)
        kept = first.assigner = _Kept(first.assigner)
        raw = _as_raw(predictions)
        with torch.autocast(device.type, enabled=False):
            losses, named = criterion(
                raw if one_to_one is None else {"one2many": raw, "one2one": _as_raw(one_to_one)}, _as_targets(batch)
            )
        terms = {name.removesuffix("_loss"): value for name, value in zip(named, losses, strict=True)}
        return terms, self._assignment(kept.result)

    def _assignment(self, found: tuple[Tensor, ...]) -> Assignment:
        """The assignment from the results of the library's assigner."""
        labels, boxes, scores, positive, _ = found
        return Assignment(
            positive=positive,
            labels=labels.long().where(positive, self._head.nc),
            boxes=boxes,
            weights=torch.ones_like(positive, dtype=torch.float32),
            normaliser=processes.share(scores.sum(), at_least=1),
        )

    @torch.no_grad()
    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Final boxes: NMS with the settings of the library's validator.

        An end-to-end model takes the best predictions of its one-to-one towers, without NMS.

        Here NMS has no time limit. The library's own NMS gives up on the remaining images after some seconds.
        """
        end_to_end, predictions = self.is_end_to_end, self.detecting(trace)
        corners = _corners(predictions.regression, predictions.priors)
        if end_to_end:
            found = self._head.postprocess(torch.cat([corners, predictions.probabilities], -1))
        else:
            found = torch.cat([_ops.xyxy2xywh(corners), predictions.probabilities], -1).transpose(1, 2)
        kept = non_max_suppression(
            found,
            SCORE_THRESHOLD,
            NMS_IOU,
            multi_label=True,
            max_det=DETECTIONS_PER_IMAGE,
            max_time_img=float("inf"),
            end2end=end_to_end,
        )
        return [
            {
                "boxes": scaled(_ops.clip_boxes(each[:, :4], size), original, size),
                "scores": each[:, 4],
                "labels": each[:, 5].long(),
            }
            for each, size, original in zip(kept, batch.sizes, batch.original_sizes, strict=True)
        ]

    def graph(self) -> nn.Module:
        """The detector with the library's post-processing, as `detections` has it."""
        return _Graph(self)


class _Graph(nn.Module):
    """The detector on a batch of images of one size, by tensors alone."""

    def __init__(self, adapter: UltralyticsAdapter) -> None:
        super().__init__()
        self.model = adapter.model
        self._adapter = adapter

    def forward(self, images: Tensor) -> Detected:
        adapter, (height, width) = self._adapter, images.shape[-2:]
        batch = Batch(pad(images, adapter.padding, False, GREY), (), (), ())
        trace = adapter.head(adapter.features(batch), batch, stages=())
        predictions = adapter.detecting(trace)
        boxes = _corners(predictions.regression, predictions.priors)
        scores = predictions.probabilities
        scores = scores * (scores > SCORE_THRESHOLD)
        if not adapter.is_end_to_end:
            scores = suppress(boxes, scores.transpose(1, 2), NMS_IOU, DETECTIONS_PER_IMAGE).transpose(1, 2)
        boxes, scores, labels = best(boxes, scores, DETECTIONS_PER_IMAGE)
        return clip_to(boxes, height, width), scores, labels


class _Kept:
    """An assigner that keeps its last result."""

    def __init__(self, assigner: Callable[..., tuple[Tensor, ...]]) -> None:
        self.assigner = assigner
        self.result: tuple[Tensor, ...] = ()

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        self.result = self.assigner(*args)
        return self.result


def _inputs(layer: Any, last: Any, outputs: Sequence[Any]) -> Any:
    """What a layer takes: the output of the last layer, or outputs of earlier ones."""
    if layer.f == -1:
        return last
    if isinstance(layer.f, int):
        return outputs[layer.f]
    return [last if i == -1 else outputs[i] for i in layer.f]


def _outputs(towers: Towers, state: State, stage: int = 0) -> State:
    """The outputs of the predictors, from the state at `stage`."""
    _, outputs = keep_states(walk_towers(state, towers, stage), ())
    return outputs


def _corners(regression: Tensor, priors: Priors) -> Tensor:
    """Corners (..., A, 4) from the distances to the four sides in strides, or from distributions of them."""
    strides = priors.strides[:, None]
    if regression.ndim == priors.boxes.ndim + 2:
        bins = torch.arange(regression.shape[-1], device=regression.device, dtype=torch.float32)
        # Not a product of matrices: autocast would round it.
        regression = (regression.float().softmax(-1) * bins).sum(-1)
    corners: Tensor = _tal.dist2bbox(regression, priors.boxes[:, :2] / strides, xywh=False)
    return corners * strides


def _decode(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes (..., A, 4): `_corners`, but corners that have passed each other meet in their middle.

    Distances that are not distributions may be negative, and so may the box's width, for which IoU is not defined.
    """
    first, second = _corners(regression, priors).chunk(2, -1)
    middle = (first + second) / 2
    return torch.cat([torch.minimum(first, middle), torch.maximum(second, middle)], -1)


def _as_maps(grid: tuple[tuple[int, int], ...], like: Tensor) -> list[Tensor]:
    """Maps (1, 1, H, W) without storage of their own. The library takes only sizes, dtype and device from them."""
    return [like.new_empty(()).expand(1, 1, *size) for size in grid]


def _as_raw(predictions: Predictions) -> dict[str, object]:
    """Predictions as the library's head gives them to its losses."""
    return {
        "boxes": predictions.regression.flatten(2).transpose(1, 2),
        "scores": predictions.logits.transpose(1, 2),
        "feats": _as_maps(predictions.priors.grid, predictions.logits),
    }


def _as_targets(batch: Batch) -> dict[str, Tensor]:
    """Ground truth as the library's losses take it: one list of all boxes, as shares of the canvas."""
    height, width = batch.images.shape[-2:]
    return {
        "batch_idx": torch.cat([torch.full_like(labels, i) for i, labels in enumerate(batch.labels)]),
        "cls": torch.cat(batch.labels),
        "bboxes": _ops.xyxy2xywhn(torch.cat(batch.boxes), width, height),
    }


def _hyperparameters(model: Any) -> Any:
    """The gains of the loss terms.

    In training they are a namespace, after loading a mapping. A model built from a YAML has none.
    """
    args = getattr(model, "args", None) or {}
    return SimpleNamespace(**{**DEFAULT_CFG_DICT, **args}) if isinstance(args, Mapping) else args


def _channels(block: nn.Module) -> int:
    """The channels that a block of a tower takes."""
    return next(layer.in_channels for layer in block.modules() if isinstance(layer, nn.Conv2d))


def _name(model: Any) -> str:
    """The name of the YAML that a model was built from."""
    stem = str(model.yaml.get("yaml_file", "")).replace("\\", "/").rpartition("/")[2].rpartition(".")[0]
    return stem or type(model).__name__


ADAPTERS: tuple[type[DetectorAdapter], ...] = (UltralyticsAdapter,)

_EXAMPLES: Mapping[str, str] = {"YOLOv8": "yolov8n", "YOLO11": "yolo11n", "YOLO26": "yolo26n"}
_TINY = (0.33, 0.0625, 1024)  # depth, width, and most channels
_FAMILIES: Mapping[str, str] = {
    "yolov5": "nsmlx",
    "yolov8": "nsmlx",
    "yolov9": "tsmce",
    "yolov10": "nsmblx",
    "yolo11": "nsmlx",
    "yolo12": "nsmlx",
    "yolo26": "nsmlx",
}
_MODELS = tuple(family + size for family, sizes in _FAMILIES.items() for size in sizes)


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build yolov8n, yolo11s, yolo26m and the like with random weights, from the library's YAML of that name.

    Raises KDError for an unknown name, and for any arguments.
    """
    if name not in _MODELS:
        every = ", ".join(f"{family}[{'|'.join(sizes)}]" for family, sizes in _FAMILIES.items())
        raise KDError(f"unknown model 'ultralytics/{name}'{did_you_mean(name, _MODELS)}. There are {every}")
    return construct(partial(_from_yaml, name), f"ultralytics/{name}", num_classes, args)


def _from_yaml(name: str, num_classes: int) -> nn.Module:
    config: Any = _tasks.yaml_model_load(f"{name}.yaml")
    return _built(config, num_classes)


def _tiny(name: str, num_classes: int) -> nn.Module:
    config: Any = _tasks.yaml_model_load(f"{name}.yaml")
    model = _built({**config, "scales": {config["scale"]: _TINY}}, num_classes)
    _gather_statistics(model)
    return model


@torch.no_grad()
def _gather_statistics(model: nn.Module) -> None:
    """Let batch norm see a batch. With its first statistics maps die out, and in eval mode all cells predict alike."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(torch.rand(4, 3, 64, 64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _built(config: Mapping[str, object], num_classes: int) -> nn.Module:
    # The class count goes into the configuration. As an argument, the library would print a line about the difference.
    model: nn.Module = DetectionModel({**config, "nc": num_classes}, verbose=False)
    return model


def open_published(name: str, args: Mapping[str, object], weights: str | None) -> Opened | None:
    """Open a detector with the weights that Ultralytics publishes: yolo11n with "pretrained", or yolo11n.pt.

    Returns None if no weights are asked for. Raises KDError if there are no such weights, or if they are not on this
    machine and no network is there.
    """
    stem = name.removesuffix(".pt")
    if weights is None and stem == name:
        return None
    build_model(stem, 1, args)  # checks the name and the arguments
    if weights not in (None, "pretrained"):
        raise KDError(f"Ultralytics has no weights {weights!r} of {name}: write pretrained, or name a file")
    file = Path(f"{stem}.pt")
    if not file.exists():
        file = Path(SETTINGS["weights_dir"]) / file
    try:
        found = Path(attempt_download_asset(file))
    except Exception as error:  # the library's own, and those of its HTTP client
        raise _no_weights(file) from error
    if not found.is_file():
        raise _no_weights(file)
    return open_file(found)


def _no_weights(file: Path) -> KDError:
    return KDError(
        f"the weights {file.name} cannot be downloaded: is there no network? Put the file at {file}, or train without"
    )


def open_file(path: Path) -> Opened:
    """Open a checkpoint of Ultralytics without running code of the file.

    The library's restricted loader reads it. The model is built anew from the description of its layers, which is
    checked first. Only tensors, class names and settings are taken from the file.

    Raises KDError if the file is damaged, holds objects of different classes, describes layers that are not the
    library's own, or is of no detector with boxes and classes.
    """
    try:
        checkpoint, _ = _tasks.torch_safe_load(str(path), safe_only=True)
        found = checkpoint.get("ema") or checkpoint.get("model")
        if not isinstance(found, nn.Module):
            raise TypeError("it holds no model")
    except Exception as error:  # the library raises errors of all kinds
        raise KDError(
            f"{path} cannot be opened ({' '.join(str(error).split())}). kdtoolkit loads only objects of Ultralytics' "
            "own classes from it. If you trust the file, open it with YOLO and save it again: "
            f"YOLO({path.name!r}).save({path.name!r})"
        ) from error
    if type(found) is not DetectionModel:
        raise KDError(f"{path} holds a {type(found).__name__}, which is no detector of boxes: name one that is")
    about = vars(found)
    try:
        config, state = checked_config(about.get("yaml")), dict(tensors_of(found))
        names = [str(about["names"][i]) for i in range(len(about["names"]))]
        end_to_end = bool(list(vars(about["_modules"]["model"])["_modules"].values())[-1].end2end)
    except KDError as error:
        raise KDError(
            f"{path} cannot be opened: {error}. kdtoolkit builds only layers of the library's own detectors from a "
            f"file. If you trust the file, build the model yourself and hand it in: "
            f"Detector(YOLO({path.name!r}).model, {path.stem!r}, CLASS_NAMES, trained=True)"
        ) from error
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise KDError(f"{path} is damaged ({type(error).__name__}: {error}): save the model again") from error
    given = checkpoint.get("train_args")
    settings = {
        key: value
        for key, value in (given if isinstance(given, dict) else {}).items()
        if isinstance(value, str | int | float | None)
    }

    def build(num_classes: int) -> nn.Module:
        built: Any = construct(partial(_built, config), str(path), num_classes, {})
        built.args = {**DEFAULT_CFG_DICT, **settings}
        built.end2end = end_to_end
        return built  # type: ignore[no-any-return]

    model: Any = build(config["nc"])
    # In float32: the library's trainer saves half precision.
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(fitted(model, state, str(path), "Save the model again, before it is fused or changed"))
    note = f"{path.name} is a pickle: no code of it was run, only tensors, names and the kinds of layers were read"
    size = settings.get("imgsz")
    return Opened(
        model=model.train(),
        build=build,
        num_classes=config["nc"],
        name=f"ultralytics/{_name(model)}",
        class_names=None if names == [str(i) for i in range(len(names))] else tuple(names),
        weights=str(path),
        notes=(note,),
        image_size=size if isinstance(size, int) else None,
    )


def save_model(detector: Detector, folder: Path) -> tuple[str, str]:
    """Save best.pt, as the library's trainer does after training, but in float32."""
    model: Any = copy.deepcopy(detector.model).cpu().eval().requires_grad_(False)
    model.names = dict(enumerate(detector.class_names or map(str, range(model.model[-1].nc))))
    model.task = "detect"
    model.criterion = None
    size = detector.image_size or DEFAULT_CFG_DICT["imgsz"]
    args = {**DEFAULT_CFG_DICT, "task": "detect", "model": f"{_name(model)}.yaml", "imgsz": size}
    model.args = args
    torch.save(
        {
            "epoch": -1,
            "best_fitness": None,
            "model": model,
            "ema": None,
            "updates": None,
            "optimizer": None,
            "train_args": args,
            "date": datetime.now().astimezone().isoformat(),
            "version": __version__,
            "license": "AGPL-3.0 (https://ultralytics.com/license)",
        },
        folder / "best.pt",
    )
    return "best.pt", 'from ultralytics import YOLO\n\nmodel = YOLO("best.pt")\n'
