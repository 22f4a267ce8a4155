"""The parts of a training step, each as a call that can be measured by itself: `step.py` does that.

- Plain step (a): the student's own losses, forward and backward.
- Teacher pass (b): backbone, neck and head, without gradient. Methods of features need backbone and neck alone.
- Continuation (c): the teacher's head from the state that CrossKD hands over to its end, forward and backward.
- KD step (d): a Distiller with methods, forward and backward.

No part has an optimiser in it. Weights are random: they change no shape, so they hardly change the time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kdtoolkit import Distiller, IncompatibleError, adapt
from kdtoolkit.build import build_model
from kdtoolkit.contract import Capability, Exchange, Method, Target, View
from kdtoolkit.detectors.dense import DenseDetector
from kdtoolkit.distiller import Losses
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.errors import KDError
from kdtoolkit.methods import CrossKD, all_methods, published_settings
from kdtoolkit.options import did_you_mean
from kdtoolkit.teacher_cache import TeacherCache, digest
from kdtoolkit.testing.syncs import count_syncs

PLAIN, FEATURES, TEACHER, CONTINUATION = "plain step", "teacher features", "teacher pass", "continuation"
CROSSKD_ALONE = "CrossKD"
CACHE_GIGABYTES = 16
METHODS = (CROSSKD_ALONE, "PKD", "CrossKD+PKD", "CrossKD+PKD+FGD")

Work = Callable[[], Losses | None]


@dataclass(frozen=True)
class Detector:
    """A detector's name, and its arguments where they are too long for the name."""

    name: str
    args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, and the methods that are measured with them if none are asked for."""

    teacher: Detector
    student: Detector
    methods: tuple[str, ...] = METHODS


def _native(kind: str, student: str, teacher: str, methods: tuple[str, ...] = METHODS) -> Pair:
    return Pair(*(Detector(f"kdtoolkit/{kind}?backbone={backbone}") for backbone in (teacher, student)), methods)


_TINY = (
    "kdtoolkit/gfl?backbone=resnet10t&backbone_args={channels: [8, 8, 16, 16], stem_width: 4}"
    "&neck_channels=16&head_channels=16&head_blocks=2&head_groups=4"
)
_RTDETR_R18 = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "layer_type": "basic",
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [128, 256, 512],
    "hidden_expansion": 0.5,
    "decoder_layers": 3,
}
_DFINE_S = {
    "backbone_config": {
        "model_type": "hgnet_v2",
        "stem_channels": [3, 16, 16],
        "hidden_sizes": [64, 256, 512, 1024],
        "stage_in_channels": [16, 64, 256, 512],
        "stage_mid_channels": [16, 32, 64, 128],
        "stage_out_channels": [64, 256, 512, 1024],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
        "use_learnable_affine_block": True,
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [256, 512, 1024],
    "hidden_expansion": 0.5,
    "depth_mult": 0.34,
    "decoder_layers": 3,
}

PAIRS = {
    "gfl-r18-r50": _native("gfl", "resnet18", "resnet50"),
    "gfl-r50-r101": _native("gfl", "resnet50", "resnet101"),
    "fcos-r18-r50": _native(
        "fcos", "resnet18", "resnet50", tuple(each.replace("CrossKD", "CrossKD.for_fcos") for each in METHODS)
    ),
    "retinanet-r18-r50": _native("retinanet", "resnet18", "resnet50"),
    "faster-rcnn-r18-r50": Pair(
        Detector("torchvision/fasterrcnn?backbone=resnet50"), Detector("torchvision/fasterrcnn?backbone=resnet18")
    ),
    "rtdetr-r18-r50": Pair(Detector("hf/rt_detr"), Detector("hf/rt_detr", _RTDETR_R18)),
    "dfine-s-l": Pair(Detector("hf/d_fine"), Detector("hf/d_fine", _DFINE_S)),
    "yolo11-n-m": Pair(Detector("ultralytics/yolo11m"), Detector("ultralytics/yolo11n")),
    "gfl-tiny": Pair(Detector(_TINY), Detector(_TINY)),  # tries the scripts out
}


@dataclass(frozen=True)
class Settings:
    """How a step is computed: options of TrainConfig that differ from its defaults.

    `cache`: the teacher's answers are kept in memory, and all are there.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    cache: bool = False

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(steps=1, **dict(self.options))


_CHANNELS_LAST = {"channels_last": True, "winograd": False}
_BFLOAT16 = {"precision": "bfloat16"}
SETTINGS = {
    # Measured equal to the published code of CrossKD in time, with the same losses.
    "reference": Settings({"channels_last": False, "winograd": False}),
    "default": Settings(),
    "cache": Settings(cache=True),
    "channels-last": Settings(_CHANNELS_LAST),
    "channels-last-cache": Settings(_CHANNELS_LAST, cache=True),
    "bfloat16": Settings(_BFLOAT16),
    "bfloat16-cache": Settings(_BFLOAT16, cache=True),
    "compiled": Settings({"compile": True}),
    "bfloat16-compiled": Settings({**_BFLOAT16, "compile": True}),
}


