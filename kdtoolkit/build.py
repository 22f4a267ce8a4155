"""Detectors by name, with random weights."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from torch import nn

from kdtoolkit.errors import KDError
from kdtoolkit.libraries import LIBRARIES, library_of_name
from kdtoolkit.options import check_options, did_you_mean
from kdtoolkit.yaml_text import split_name, with_arguments


def build_model(name: str, num_classes: int, args: Mapping[str, object] | None = None) -> nn.Module:
    """Build a detector.

    Args:
        name: "library/model", or "package.module:callable" for a class or function that returns a detector. Modules in
            the working directory are found too. Arguments may follow a question mark:
            "kdtoolkit/gfl?backbone=resnet18&strides=[8, 16, 32]".
        num_classes: number of classes, without background. It is passed on as a keyword argument of this name.
        args: further keyword arguments. They override those in the name.

    Raises:
        KDError: there is no such detector, it does not take these arguments, or its library is not installed.
    """
    path, args = split_name(name, args)
    module, _, model = library_module(name), *path.partition("/")[1:]
    if module is not None:
        built: nn.Module = module.build_model(model, num_classes, args)
        return built
    return construct(_imported(path), name, num_classes, args)


def library_module(name: str) -> ModuleType | None:
    """The module of kdtoolkit for the library of a model's name; None for "package.module:callable".

    Raises KDError if the library is not installed.
    """
    library = library_of_name(name)
    if library is None or "/" not in name.partition("?")[0]:
        return None
    try:
        return importlib.import_module(library.adapters)
    except ImportError as error:
        if not library.optional:
            raise
        raise KDError(
            f"model {name!r} needs {library.package}: pip install 'kdtoolkit[{library.package}]' (importing it "
            f"failed: {error})"
        ) from error


def is_code(name: str) -> bool:
    """Whether a model's name is "package.module:callable", so that building it imports a module of that name.

    The path of a file or folder is none, whatever it is called.
    """
    path = name.partition("?")[0]
    return re.fullmatch(r"[\w.]+:\w+", path) is not None and not os.path.exists(path)


_WEIGHTS = ("pretrained", "weights", "weights_backbone")  # arguments by which libraries load weights


def backbone_weights(name: str) -> str:
    """Where the weights of a detector's backbone come from, as the name's arguments say; empty if they are random."""
    _, args = split_name(name)
    source = args.get("pretrained") or args.get("weights_backbone")
    if library_of_name(name) is None or not source:
        return ""
    return f"{'ImageNet' if source is True else source} in the backbone, the rest random"


def architecture(name: str) -> str:
    """A model's name without the arguments that load weights, which a saved detector has itself."""
    path, args = split_name(name)
    if library_of_name(name) is not None:
        args = {key: value for key, value in args.items() if key not in _WEIGHTS}
    return with_arguments(path, args)


def construct(factory: Callable[..., object], name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Call `factory` with `num_classes` and `args`. Raises KDError if it does not take such arguments, or values."""
    signature = inspect.signature(factory)
    try:
        signature.bind(num_classes=num_classes, **args)
    except TypeError as error:
        known = list(signature.parameters)
        unknown = next((each for each in args if each not in known), "")
        hint = did_you_mean(unknown, known)
        raise KDError(f"model {name!r}: {error}{hint}. Its arguments are {', '.join(known) or 'none'}") from error
    args = check_options(name.partition("?")[0], factory, args)
    try:
        model = factory(num_classes=num_classes, **args)
    except KDError:
        raise
    except (Exception, SystemExit) as error:  # a library, or the user's code, may raise anything
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise KDError(f"model {name!r} cannot be built from {given or 'its defaults'}: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise KDError(f"model {name!r} must return a torch.nn.Module; it returned {type(model).__name__}")
    return model


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _imported(name: str) -> Callable[..., object]:
    if not is_code(name):
        hint = did_you_mean(name.partition("/")[0], [library.prefix for library in LIBRARIES])
        examples = ", ".join([*(library.example for library in LIBRARIES), "package.module:callable"])
        raise KDError(
            f"unknown model {name!r}{hint}: there is no such file or folder, and no such model. Write the path of a "
            f"detector, or a name such as {examples}"
        )
    module_name, _, attribute = name.partition(":")
    find_modules_here()
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # the user's module may raise anything when it is imported
        raise KDError(f"model {name!r} cannot be imported: {_said(error)}") from error
    if not callable(factory):
        raise KDError(f"model {name!r} is not callable: name a class or a function that returns a detector")
    found: Callable[..., object] = factory
    return found


def find_modules_here() -> None:
    """Let Python find the modules in the working directory too: `python -m` does so, console scripts do not."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
