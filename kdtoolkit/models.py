"""Opens detectors with their weights, and saves them as their library opens them."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kdtoolkit.build import (
    architecture,
    backbone_weights,
    build_model,
    is_code,
    library_module,
)
from kdtoolkit.contract import Capability
from kdtoolkit.data.detections import is_detection_file, read_detections
from kdtoolkit.detector import Detector, Opened, SavedDetector
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.errors import KDError
from kdtoolkit.files import walk, written_together
from kdtoolkit.libraries import adapt, library_of_model, library_of_name
from kdtoolkit.weights import Checkpoint, aligned, holds_yolo, load_state, load_weights, read_checkpoint
from kdtoolkit.yaml_text import dump, load, split_name, with_arguments

__all__ = [
    "Detector",
    "SavedDetector",
    "UnknownClassesError",
    "build_model",
    "can_detect",
    "check_classes",
    "content_of",
    "enlarging",
    "is_code",
    "is_place",
    "load_weights",
    "open_detector",
    "save_detector",
]

DESCRIPTION = "detector.yaml"  # the file by which `open_detector` knows a folder of `save_detector`
_WEIGHTS = (".safetensors", ".pth", ".pt")
FILES = (".json", ".yaml", *_WEIGHTS)  # the files of a folder that a detector may be opened from
_GUESS = 80  # classes that a model is first built for, where the weights do not say how many they have


class UnknownClassesError(KDError):
    """A detector has random weights, and nobody says for how many classes it is."""


def open_detector(
    name: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    args: Mapping[str, object] | None = None,
    categories: Mapping[int, str] | None = None,
) -> Detector:
    """Build a detector and load its weights.

    Args:
        name: what `build_model` takes; a folder that `save_detector` or `save_pretrained` wrote, or a run's folder that
            holds one; `best.pt` of Ultralytics; a published checkpoint of GFL, ATSS, RetinaNet or FCOS; or a file of
            detections (.json), which can only teach.
        class_names: the classes that the detector must have, in the order of their labels. If the weights are for
            different classes, the class layers are new. None keeps the classes of the weights.
        num_classes: their number, if their names are not known.
        weights: a file (.safetensors, or .pth or .pt with a state dict), "pretrained" for the weights that the library
            publishes, a name of torchvision's weights such as "COCO_V1", or "none" for random weights. None: the
            weights that `name` stands for, or random ones.
        args: further arguments of the model. They override those in the name.
        categories: the classes by their ids, for a file of detections that does not name them.

    Raises:
        KDError: there is no such detector or file, the weights do not fit it, or the number of classes is not known.
    """
    if class_names is not None and num_classes not in (None, len(class_names)):
        raise KDError(f"num_classes is {num_classes}, and class_names has {len(class_names)} names: leave out one")
    count = num_classes if class_names is None else len(class_names)
    if is_detection_file(name):
        if weights is not None or args:
            raise KDError(f"{name} is a file of detections, which has no weights and no arguments: leave them out")
        if class_names is not None:
            raise KDError(
                f"{name} is a file of detections, which can only teach, as it is: name a detector to train. A suite's "
                "teacher that is such a file has no `train`"
            )
        return _open_recorded(Path(name), num_classes, categories)
    if weights is not None and is_detection_file(weights):
        raise KDError(
            f"{weights} is a file of detections (.json), which holds no weights: name it in the place of the teacher"
        )
    names = None if class_names is None else tuple(class_names)
    opened = _opened(str(name), weights, args or {}, count)
    if opened is not None:
        return _with_classes(opened, names, count)
    library = library_of_name(str(name))
    if count is None and library is not None and library.prefix == "timm":
        count = 0  # its models show features alone
    if count is None:
        build_model(str(name), 1, args)  # a wrong name is the first thing to tell
        raise UnknownClassesError(
            f"model {str(name)!r} has random weights, so its classes are not known: give class_names or num_classes, "
            "or name its weights"
        )
    full = with_arguments(*split_name(str(name), args))
    return Detector(build_model(full, count), full, names, backbone_weights(full))


def _open_recorded(path: Path, count: int | None, categories: Mapping[int, str] | None) -> Detector:
    """Open a file of detections. Raises KDError if a different number of classes is asked for."""
    file = read_detections(path, categories)
    names = file.class_names
    if count not in (None, len(names)):
        raise KDError(
            f"{path} has detections of {len(names)} classes ({shortened(names)}), not of {count}: leave the number out"
        )
    about = f"{len(file.scores)} detections on {len(file.keys)} images"
    return Detector(RecordedDetector(file), str(path), names, about, trained=True)


def can_detect(detector: Detector) -> bool:
    """Whether it is a detector with a head, and not a model that shows features alone."""
    return Capability.PREDICTIONS in adapt(detector.model).spec.capabilities


def enlarging(detector: Detector, *sides: int) -> tuple[str, ...]:
    """A note for users if the detector's own preprocessing enlarges square images with one of these sides."""
    parameter = next(detector.model.parameters(), None)
    if parameter is None:  # a file of detections
        return ()
    with suppress(KDError):  # no adapter knows it, so nobody knows what it does
        adapter = adapt(detector.model)
        for side in sides:
            height, width = adapter.prepare([torch.zeros(3, side, side, device=parameter.device)]).sizes[0]
            if max(height, width) > side:
                change = f"one of {side} x {side} px to {width} x {height} px"
                return (f"the detector's own preprocessing enlarges small images: {change}",)
    return ()