@dataclass(frozen=True)
class Scene:
    """What the detectors are shown: random images of one size (height, width), each with random boxes."""

    size: tuple[int, int]
    images: int = 2
    classes: int = 80
    boxes: int = 7  # COCO's train2017 has 7.3 an image

    def batch(self, device: torch.device) -> tuple[list[Tensor], list[Target]]:
        """Images on the device; targets on the host, where a loader leaves them."""
        generator = torch.Generator().manual_seed(0)
        scale = torch.tensor([self.size[1], self.size[0]])
        images = [torch.rand(3, *self.size, generator=generator).to(device) for _ in range(self.images)]
        targets = []
        for _ in range(self.images):
            corners = torch.rand(self.boxes, 2, generator=generator) * 0.7
            sides = 0.05 + 0.25 * torch.rand(self.boxes, 2, generator=generator)
            labels = torch.randint(self.classes, (self.boxes,), generator=generator)
            targets.append(Target(boxes=torch.cat([corners, corners + sides], 1) * scale.repeat(2), labels=labels))
        return images, targets


def methods_named(text: str) -> list[Method]:
    """New methods of a combination such as "CrossKD+PKD" or "CrossKD.for_fcos+PKD". Raises KDError for unknown ones."""
    known: dict[str, Callable[[], Method]] = dict(all_methods())
    for cls in all_methods().values():
        known |= published_settings(cls)
    for name in text.split("+"):
        if name not in known:
            raise KDError(f"there is no method {name!r}{did_you_mean(name, list(known))}. Write them as CrossKD+PKD")
    return [known[name]() for name in text.split("+")]


def _keeping_size(detector: Detector, scene: Scene) -> Mapping[str, object]:
    """Arguments that keep a detector from resizing the images: torchvision's do, to 800 pixels."""
    if not detector.name.startswith("torchvision/"):
        return {}
    return {"min_size": min(scene.size), "max_size": max(scene.size)}


def _freeze_as_published(student: DenseDetector) -> None:
    """Freeze the ResNet's stem, its first stage and its batch norms, as the recipes of GFL, FCOS and RetinaNet do.

    The recipes also train scale and shift of the later batch norms, which takes no measurable time.
    """
    for name, parameter in student.backbone.named_parameters():
        if name.startswith(("conv1", "bn1", "layer1")):
            parameter.requires_grad_(False)
    for module in student.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


