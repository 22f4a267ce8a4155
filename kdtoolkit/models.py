"""Detectors by name, for suites and the command line."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from kdtoolkit.detectors import ATSS, FCOS, GFL, RetinaNet
from kdtoolkit.errors import KDError

NATIVE: Mapping[str, type[nn.Module]] = {
    "kdtoolkit/gfl": GFL,
    "kdtoolkit/atss": ATSS,
    "kdtoolkit/fcos": FCOS,
    "kdtoolkit/retinanet": RetinaNet,
}


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build a detector.

    Args:
        name: "kdtoolkit/" and gfl, atss, fcos or retinanet; or "package.module:callable" (a class or function that
            returns a detector; modules in the working directory are found).
        num_classes: handed on as the keyword argument of that name.
        args: further keyword arguments.

    Raises:
        KDError: there is no such detector, or it takes no such arguments.
    """
    factory = NATIVE[name] if name in NATIVE else _imported(name)
    signature = inspect.signature(factory)
    try:
        signature.bind(num_classes=num_classes, **args)
    except TypeError as error:
        allowed = ", ".join(parameter for parameter in signature.parameters if parameter != "num_classes")
        raise KDError(f"model {name!r}: {error}. Its arguments are num_classes, {allowed}") from error
    model = factory(num_classes=num_classes, **args)
    if not isinstance(model, nn.Module):
        raise KDError(f"model {name!r} must return a torch.nn.Module; it returned {type(model).__name__}")
    return model


def _imported(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise KDError(f"unknown model {name!r}: write one of {', '.join(NATIVE)}, or package.module:callable")
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` has it, and console scripts have not
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise KDError(f"model {name!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise KDError(f"model {name!r} is not callable: name a class or a function that returns a detector")
    found: Callable[..., object] = factory
    return found