def has_classes(detector: Detector, class_names: Sequence[str]) -> bool:
    """Whether a detector has these classes in this order; their number counts if nobody knows their names."""
    expected = tuple(class_names)
    return adapt(detector.model).spec.num_classes == len(expected) and detector.class_names in (None, expected)


def check_classes(detector: Detector, class_names: Sequence[str]) -> None:
    """Check that a trained detector has the classes of a data set, in the same order.

    If nobody knows the names of its classes, their number must agree. Raises KDError otherwise.
    """
    if has_classes(detector, class_names):
        return
    count = adapt(detector.model).spec.num_classes
    names, expected = detector.class_names, tuple(class_names)
    source = detector.weights or detector.name.partition("?")[0]
    theirs = f"{count} classes" if names is None else f"the classes {shortened(names)}"
    raise KDError(
        f"{source} has {theirs}, and the data has {shortened(expected)}. Choose the classes of the data, or train the "
        "detector on them"
    )


def save_detector(detector: Detector, folder: str | Path, *, card: str | None = None) -> SavedDetector:
    """Write a detector into `folder` in the format of its own library.

    torchvision: a state dict `model.pth`. transformers: the folder of `save_pretrained`, with the image processor.
    Ultralytics: `best.pt`. All others: `model.safetensors`. Beside it lie `detector.yaml`, by which `open_detector`
    opens the folder, and `README.md` with the text of `card`.

    Raises KDError if the folder cannot be written. Then it is as it was before.
    """
    folder = Path(folder)
    library = library_of_model(detector.model)
    module = None if library is None else library_module(f"{library.prefix}/")
    save: Callable[[Detector, Path], tuple[str, str]] = getattr(module, "save_model", _save_tensors)
    try:
        with written_together(folder) as partial:
            file, how_to_open = save(detector, partial)
            about = {
                "detector": _portable_name(detector),
                "file": file,
                "classes": None if detector.class_names is None else list(detector.class_names),
                "weights": detector.weights,
                "trained": detector.trained,
                "image_size": detector.image_size,
            }
            if card is not None:
                (partial / "README.md").write_bytes(card.encode())
            text = dump(about)
            text = f"# A detector that kdtoolkit saved: `kd inspect .` shows it.\n{text}"
            (partial / DESCRIPTION).write_bytes(text.encode())
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of torch and safetensors raise their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise KDError(
            f"cannot write the detector into {folder} ({reason}), which is as it was before: make room there, or "
            "choose another folder"
        ) from error
    return SavedDetector(folder, folder / file, how_to_open)


def _portable_name(detector: Detector) -> str:
    """The detector's name without what lies on this machine: files of weights, and folders of transformers."""
    name = architecture(detector.name)
    if name.startswith("hf/") and Path(split_name(name)[0].removeprefix("hf/")).exists():
        config: Any = detector.model.config
        return f"hf/{config.model_type}"
    return name