class Parts:
    """A pair in one setting, and the parts of its steps by name: `works`.

    `refused` says why a combination of methods cannot distil the pair, by its name. `weights_mb`: the teacher's
    parameters and the student's, in MB of 2^20 bytes; `state_mb`: the state of the teacher's head that CrossKD takes.
    """

    def __init__(
        self, pair: Pair, scene: Scene, settings: Settings, methods: Sequence[str], device: torch.device
    ) -> None:
        self.device, self.settings = device, settings
        self.images, self.targets = scene.batch(device)
        models = []
        for seed, detector in enumerate((pair.teacher, pair.student)):
            torch.manual_seed(seed)
            model = build_model(detector.name, scene.classes, {**detector.args, **_keeping_size(detector, scene)})
            models.append(model.to(device))
        self.teacher, self.student = map(adapt, models)
        both = Distiller(self.teacher, self.student)
        self.arithmetic = Arithmetic.of_config(both, settings.config, device)
        self.arithmetic.lay_out(both)
        kept: Literal["float32", "bfloat16"] = "bfloat16" if self.arithmetic.precision == "bfloat16" else "float32"
        self.cache = TeacherCache.in_memory(CACHE_GIGABYTES, kept) if settings.cache else None
        self.keys = [*map(digest, self.images)] if settings.cache else None  # a loader's workers compute them
        self.teacher.model.eval().requires_grad_(False)
        if isinstance(self.student.model, DenseDetector):
            _freeze_as_published(self.student.model)
        self.weights_mb = tuple(sum(p.nbytes for p in model.parameters()) / 2**20 for model in models)
        self.parameters = [p for p in self.student.model.parameters() if p.requires_grad]
        self.works: dict[str, Work] = {PLAIN: self._step(Distiller(None, self.student))}
        self.refused: dict[str, str] = {}
        self.state_mb = 0.0
        self.continued: dict[str, int] = {}  # how often a combination continues the teacher's head
        self.beyond_features: dict[str, bool] = {}  # whether a combination needs the teacher's head
        self._add_teacher()
        for name in methods:
            try:
                distiller = self._distiller(methods_named(name))
            except IncompatibleError as error:
                self.refused[name] = str(error)
                continue
            chosen = [method for method in distiller.methods if isinstance(method, Method)]
            crossing = [method for method in chosen if isinstance(method, CrossKD)]
            self.continued[name] = len(crossing)
            self.beyond_features[name] = any(method.needs != {Capability.FEATURES} for method in chosen)
            if crossing and CONTINUATION not in self.works:
                self._add_continuation(crossing[0])
            self.works[name] = self._step(distiller)

    def _distiller(self, methods: Sequence[Method]) -> Distiller:
        torch.manual_seed(2)  # of what methods learn
        return Distiller(self.teacher, self.student, methods, teacher_cache=self.cache)

    def _step(self, distiller: Distiller) -> Work:
        distiller.train()
        if self.settings.config.compile:
            # Without a GPU the graph is only traced: to compile it takes a CPU minutes.
            backend = "inductor" if self.device.type == "cuda" else "aot_eager"
            run: Callable[..., Losses] = torch.compile(distiller, backend=backend)
        else:
            run = distiller

        def step() -> Losses:
            with self.arithmetic.forward_pass():
                losses = run(self.images, self.targets, self.keys)
            losses.total.backward()
            return losses

        return step

    def _add_teacher(self) -> None:
        adapter = self.teacher
        like = self.student.prepare(self.images, self.targets)

        @torch.no_grad()
        def run(head: bool) -> None:
            with self.arithmetic.forward_pass():
                batch = adapter.prepare(self.images, self.targets, like=like)
                features = adapter.features(batch)
                if head:
                    adapter.head(features, batch, stages=())

        self.works[FEATURES] = lambda: run(head=False)
        self.works[TEACHER] = lambda: run(head=True)

    def _add_continuation(self, method: CrossKD) -> None:
        """The continuation of a CrossKD that is set up: the teacher's own state stands for the student's."""
        assert method.stages is not None
        stage = method.stages[1]
        with torch.no_grad(), self.arithmetic.forward_pass():
            batch = self.student.prepare(self.images, self.targets)
            features = self.student.features(batch)
            student_view = View(self.student, batch, features, self.student.head(features, batch, stages=()))
            batch = self.teacher.prepare(self.images, self.targets, like=batch)
            teacher_view = View(self.teacher, batch, self.teacher.features(batch), frozen=True)
            pair = Exchange(student_view, teacher_view).matched(method.priors)
            own = pair.teacher.states[stage]
        self.state_mb = sum(x.nbytes for maps in own.values() for x in maps) / 2**20

        def run() -> None:
            state = {branch: tuple(x.detach().requires_grad_() for x in maps) for branch, maps in own.items()}
            with self.arithmetic.forward_pass():
                found = pair.finish_with_teacher(state, stage)
            outputs = [x for x in (found.logits, found.regression, found.quality) if x is not None]
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

        self.works[CONTINUATION] = run

    def warm_up(self, work: Work) -> None:
        """Run a part before it is measured if its first run does more than others: it compiles, or fills a cache."""
        if self.settings.config.compile or self.settings.cache:
            self.reset()
            work()

    def reset(self) -> None:
        """Bring the parts to the same start: no gradients, the same random numbers."""
        for parameter in self.parameters:
            parameter.grad = None
        torch.manual_seed(3)


@dataclass(frozen=True)
class Observed:
    """What a part does besides taking time.

    `peak_mb`: the most memory of tensors above what was there before, in MB of 2^20 bytes. `syncs`: how often the host
    waits for a GPU; on a CPU, how often it would (`kdtoolkit/testing/syncs.py`). None for a compiled step on a CPU.
    """

    losses: dict[str, float]
    peak_mb: float
    syncs: int | None


def observe(parts: Parts, work: Work) -> Observed:
    """Run a part once and look at it. Call `parts.reset` before, or the gradients of the run before are there."""
    if parts.device.type == "cuda":
        return _observe_on_cuda(work, parts.device)
    with ExitStack() as stack:
        found = None if parts.settings.config.compile else stack.enter_context(count_syncs())
        with profiling([ProfilerActivity.CPU], memory=True) as profiled:
            losses = work()
    return Observed(_values(losses), peak_mb(profiled), None if found is None else found.total())


def _observe_on_cuda(work: Work, device: torch.device) -> Observed:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            losses = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs = sum("called a synchronizing" in str(each.message) for each in caught)
    return Observed(_values(losses), (torch.cuda.max_memory_allocated(device) - before) / 2**20, syncs)


def _values(losses: Losses | None) -> dict[str, float]:
    return {} if losses is None else {name: loss.item() for name, loss in losses.items()}


@contextmanager
def profiling(activities: Sequence[ProfilerActivity], *, memory: bool = False) -> Iterator[profile]:
    """A profile of the block, without the lines that the profiler writes to stderr by itself."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with profile(activities=activities, profile_memory=memory) as profiled:
            yield profiled
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_mb(profiled: profile) -> float:
    """The largest sum of what was allocated and not freed again within a profile with memory, in MB."""
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20
