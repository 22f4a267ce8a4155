"""Detectors by name, for suites and the command line, and weights from files."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from kdtoolkit.errors import KDError

# First part of a name -> the adapter module whose `build_model` makes it, and the extra that brings its library.
_LIBRARIES: Mapping[str, tuple[str, str | None]] = {
    "kdtoolkit": ("kdtoolkit.adapters.native", None),
    "torchvision": ("kdtoolkit.adapters.torchvision", None),
    "hf": ("kdtoolkit.adapters.transformers", "transformers"),
    "ultralytics": ("kdtoolkit.adapters.ultralytics", "ultralytics"),
}
EXAMPLES = (
    "kdtoolkit/gfl?backbone=resnet18",
    "torchvision/fcos_resnet50_fpn",
    "hf/PATH-OR-NAME",
    "ultralytics/yolo11n",
    "package.module:callable",
)


def build_model(name: str, num_classes: int, args: Mapping[str, object] | None = None) -> nn.Module:
    """Build a detector.

    Args:
        name: library/model, with arguments after a question mark if there are any, as in
            "kdtoolkit/gfl?backbone=resnet18&strides=[8, 16, 32]"; or "package.module:callable" (a class or function
            that returns a detector; modules in the working directory are found).
        num_classes: without background; handed on as the keyword argument of that name.
        args: further keyword arguments; they override those in the name.

    Raises:
        KDError: there is no such detector, it takes no such arguments, or its library is not installed.
    """
    path, _, query = name.partition("?")
    args = {**_arguments(name, query), **(args or {})}
    library, slash, model = path.partition("/")
    if slash and library in _LIBRARIES:
        module, extra = _LIBRARIES[library]
        try:
            builder = importlib.import_module(module)
        except ImportError as error:
            if extra is None:
                raise
            raise KDError(
                f"model {name!r} needs {extra}: pip install 'kdtoolkit[{extra}]' (importing it failed: {error})"
            ) from error
        built: nn.Module = builder.build_model(model, num_classes, args)
        return built
    return construct(_imported(path), name, num_classes, args)


def construct(factory: Callable[..., object], name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Call `factory` with `num_classes` and `args`. Raises KDError where it takes no such arguments, or values."""
    signature = inspect.signature(factory)
    try:
        signature.bind(num_classes=num_classes, **args)
    except TypeError as error:
        raise KDError(f"model {name!r}: {error}. Its arguments are {', '.join(signature.parameters)}") from error
    try:
        model = factory(num_classes=num_classes, **args)
    except KDError:
        raise
    except (Exception, SystemExit) as error:  # whatever a library, or code of the user's own, makes of the arguments
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise KDError(f"model {name!r} cannot be built from {given or 'its defaults'}: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise KDError(f"model {name!r} must return a torch.nn.Module; it returned {type(model).__name__}")
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or a .pth or .pt file in which nothing but tensors is loaded.

    Raises KDError where the file is missing, broken, or holds anything else.
    """
    if not path.is_file():
        raise KDError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise KDError(
            f"{path} is damaged, or holds Python objects, which are not loaded because they may run code: in its own "
            "library, save model.state_dict() with torch.save or safetensors"
        ) from error
    except Exception as error:  # torch and safetensors raise all kinds of them for what is no file of theirs
        raise KDError(f"weights file {path} cannot be read, it is damaged or something else: {_said(error)}") from error
    for key in ("state_dict", "model"):  # where training scripts put it, beside their optimiser's
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise KDError(f"{path} holds no state dict: save model.state_dict() into it")
    return state


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file's weights into `model`, all of them. Raises KDError that names what is missing or does not fit."""
    state, own = read_weights(path), model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unknown": [str(key) for key in state if key not in own],
        "of another shape": [
            f"{key} (needs {tuple(own[key].shape)}, is {tuple(state[key].shape)})"
            for key in own
            if key in state and own[key].shape != state[key].shape
        ],
    }
    if found := [f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in problems.items() if keys]:
        raise KDError(
            f"the weights of {path} do not fit {type(model).__name__}: {'; '.join(found)}. Build the model with the "
            "class count and sizes that they were trained with"
        )
    model.load_state_dict(state)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _arguments(name: str, query: str) -> dict[str, object]:
    if not query:
        return {}
    try:
        return {key: yaml.safe_load(value) for key, value in parse_qsl(query, strict_parsing=True)}
    except (ValueError, yaml.YAMLError) as error:
        raise KDError(f"model {name!r}: write arguments as ?name=value&name=value ({error})") from error


def _imported(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise KDError(f"unknown model {name!r}: write a name such as {', '.join(EXAMPLES)}")
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` has it, and console scripts have not
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise KDError(f"model {name!r} cannot be imported: {_said(error)}") from error
    if not callable(factory):
        raise KDError(f"model {name!r} is not callable: name a class or a function that returns a detector")
    found: Callable[..., object] = factory
    return found
