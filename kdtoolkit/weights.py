"""Weights from files: loads the state dict that kdtoolkit or a training script saved into a detector."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state dict, and the names of the classes that it is for; None if the file does not say them.

    `trained` is False if it is known that some of the tensors are random. `image_size` is that of the images that they
    were trained on, in pixels; None if nobody knows it.
    """

    state: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    trained: bool = True
    image_size: int | None = None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file, as `read_checkpoint` does."""
    return read_checkpoint(path).state


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a state dict from a .safetensors, .pth or .pt file. Nothing but tensors is loaded, and class names.

    The file may be a training script's checkpoint. If that holds several state dicts, the moving average of the weights
    (`ema`) is taken, because that is what was evaluated. If there is none, the state dict named `state_dict`,
    `model_state_dict`, `model` or similar is taken.

    Raises KDError if the file is missing or damaged, holds no state dict, or holds several and it is unclear which one
    is meant.
    """
    if not path.is_file():
        raise KDError(f"there is no weights file {path}")
    if path.suffix == ".onnx":
        raise KDError(
            f"{path} is an exported file, which runs without kdtoolkit (docs/export.md): name the run or the weights "
            "that it was exported from"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise KDError(
            f"{path} is damaged, or holds Python objects. These are not loaded, because they may run code: load the "
            "file with the library that wrote it, and save model.state_dict() with torch.save or safetensors"
        ) from error
    except Exception as error:  # torch and safetensors raise errors of many kinds for a file that is not theirs
        raise KDError(
            f"weights file {path} cannot be read ({type(error).__name__}: {error}). It is damaged, or holds no "
            "weights: save model.state_dict() into it again"
        ) from error
    found = dict(_state_dicts(content))
    if not found:
        held = f"a dict of {', '.join(map(str, list(content)[:6]))}" if isinstance(content, dict) else "something else"
        raise KDError(f"{path} holds no state dict, but {held}: save model.state_dict() into it")
    if len(found) > 1 and not (found := _preferred(found)):
        raise KDError(
            f"{path} holds several state dicts ({', '.join(dict(_state_dicts(content)))}): save only the one to load"
        )
    (state,) = found.values()
    return Checkpoint(state, _class_names(content))


def _class_names(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names of a checkpoint, under the names that OpenMMLab's and other training scripts give them."""
    places = [content, *(content[key] for key in ("meta", "dataset_meta") if isinstance(content.get(key), dict))]
    places += [place["dataset_meta"] for place in places if isinstance(place.get("dataset_meta"), dict)]
    for place in places:
        for key in ("class_names", "classes", "CLASSES", "names"):
            names = place.get(key)
            if isinstance(names, dict) and list(names) == list(range(len(names))):
                names = list(names.values())
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def holds_yolo(path: Path) -> bool:
    """Whether a file is a checkpoint of Ultralytics: a pickle with objects of its classes. Nothing of it is run."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with suppress(zipfile.BadZipFile, KeyError), zipfile.ZipFile(path) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), "")
        return b"cultralytics.nn." in archive.read(pickled)  # the opcode that names a class
    return False


# The names that training scripts give to a moving average of weights (`model_ema`), and to the weights themselves. The
# first name that is found counts.
_AVERAGE = re.compile("(^|_)(ema|swa|avg|averaged?)(_|$)")
_PLAIN = ("state_dict", "model_state_dict", "model", "student", "net", "network", "weights", "module")


def _state_dicts(content: object, name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All state dicts in a checkpoint, by their place (`ema.module`). Those of optimisers have numbers as keys."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return
    # Extra state of a module, such as the step of a Distiller, is no weight.
    own = {key: value for key, value in content.items() if key.rpartition(".")[2] != "_extra_state"}
    if own and all(isinstance(value, Tensor) for value in own.values()):
        yield name, own
        return
    for key, value in content.items():
        yield from _state_dicts(value, f"{name}.{key}" if name else key)


def _preferred(found: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Which of a checkpoint's state dicts to load; empty if that is not clear."""
    tops = {name: name.partition(".")[0] for name in found}
    plain = next((found[name] for known in _PLAIN for name, top in tops.items() if top == known), None)
    whole = plain or max(found.values(), key=len)
    averages = {
        name: found[name] for name, top in tops.items() if _AVERAGE.search(top) and _is_like(found[name], whole)
    }
    # OpenMMLab swaps average and weights before it saves them: then the dict that is called average has a counter.
    exchanged = "state_dict" in found and any("steps" in state for state in averages.values())
    if averages and not exchanged:
        return averages if len(averages) == 1 else {}
    for known in _PLAIN:
        if named := {name: found[name] for name, top in tops.items() if top == known}:
            return named if len(named) == 1 else {}
    return {}


def _is_like(state: Mapping[str, Tensor], whole: Mapping[str, Tensor], least: float = 0.9) -> bool:
    """Whether a state dict has about the tensors of another, but for prefixes of their names and counters."""
    ours, theirs = (Counter(_end(key) for key in each if not _is_counter(key)) for each in (state, whole))
    return (ours & theirs).total() >= least * theirs.total()


def _end(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def load_weights(model: nn.Module, path: Path) -> None:
    """Load all weights of a file into `model`.

    Prefixes that all names share are removed (`module.`, `_orig_mod.`, a Distiller's `student.`). Batch norms'
    `num_batches_tracked` may be missing. Weights of GFL, ATSS, RetinaNet and FCOS may have the names of their authors'
    projects. Raises KDError that names what else is missing or does not fit.
    """
    load_state(model, read_weights(path), str(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict as `load_weights` does. `source` is what errors call it."""
    model.load_state_dict(fitted(model, aligned(model, state, source), source))


def aligned(model: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Give the tensors of a state dict the names that `model` has: prefixes are removed, published names replaced.

    Raises KDError if the detector's names occur behind several prefixes.
    """
    own, kind = model.state_dict(), type(model).__name__
    if any("bbox_head." in key for key in state):
        from kdtoolkit.detectors.dense import DenseDetector
        from kdtoolkit.detectors.published import rename, rename_published

        if isinstance(model, DenseDetector):
            dense = model
            state = _unwrapped(state, source, lambda name: rename(dense, name) in own, kind)
            return rename_published(model, state)
    return _unwrapped(state, source, own.__contains__, kind)


_ADVICE = "Build the model with the class count and the sizes that the weights were trained with"


def fitted(model: nn.Module, state: Mapping[str, Tensor], source: str, advice: str = _ADVICE) -> dict[str, Tensor]:
    """Check that a state dict with the names of `model` fits it, and return it with the counters of all batch norms.

    Raises KDError that names what is missing, unknown or of a different shape.
    """
    kind, own = type(model).__name__, model.state_dict()
    # As in torch: files from before torch 0.4.1 have no counters, and frozen batch norms have none either.
    counters = {key: value for key, value in own.items() if _is_counter(key)}
    state = {**counters, **{key: value for key, value in state.items() if key in own or not _is_counter(key)}}
    missing, unknown = ([key for key in a if key not in b] for a, b in ((own, state), (state, own)))
    misshapen = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unknown or misshapen):
        return state
    if set(missing) >= own.keys() - counters.keys():
        raise KDError(
            f"{source} holds no weights of {kind}: it has {_some(unknown)}, and {kind} has {_some(missing)}. Name the "
            "model that the weights were trained in"
        )
    if not (missing or unknown) and (classes := _class_counts(model, own, state, misshapen)):
        raise KDError(
            f"the weights of {source} are for {classes[1]} classes, and this {kind} has {classes[0]} "
            f"({_shapes(misshapen, own, state)}): build it with num_classes={classes[1]} (--classes {classes[1]})"
        )
    problems = {
        "missing": _some(missing),
        "unknown": _some(unknown),
        "of a different shape": _shapes(misshapen, own, state),
    }
    counts = {"missing": len(missing), "unknown": len(unknown), "of a different shape": len(misshapen)}
    found = "; ".join(f"{counts[problem]} {problem}: {names}" for problem, names in problems.items() if names)
    raise KDError(f"the weights of {source} do not fit {kind}: {found}. {advice}")


def _unwrapped(state: Mapping[str, Tensor], source: str, known: Callable[[str], bool], kind: str) -> dict[str, Tensor]:
    """The detector's part of a state dict, without the prefix that wrappers put before its names.

    `torch.compile` puts `_orig_mod.` before the names of the module that was compiled, which may be only a part of the
    detector. If the detector's names occur behind several prefixes, one of them may be that of a moving average
    (`model_ema.module.`), which is taken. OpenMMLab 2 keeps a second copy under names without points
    (`ema_backbone_conv1_weight`), which is left out: it has exchanged both before it saves them. Raises KDError if it
    is unclear which prefix is meant.
    """
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    copies = {f"ema_{key.replace('.', '_')}" for key in state}
    state = {key: value for key, value in state.items() if key not in copies}
    votes: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        if not _is_counter(key):
            votes.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if known(".".join(parts[i:])))
    most = max(votes.values(), default=0)
    found = [prefix for prefix, count in votes.items() if count == most]
    averages = [prefix for prefix in found if _AVERAGE.search(prefix.replace(".", "_"))]
    if len(averages) == 1:
        found = averages
    if not found or "" in found:
        return state
    if len(found) > 1:
        raise KDError(
            f"{source} holds the weights of {kind} more than once, behind {found[0]!r} and {found[1]!r}: save only "
            "the part behind one of them"
        )
    return {key.removeprefix(found[0]): value for key, value in state.items() if key.startswith(found[0])}


def _class_counts(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], misshapen: Sequence[str]
) -> tuple[int, int] | None:
    """Class counts of the model and of a state dict, if a different count explains all shapes that do not fit."""
    try:
        classes = adapt(model).spec.num_classes
    except KDError:
        return None
    counts: set[int] | None = None
    if not any(re.search("cls|class|logit|score", key) for key in misshapen):
        return None
    for key in misshapen:
        if own[key].ndim == 0 or own[key].shape[1:] != state[key].shape[1:]:
            return None
        ours, theirs = len(own[key]), len(state[key])
        # A layer has the same number of outputs for each class, and perhaps for background too.
        possible = {
            theirs * (classes + background) // ours - background
            for background in (0, 1)
            if ours % (classes + background) == 0 and theirs * (classes + background) % ours == 0
        }
        counts = possible if counts is None else counts & possible
    return (classes, counts.pop()) if counts and len(counts) == 1 else None


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shapes(keys: Sequence[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    return _some([f"{key} (needs {tuple(own[key].shape)}, is {tuple(state[key].shape)})" for key in keys])
