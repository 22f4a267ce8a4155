"""What a run is made of: images, detectors, methods and settings, chosen where the user did not say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtoolkit import processes
from kdtoolkit.build import backbone_weights
from kdtoolkit.classes import ClassMap
from kdtoolkit.compatibility import why_no_student, why_refused
from kdtoolkit.contract import DetectorSpec
from kdtoolkit.data import PhotoDataset, check_same_classes, open_dataset, open_images
from kdtoolkit.data.dataset import own_ids
from kdtoolkit.data.detections import is_detection_file
from kdtoolkit.data.opening import name_of
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine import group
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.inputs import check_arguments, check_unlabelled
from kdtoolkit.engine.mixture import share_without_labels, unlabelled_steps
from kdtoolkit.engine.precision import resolve_precision
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.inherit import Inherited, inherit
from kdtoolkit.libraries import adapt, library_of_name
from kdtoolkit.method_use import MethodUse
from kdtoolkit.models import Detector, can_detect, enlarging, is_code, is_place, open_detector
from kdtoolkit.options import did_you_mean
from kdtoolkit.words import counted
from kdtoolkit.workflow import defaults
from kdtoolkit.workflow.auto import choose, scaled, teacher_scale
from kdtoolkit.workflow.batch import fitting, trial_step
from kdtoolkit.workflow.caching import with_cache
from kdtoolkit.workflow.defaults import Begin, Choice, Situation
from kdtoolkit.workflow.detecting import check_recorded
from kdtoolkit.workflow.options import DistillOptions, ProbeOptions, RunOptions, TrainOptions
from kdtoolkit.yaml_text import split_name

_CHOSEN_BY_USER = "you chose it"


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a run. `longest`: the longest side of all, in pixels, before they are scaled down."""

    train: PhotoDataset
    val: PhotoDataset
    unlabelled: PhotoDataset | None
    longest: int

    def resized(self, size: int) -> Images:
        """The same images; those with a longer side than `size` pixels are scaled down to it."""
        return Images(
            self.train.resized(size),
            self.val.resized(size),
            None if self.unlabelled is None else self.unlabelled.resized(size),
            self.longest,
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run before its first step.

    `options`: with nothing left open. `run_file`: what the user gave, and the two choices that depend on the machine:
    the batch size (memory) and the weights that the student begins with (network). All else that the user left open
    stays open, so a run file of which one option is changed chooses anew what depends on it.
    `distiller`: student, teacher and methods together. `untouched`: a copy of the student, as it was before it
    inherited from the teacher; None if no training without teacher is asked for.
    `factor`: what the weights of methods that `auto` chose are multiplied by, because the student's library multiplies
    its own loss by it.
    `plan`: what it will do and why, by name. `notes`: what the user should know.
    """

    options: RunOptions
    run_file: RunOptions
    images: Images
    student: Detector
    untouched: Detector | None
    teacher: Detector | None
    class_map: ClassMap | None
    methods: tuple[MethodUse, ...]
    factor: float
    distiller: Distiller
    config: TrainConfig
    evaluations: int
    plan: dict[str, Choice]
    notes: tuple[str, ...]


def prepare(
    options: RunOptions,
    device: torch.device,
    progress: Callable[[str], Callable[[int, int], None]],
    images: Images | None = None,
) -> Prepared:
    """Open everything that the options name, check that it fits together, and choose what they leave open.

    `progress` makes what shows how many images were looked at. `images`: those that the options name, if they are open
    already. Raises KDError for the first thing that does not fit.
    """
    _check_code(options)
    images = images or _open(options, progress)
    notes: list[str] = []
    teacher, class_map = None, None
    if isinstance(options, DistillOptions):
        teacher, class_map = _teacher(options, images, notes)
    student, options = _student(options, images, teacher, notes)
    image_size = _image_size(options, images, teacher, student)
    size = int(image_size.value)
    images = images.resized(size)
    scale = _teacher_scale(options, student, teacher)

    untouched = _copy(student) if options.with_baseline else None
    inherited: Inherited | None = None
    if isinstance(options, DistillOptions) and options.init == "teacher":
        assert teacher is not None
        inherited = inherit(student.model, teacher.model, class_map)
    for detector in filter(None, (student, teacher)):
        detector.model.to(device)
    _check_sizes(student, teacher, images, size, notes)

    about = _situation(images, student, inherited, device)
    methods, why_methods = _methods(options, student, teacher, class_map, scale.value)

    def trial(size: int) -> None:
        spoilt = _distiller(_copy(student), teacher, methods, class_map, scale.value)
        trial_step(spoilt, images.train, size, device, options.train.get("precision", "auto"))

    batch = _batch(options, about, trial)
    method = Choice(_in_words(methods), why_methods)
    factor = _factor(options, about, batch.value)
    if factor != 1:
        methods = tuple(scaled(use, factor) for use in methods)
        method = Choice(f"{method.value}, weights x {factor:g}", f"{why_methods}; the library's loss is x {factor:g}")
    training = _training(options, about, images, batch, device)
    if batch.value == about.processes * training.config.accumulation:
        trial(1)  # not all detectors can be trained by single images
    distiller = _seeded(options, student, teacher, methods, class_map, scale.value)
    config = training.config
    distiller = _checked(distiller, config, images)

    resolved: dict[str, Any] = {"image_size": size, **training.resolved}
    cached: dict[str, Choice] = {}
    if isinstance(options, DistillOptions):
        if not isinstance(options, ProbeOptions):  # it trains nothing with a teacher
            cache, config = with_cache(options, distiller, config, images, size, device)
            cached = {} if cache is None else {"teacher cache": cache}
        resolved |= {"method": methods, "teacher_scale": scale.value, "teacher_cache": config.teacher_cache}
    plan = _what(options, images, student, teacher, class_map, inherited, method)
    plan["image size"] = replace(image_size, value=f"{size} px")
    if scale.value != 1:
        plan["teacher's images"] = replace(scale, value=f"{scale.value:g} times the student's size")
    return Prepared(
        options=options.model_copy(update=resolved),
        run_file=options.model_copy(update={"batch_size": batch.value}),
        images=images,
        student=student,
        untouched=untouched,
        teacher=teacher,
        class_map=class_map,
        methods=methods,
        factor=factor,
        distiller=distiller,
        config=config,
        evaluations=training.evaluations,
        plan=plan | training.plan | cached | _arithmetic(config, distiller, device),
        notes=tuple(dict.fromkeys([*notes, *student.notes, *(teacher.notes if teacher else ())])),
    )


def with_methods(prepared: Prepared, methods: tuple[MethodUse, ...]) -> tuple[Detector, Distiller]:
    """A copy of the run's student before its first step, and the distiller that trains it by different methods.

    Without methods the student is the one that has inherited nothing, and there is no teacher. Raises KDError for what
    training would refuse.
    """
    if not methods:
        assert prepared.untouched is not None
        alone = _copy(prepared.untouched)
        alone.model.to(next(prepared.student.model.parameters()).device)
        return alone, Distiller(None, alone.model)
    student, options = _copy(prepared.student), prepared.options
    assert isinstance(options, DistillOptions)
    assert options.teacher_scale is not None  # it is chosen by now
    distiller = _seeded(options, student, prepared.teacher, methods, prepared.class_map, options.teacher_scale)
    return student, _checked(distiller, prepared.config, prepared.images)


def specs_of(prepared: Prepared) -> tuple[DetectorSpec, DetectorSpec]:
    """The specs of student and teacher, as methods see them."""
    options, teacher = prepared.options, prepared.teacher
    assert isinstance(options, DistillOptions)
    assert teacher is not None
    assert options.teacher_scale is not None
    return _specs(prepared.student, teacher, prepared.class_map, options.teacher_scale)


def _check_code(options: RunOptions) -> None:
    for role, name in options.models.items():
        if is_code(name) and not options.allow_code:
            raise KDError(
                f"the {role} is {name!r}, which imports a Python module and so runs its code: read the module, then "
                "run the same command with --allow-code"
            )


def _open(options: RunOptions, progress: Callable[[str], Callable[[int, int], None]]) -> Images:
    train, val = (
        open_dataset(
            options.data,
            split,
            on_bad="skip" if options.skip_bad else "error",
            progress=progress(f"checking {split} images"),
        )
        for split in ("train", "val")
    )
    check_same_classes(train, val)
    unlabelled = None
    if isinstance(options, DistillOptions) and options.unlabelled is not None:
        unlabelled = open_images(
            options.unlabelled,
            on_bad="skip" if options.skip_bad else "error",
            progress=progress("checking images without labels"),
        )
    longest = max(max(image["width"], image["height"]) for image in train.coco()["images"])
    return Images(train, val, unlabelled, longest)


def _teacher(options: DistillOptions, images: Images, notes: list[str]) -> tuple[Detector, ClassMap | None]:
    """The teacher, and which classes it shares with the data if its own are different."""
    names, name = images.train.class_names, options.teacher
    ids = own_ids(images.train) if is_detection_file(name) else None
    weights = options.teacher_weights or ("pretrained" if _has_no_weights_of_its_own(name) else None)
    file = weights not in (None, "pretrained")
    try:
        teacher = _opened_in_all(lambda: open_detector(options.teacher, weights=weights, categories=ids))
    except KDError as error:
        if not file and weights == "pretrained" and options.teacher_weights is None and _library(name) != "timm":
            raise KDError(
                f"the teacher {options.teacher} has no weights ({error}). Name a trained one: the folder of a run "
                f"(`kd train --model {options.teacher} --data {options.data}` makes one), a file by --teacher-weights, "
                "or the library's own file such as best.pt"
            ) from error
        raise
    if not can_detect(teacher):
        if options.class_map:
            raise KDError(f"the teacher {options.teacher} shows features alone and has no classes: leave class_map out")
        if not teacher.trained:
            raise KDError(
                f"the teacher {options.teacher} has random weights, so it cannot teach: leave teacher_weights out for "
                "the published ones, or name a file of weights"
            )
        return teacher, None
    if not teacher.trained:
        raise KDError(
            f"the teacher {options.teacher} has random weights in its class layer, so it cannot detect: train it first "
            f"(`kd train --model {options.teacher} --data {options.data}`)"
            + "".join(f". {note[:1].upper()}{note[1:]}" for note in teacher.notes)
        )
    parts = {"train": images.train, "val": images.val}
    if images.unlabelled is not None:
        parts["the images without labels"] = images.unlabelled
    notes += check_recorded(teacher.model, parts, options.data)
    count = adapt(teacher.model).spec.num_classes
    if teacher.class_names is None:
        if count != len(names):
            raise KDError(
                f"nobody knows the names of the teacher's {count} classes, and the data has {len(names)} "
                f"({', '.join(names)}): open it from a folder or file that has names, such as the folder of a run"
            )
        if options.class_map:
            raise KDError("class_map needs the names of the teacher's classes, which nobody knows: leave class_map out")
        notes.append(
            f"the names of the teacher's {count} classes are not known: they are taken for the data's, in its order"
        )
        return teacher, None
    for own in options.class_map:
        if own not in names:
            raise KDError(
                f"class_map: the data has no class {own!r}{did_you_mean(own, names)}: it has {', '.join(names)}"
            )
    class_map = ClassMap.by_name(names, teacher.class_names, options.class_map)
    return teacher, None if class_map.is_identity(len(names), count) else class_map


def _student(
    options: RunOptions, images: Images, teacher: Detector | None, notes: list[str]
) -> tuple[Detector, RunOptions]:
    """The detector to train, with the data's classes, and the options with the weights that it begins with."""
    assert isinstance(options, TrainOptions | DistillOptions)
    role = "model" if isinstance(options, TrainOptions) else "student"
    field = "weights" if isinstance(options, TrainOptions) else "student_weights"
    name, weights = options.models[role], getattr(options, field)
    size = int(_image_size(options, images, teacher, None).value)

    def opened(weights: str | None) -> Detector:
        torch.manual_seed(options.seed)
        return _opened(name, images.train.class_names, weights, size)

    if weights is None and _has_no_weights_of_its_own(name) and not backbone_weights(name):
        try:  # the first process decides for all
            group.from_first(lambda: bool(opened("pretrained")))
            weights = "pretrained"
        except KDError as error:
            weights = "none"
            notes.append(f"the {role} begins with random weights: published ones cannot be had here ({error})")
    detector = _opened_in_all(lambda: opened(weights))
    if reason := why_no_student(adapt(detector.model).spec):
        raise KDError(reason)
    return detector, options.model_copy(update={} if weights is None else {field: weights})


def _opened_in_all(open_here: Callable[[], Detector]) -> Detector:
    """Open a detector in all processes: in the first one before the others, so that weights are downloaded once."""
    if processes.count() > 1:
        group.from_first(lambda: bool(open_here()))
    return open_here()


def _image_size(options: RunOptions, images: Images, teacher: Detector | None, student: Detector | None) -> Choice:
    """The longest side of images; without a student a guess, by which the student is built."""
    if options.image_size is not None:
        return Choice(options.image_size, _CHOSEN_BY_USER)
    own = None if student is None or _is_torchvision(student.name) else student.image_size
    return defaults.image_size(images.longest, None if teacher is None else teacher.image_size, own)


def _situation(images: Images, student: Detector, inherited: Inherited | None, device: torch.device) -> Situation:
    begin: Begin = "trained" if student.trained else "started" if student.weights or inherited else "random"
    return Situation(
        images=len(images.train),
        val_images=len(images.val),
        longest=images.longest,
        library=_library(student.name),
        parameters=sum(p.numel() for p in student.model.parameters()),
        begin=begin,
        device=device.type,
        processes=processes.count(),
    )


def _opened(name: str, names: tuple[str, ...], weights: str | None, size: int) -> Detector:
    """A detector with these classes, for images of this size."""
    args: dict[str, object] = {}
    if not is_place(name):
        library = _library(name)
        path, given = split_name(name)
        if library == "torchvision" and not path.startswith("torchvision/ssd") and "min_size" not in given:
            args = {"min_size": size, "max_size": size}  # it resizes images itself, by default to 800 px and more
        if library == "kdtoolkit" and weights == "pretrained":
            args, weights = {"pretrained": True}, None  # a backbone's: there are no others
    return open_detector(name, class_names=names, weights=weights, args=args)


def _has_no_weights_of_its_own(name: str) -> bool:
    """Whether a name stands for an architecture alone."""
    return not is_place(name) and _library(name) in ("kdtoolkit", "torchvision", "ultralytics", "timm")


def _library(name: str) -> str:
    library = library_of_name(name)
    return "" if library is None else library.prefix


def _is_torchvision(name: str) -> bool:
    return not is_place(name) and _library(name) == "torchvision"


def _check_sizes(student: Detector, teacher: Detector | None, images: Images, size: int, notes: list[str]) -> None:
    """Tell the user if the student's own preprocessing enlarges images, or if the teacher knows a different size."""
    device = next(student.model.parameters()).device
    batch = adapt(student.model).prepare([torch.zeros(3, size, size, device=device)])
    seen = max(batch.sizes[0])
    if seen != size:
        notes.append(f"the detector's own preprocessing scales images of {size} px to {seen} px")
    else:
        smallest = min(max(image["width"], image["height"]) for image in images.train.coco()["images"])
        notes += enlarging(student, min(size, smallest))
    if teacher and teacher.image_size and not 2 / 3 <= size / teacher.image_size <= 3 / 2:
        notes.append(f"the teacher was trained on images of {teacher.image_size} px and is shown images of {size} px")


def _teacher_scale(options: RunOptions, student: Detector, teacher: Detector | None) -> Choice:
    if teacher is None:
        return Choice(1.0, "")
    assert isinstance(options, DistillOptions)
    if options.teacher_scale is not None:
        return Choice(options.teacher_scale, _CHOSEN_BY_USER)
    return teacher_scale(adapt(student.model).spec, adapt(teacher.model).spec)


def _methods(
    options: RunOptions, student: Detector, teacher: Detector | None, class_map: ClassMap | None, scale: float
) -> tuple[tuple[MethodUse, ...], str]:
    """The methods and why. Raises IncompatibleError if one cannot work."""
    if teacher is None:
        return (), ""
    assert isinstance(options, DistillOptions)
    specs = _specs(student, teacher, class_map, scale)
    if options.method == "auto":
        chosen = choose(*specs, _library(student.name))
        return chosen.methods, chosen.why
    for use in options.method:
        if reason := why_refused(use.build(), *specs):
            try:
                instead = f"`--method auto` would take {_in_words(choose(*specs, _library(student.name)).methods)}"
            except IncompatibleError:
                instead = "no other method works for this pair either"
            raise IncompatibleError(
                f"{use.name} cannot distil {specs[1].name} into {specs[0].name}: {reason}. {instead}"
            )
    return options.method, _CHOSEN_BY_USER


def _specs(
    student: Detector, teacher: Detector, class_map: ClassMap | None, scale: float
) -> tuple[DetectorSpec, DetectorSpec]:
    ours, theirs = Distiller(teacher.model, student.model, class_map=class_map).seen
    return ours.spec, theirs.spec.on_images_scaled_by(scale)


def _factor(options: RunOptions, about: Situation, batch: int) -> float:
    """What the weights of methods that `auto` chose are multiplied by; see `Prepared`."""
    if about.library != "ultralytics" or not isinstance(options, DistillOptions) or options.method != "auto":
        return 1.0
    return batch / about.processes / float(options.train.get("accumulation", 1))


def _distiller(
    student: Detector,
    teacher: Detector | None,
    methods: tuple[MethodUse, ...],
    class_map: ClassMap | None,
    scale: float,
) -> Distiller:
    return Distiller(
        None if teacher is None else teacher.model,
        student.model,
        [use.build() for use in methods],
        teacher_scale=scale,
        class_map=class_map,
    )


def _seeded(
    options: RunOptions,
    student: Detector,
    teacher: Detector | None,
    methods: tuple[MethodUse, ...],
    class_map: ClassMap | None,
    scale: float,
) -> Distiller:
    """The run's distiller. What its methods must learn begins with the same values, whatever was tried before."""
    torch.manual_seed(options.seed)
    return _distiller(student, teacher, methods, class_map, scale)


def _checked(distiller: Distiller, config: TrainConfig, images: Images) -> Distiller:
    """The same distiller. Raises KDError for what training would refuse, before the teacher is measured."""
    check_arguments(distiller, config)
    if images.unlabelled is not None:
        check_unlabelled(distiller, images.unlabelled)
    distiller.run_steps = config.steps
    unlabelled_steps(distiller, config, images.train, images.unlabelled)
    return distiller


def _batch(options: RunOptions, about: Situation, trial: Callable[[int], None]) -> Choice:
    """Images a step. `trial` tries a step with a number of images."""
    largest = min(defaults.LARGEST_BATCH, max(about.images, 2))  # batch norms need two
    parts = int(options.train.get("accumulation", 1))
    if options.batch_size is not None:
        if options.batch_size % (parts * about.processes):
            raise KDError(
                f"batch_size ({options.batch_size}) must be a multiple of {parts * about.processes}: the number of "
                f"processes ({about.processes}) times that of parts, train.accumulation ({parts})"
            )
        return Choice(options.batch_size, _CHOSEN_BY_USER)
    if about.processes > 1:
        return Choice(8 * parts * about.processes, f"8 for each of {about.processes} processes")
    if about.device == "cpu":
        return Choice(max(parts, min(defaults.BATCH_ON_CPU, largest) // parts * parts), "usual on a CPU")
    found = fitting(trial, largest, parts)
    return Choice(found, "most that is useful" if found > largest - parts else "as many as the GPU's memory takes")


@dataclass(frozen=True)
class _Training:
    """How to train. `resolved`: the options of the run that say so; `plan`: the part of the plan that explains it."""

    config: TrainConfig
    evaluations: int
    resolved: dict[str, Any]
    plan: dict[str, Choice]


def _training(options: RunOptions, about: Situation, images: Images, batch: Choice, device: torch.device) -> _Training:
    """What the user says about training, and the rest by what suits."""
    schedule = _schedule(options, about)
    # Labelled images are shown as often as without the others, which come in steps of their own.
    without = _share_without_labels(options, images)
    steps = options.steps or defaults.steps_of(schedule.value, about.images, batch.value, without)
    epochs = defaults.epochs_of(steps, about.images, batch.value, without)
    lr = Choice(options.lr, _CHOSEN_BY_USER) if options.lr else defaults.learning_rate(about, batch.value)
    further = _further(options, about, steps, epochs)
    train = {name: choice.value for name, choice in further.items()}
    config = TrainConfig(steps=steps, batch_size=batch.value, lr=lr.value, **train)
    evaluations = defaults.evaluations(about, steps * config.batch_size)
    resolved: dict[str, Any] = {"batch_size": batch.value, "lr": lr.value, "train": train}
    if options.steps is None:
        resolved["epochs"] = float(schedule.value)
    plan = {
        "schedule": Choice(_schedule_in_words(steps, epochs, without), schedule.why),
        "batch": Choice(counted(config.batch_size, "image"), batch.why),
        "learning rate": Choice(f"{config.lr:g}, {config.optimizer}", lr.why),
        "precision": Choice(resolve_precision(config.precision, device), further["precision"].why),
        "averaging": Choice(f"decay {config.ema:g}" if config.ema else "off", further["ema"].why),
        "augmentation": Choice(_augmentation_in_words(config), further["augmentation"].why),
        "evaluation": Choice(_evaluations_in_words(evaluations.value, about), evaluations.why),
    }
    return _Training(config, evaluations.value, resolved, plan)


def _arithmetic(config: TrainConfig, distiller: Distiller, device: torch.device) -> dict[str, Choice]:
    """The part of the plan that says how convolutions are computed."""
    chosen = Arithmetic.of_config(distiller, config, device)
    return {"convolutions": Choice(chosen.convolutions, chosen.why or _CHOSEN_BY_USER)}


def _schedule(options: RunOptions, about: Situation) -> Choice:
    if options.steps is not None or options.epochs is not None:
        return Choice(options.epochs, _CHOSEN_BY_USER)
    return defaults.epochs(about)


def _share_without_labels(options: RunOptions, images: Images) -> float:
    """Which share of the steps shows images without labels."""
    if images.unlabelled is None:
        return 0.0
    return share_without_labels(options.train.get("unlabelled_share"), len(images.train), len(images.unlabelled))


def _further(options: RunOptions, about: Situation, steps: int, epochs: float) -> dict[str, Choice]:
    """The further options of training: the user's, and for the rest what suits."""
    cached = isinstance(options, DistillOptions) and options.teacher_cache in ("memory", "disk")
    chosen = defaults.training(about, steps, epochs, cached=cached)
    for name, value in options.train.items():
        if isinstance(value, Mapping) and name in chosen and isinstance(chosen[name].value, Mapping):
            value = {**chosen[name].value, **value}
        chosen[name] = Choice(value, _CHOSEN_BY_USER)
    return chosen


def _what(
    options: RunOptions,
    images: Images,
    student: Detector,
    teacher: Detector | None,
    class_map: ClassMap | None,
    inherited: Inherited | None,
    method: Choice,
) -> dict[str, Choice]:
    """The part of the plan that says what is trained on what."""
    names = images.train.class_names
    counts = f"{counted(len(images.train), 'image')} to train on, {len(images.val)} to evaluate on"
    if images.val.held_out:
        counts += f" ({images.val.held_out})"
    plan = {"data": Choice(f"{name_of(options.data)}: {counts}", _listed(names))}
    if images.unlabelled is not None:
        plan["unlabelled"] = Choice(counted(len(images.unlabelled), "image"), "only the methods' losses, no labels")
    if teacher is not None:
        is_file = isinstance(teacher.model, RecordedDetector)
        alone = "" if can_detect(teacher) else "; it shows features alone"
        about = teacher.weights if is_file else f"weights: {teacher.weights}"
        plan["teacher"] = Choice(f"{_shown(teacher)}{alone}", about)
        if class_map is not None:
            assert teacher.class_names is not None
            plan["classes"] = Choice(class_map.describe(names, teacher.class_names), "the class lists differ")
    role = "model" if teacher is None else "student"
    plan[role] = Choice(_shown(student), f"weights: {student.weights or 'random'}")
    if inherited is not None:
        plan["inherits"] = Choice(inherited.describe(), _CHOSEN_BY_USER)
    if teacher is not None:
        plan["method"] = method
    return plan


def _copy(detector: Detector) -> Detector:
    return replace(detector, model=copy.deepcopy(detector.model))


def _shown(detector: Detector) -> str:
    if isinstance(detector.model, RecordedDetector):
        return f"{detector.name}, a file of detections"
    millions = sum(p.numel() for p in detector.model.parameters()) / 1e6
    return f"{detector.name}, {millions:.1f} M parameters"


def _in_words(methods: tuple[MethodUse, ...]) -> str:
    return " + ".join(map(str, methods))


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _schedule_in_words(steps: int, epochs: float, without_labels: float) -> str:
    apart = f", {100 * without_labels:.3g} % of them without labels" if without_labels else ""
    return f"{epochs:.3g} epochs, {counted(steps, 'step')}{apart}"


def _evaluations_in_words(count: int, about: Situation) -> str:
    times = "once, at the end" if count == 1 else f"{count} times"
    return f"{times}, on {counted(about.val_images, 'image')}"


def _augmentation_in_words(config: TrainConfig) -> str:
    changed = config.augmentation.model_dump(exclude_defaults=True) | {"flip": config.augmentation.flip}
    shown = {
        name: f"{value[0]:g}-{value[1]:g}" if isinstance(value, tuple) else f"{value:g}"
        for name, value in changed.items()
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())