def _save_tensors(detector: Detector, folder: Path) -> tuple[str, str]:
    """Save a state dict as safetensors: the format of detectors whose library has none of its own."""
    state = {key: value.detach().cpu().clone().contiguous() for key, value in detector.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if is_code(detector.name):
        name = architecture(detector.name)
        about = f"# It imports {name.partition(':')[0]}, and needs the package of its adapter.\n"
        arguments = f'"{name}", weights="."'
    else:
        about, arguments = "# Its module is part of kdtoolkit.\n", '"."'
    opened = f"from kdtoolkit.models import open_detector\nmodel = open_detector({arguments}).model.eval()\n"
    return "model.safetensors", about + opened


def _opened(name: str, weights: str | Path | None, args: Mapping[str, object], count: int | None) -> Opened | None:
    """The detector with the classes of its weights; None if its weights are random."""
    if is_place(name):
        if args or weights is not None:
            raise KDError(f"{name} has its own weights and arguments: leave out `weights` and `args`")
        return _open_place(Path(name))
    if _is_published_yolo(name):
        name = f"ultralytics/{name}"
    path, args = split_name(name, args)
    module, model = library_module(path), path.partition("/")[2]
    if weights == "none":
        return None
    if weights is not None and (is_place(weights) or len(Path(weights).parts) > 1):
        if open_weights := getattr(module, "open_weights", None):
            found: Opened = open_weights(model, args, Path(weights))
            return found
        model_name = architecture(with_arguments(path, args))
        return _open_state(model_name, _checkpoint_in(Path(weights)), str(weights), count)
    if module is not None:
        opened: Opened | None = module.open_published(model, args, weights)
        return opened
    if weights is not None:
        raise KDError(f"model {name!r}: there is no weights file {weights}")
    return None


def is_place(name: str | Path, folder: Path = Path()) -> bool:
    """Whether a detector or its weights are given by a path, and not by a name. Relative paths count from `folder`.

    A path may begin like a name, as "ultralytics/runs/best.pt" does. Then it is a place if a detector lies there.
    """
    place = folder / name
    if library_of_name(str(name)) is not None:
        return _holds_detector(place)
    named = is_code(str(name)) or _is_published_yolo(str(name))
    return os.path.exists(place) or (place.suffix in _WEIGHTS and not named)


def _holds_detector(place: Path) -> bool:
    """Whether this is a file of weights, or a folder that can be opened. It may be no path at all, and very long."""
    if not os.path.isdir(place):
        return place.suffix in _WEIGHTS and os.path.isfile(place)
    return any((place / file).is_file() for file in (DESCRIPTION, "config.json")) or any(place.glob(f"*/{DESCRIPTION}"))


def _is_published_yolo(name: str) -> bool:
    """Whether a name such as `yolo11n.pt` stands for Ultralytics' published weights: no such file lies here."""
    return re.fullmatch(r"yolov?\d+[a-z]\.pt", name) is not None and not Path(name).exists()


def _open_place(place: Path) -> Opened:
    """Open a file or a folder."""
    if place.is_dir():
        return _open_folder(place)
    if place.name == DESCRIPTION or _description(place.parent).get("file") == place.name:
        return _open_saved(place.parent)
    if holds_yolo(place):
        return _library("ultralytics").open_file(place)  # type: ignore[no-any-return]
    checkpoint = read_checkpoint(place)
    from kdtoolkit.detectors.published import published_name

    if (name := published_name(checkpoint.state)) is not None:
        return _open_state(name, checkpoint, str(place), None)
    raise KDError(
        f"{place} holds weights, but does not say of which detector: name the detector, such as "
        "kdtoolkit/gfl?backbone=resnet18, and give the file as its weights"
    )


def _open_folder(folder: Path) -> Opened:
    """Open a folder of `save_detector`, one that holds such a folder, or one of `save_pretrained`."""
    folder = _saved_in(folder)
    if (folder / DESCRIPTION).is_file():
        return _open_saved(folder)
    if (folder / "config.json").is_file():
        opened: Opened = _library("hf").open_published(str(folder), {}, None)
        return opened
    raise KDError(
        f"{folder} holds no detector: one of save_detector has {DESCRIPTION}, one of save_pretrained config.json"
    )


def _saved_in(place: Path) -> Path:
    """The one folder of `save_detector` inside a folder; else the place itself. Raises KDError if it has several."""
    inside = sorted(path.parent for path in place.glob(f"*/{DESCRIPTION}"))
    if (place / DESCRIPTION).is_file() or not inside:
        return place
    if len(inside) > 1:
        raise KDError(f"{place} holds several detectors: name one of {', '.join(map(str, inside))}")
    return inside[0]


def _open_saved(folder: Path) -> Opened:
    """Open a folder of `save_detector`."""
    about = _description(folder)
    source = folder / DESCRIPTION
    try:
        name, file, size = about["detector"], about["file"], about["image_size"]
        names = None if about["classes"] is None else tuple(map(str, about["classes"]))
        words, trained = str(about["weights"]), bool(about["trained"])
        if not isinstance(name, str):
            raise TypeError(f"detector: {name!r}")
        path = folder / file
    except (KeyError, TypeError) as error:
        raise KDError(f"{source} is damaged ({error}): save the detector again") from error
    if not path.is_file():
        raise KDError(f"{path} is missing, which {source} names: save the detector again")
    if path.suffix == ".pt":
        opened: Opened = _library("ultralytics").open_file(path)
    elif (folder / "config.json").is_file():
        opened = _library("hf").open_published(str(folder), {}, None)
    elif is_code(name):
        raise KDError(
            f"{source} names {name}, which imports a Python module and so runs its code. If you trust it, name it "
            f"yourself: {name}, with the weights {folder}"
        )
    else:
        opened = _open_state(name, replace(read_checkpoint(path), class_names=names), str(path), None)
    trained = trained and opened.trained
    return replace(opened, class_names=names, weights=words or str(folder), trained=trained, image_size=size)


def _description(folder: Path) -> dict[str, Any]:
    """The content of a folder's `detector.yaml`; empty if there is none."""
    try:
        content = load((folder / DESCRIPTION).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KDError(f"{folder / DESCRIPTION} cannot be read ({error}): save the detector again") from error
    return content if isinstance(content, dict) else {}


def _library(prefix: str) -> ModuleType:
    module = library_module(f"{prefix}/")
    assert module is not None  # the prefix is one of the table's
    return module


def _checkpoint_in(place: Path) -> Checkpoint:
    """The state dict of a file, or of a folder's detector."""
    place = _saved_in(place)
    about = _description(place)
    if about.get("file") in ("model.safetensors", "model.pth") and not (place / "config.json").is_file():
        names = about.get("classes")
        state = read_checkpoint(place / about["file"]).state
        trained, size = bool(about.get("trained", True)), about.get("image_size")
        return Checkpoint(state, names and tuple(map(str, names)), trained, size)
    if place.is_dir() or holds_yolo(place):
        opened = _open_place(place)
        return Checkpoint(dict(opened.model.state_dict()), opened.class_names, opened.trained, opened.image_size)
    return read_checkpoint(place)


def _open_state(name: str, checkpoint: Checkpoint, source: str, count: int | None) -> Opened:
    """Build a detector with the classes of a state dict, and load it.

    `count` is the number of classes that the user expects, which is tried first where the file names no classes.
    """
    build = partial(build_model, name)
    guess = count or _GUESS if checkpoint.class_names is None else len(checkpoint.class_names)
    model = build(guess)
    try:
        load_state(model, checkpoint.state, source)
    except KDError as error:
        errors = []
        for other in _possible_counts(build, guess, checkpoint.state, source):
            model = build(other)
            try:
                load_state(model, checkpoint.state, source)
            except KDError as reason:
                errors.append(reason)
            else:
                return Opened(model, build, other, name, None, source, checkpoint.trained, (), checkpoint.image_size)
        raise (errors or [error])[0] from None  # of the likeliest number
    names = checkpoint.class_names
    return Opened(model, build, guess, name, names, source, checkpoint.trained, (), checkpoint.image_size)


def _possible_counts(
    build: Callable[[int], nn.Module], count: int, state: Mapping[str, Tensor], source: str
) -> list[int]:
    """The numbers of classes that a state dict may be for, the likeliest first.

    The rows of a class layer grow by the same number with each class. So two models show how many a layer has for any.
    """
    model, larger = build(count), build(count + 1).state_dict()
    found: Counter[int] = Counter()
    state = aligned(model, state, source)
    for key, value in model.state_dict().items():
        if key in state and value.ndim and value.shape != larger[key].shape and state[key].ndim == value.ndim:
            more, rest = divmod(len(state[key]) - len(value), len(larger[key]) - len(value) or 1)
            if more and not rest and count + more > 0:
                found[count + more] += 1
    return [number for number, _ in found.most_common()]


def shortened(names: Sequence[str], most: int = 5) -> str:
    """Class names for a message: the first ones, and how many there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _with_classes(opened: Opened, class_names: tuple[str, ...] | None, count: int | None) -> Detector:
    """The detector with the classes that are asked for: with new class layers, if its own are different."""
    names = class_names if opened.class_names is None else opened.class_names
    known = class_names is not None and opened.class_names is not None
    if not opened.num_classes:  # it shows features alone
        names, count = None, None
    if count is None or (class_names == opened.class_names if known else count == opened.num_classes):
        return Detector(
            opened.model, opened.name, names, opened.weights, opened.trained, opened.notes, opened.image_size
        )
    model = opened.build(count)
    own, state = model.state_dict(), opened.model.state_dict()
    layers = _class_tensors(opened, own)
    taken = {key: value for key, value in state.items() if key in own and key not in layers}
    wider = {key for key, value in taken.items() if value.shape != own[key].shape}
    model.load_state_dict({key: taken[key] for key in taken.keys() - wider}, strict=False)
    theirs = f"{opened.num_classes} classes" if count != opened.num_classes else "different classes"
    source = opened.weights or opened.name
    note = f"the class layers are new, because {source} is for {theirs}"
    if wider:
        note += (
            f"; {len(wider)} more of {len(own)} tensors are new, because their width follows from the number of "
            f"classes: {', '.join(_modules_of(wider))}"
        )
    note += "; all other weights are taken from there"
    return Detector(model, opened.name, class_names, opened.weights, False, (*opened.notes, note), opened.image_size)


def _class_tensors(opened: Opened, own: Mapping[str, Tensor]) -> set[str]:
    """The names of the tensors whose rows belong to classes.

    If the adapter does not say them, they are all whose shapes depend on the number of classes.
    """
    with suppress(KDError):
        if (layers := adapt(opened.model).class_layers) is not None:
            return {key for key in own if key.rpartition(".")[0] in layers}
    larger = opened.build(opened.num_classes + 1).state_dict()
    return {key for key, value in opened.model.state_dict().items() if value.shape != larger[key].shape}


def _modules_of(tensors: Iterable[str]) -> list[str]:
    """The modules that tensors are of, by the first parts of their names: "model.23.cv3"."""
    return sorted({".".join(key.split(".")[:3]) for key in tensors})


def content_of(name: str, args: Mapping[str, object] | None = None, weights: str | None = None) -> str:
    """What identifies the files that a detector's weights come from, which may change while their names stay.

    For files and folders it is a digest of their content. For a name on the Hugging Face hub it is the commit that lies
    in the hub's cache on this machine. It is empty if there are no files, or if the cache has none.
    """
    path, args = split_name(name, args)
    library, _, place = path.partition("/")
    found = [_commit_of(place)] if library == "hf" and not Path(place).exists() else []
    named = [place if library == "hf" else path, weights, args.get("pretrained")]
    places = [Path(each) for each in named if isinstance(each, str) and not is_code(each) and Path(each).exists()]
    files = [path for each in places for path in (sorted(walk(each)) if each.is_dir() else [each])]
    if chosen := [path for path in files if path.suffix in FILES]:
        digest = hashlib.sha256()
        for file in chosen:
            about = file.stat()
            digest.update(file.name.encode() + b"\0" + _digest_of(file.resolve(), about.st_size, about.st_mtime_ns))
        found.append(digest.hexdigest()[:16])
    return " ".join(filter(None, found))


def _commit_of(repository: str) -> str:
    """The commit of a repository (OWNER/NAME) that lies in the hub's cache; empty if there is none."""
    if repository.count("/") != 1:
        return ""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, "config.json")  # .../snapshots/COMMIT/config.json
    except ValueError:  # no name that the hub allows
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


@cache  # a plan asks again for each of its cells
def _digest_of(path: Path, size: int, modified: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
