"""The detector libraries that kdtoolkit knows, and the adapter of each detector.

A library in this package is one row of `LIBRARIES` and one module in `kdtoolkit/adapters`. That module defines
`ADAPTERS`, its adapter classes; `build_model`, which builds its detectors by name; and `open_published`, which opens
them with the library's own weights. It may define `open_weights`, if files of weights need more than a state dict with
the model's names, and `save_model`, if the library has a format of its own. Another package announces its adapter
classes as entry points of the group `kdtoolkit.adapters`, and needs no row.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.errors import KDError, UnknownDetectorError
from kdtoolkit.plugins import announced


@dataclass(frozen=True)
class Library:
    """One library of detectors.

    `prefix` is the first part of its models' names, and `example` such a name. `module` is the module that must be
    imported before any of its detectors can exist. `adapters`, our module for the library, is imported only after it.
    `package` is its name on PyPI. If `optional`, kdtoolkit has an extra of that name, which installs it. `sources` are
    the files of kdtoolkit, besides the adapters, that decide what its detectors compute.
    """

    prefix: str
    example: str
    module: str
    adapters: str
    package: str
    optional: bool = False
    sources: tuple[str, ...] = ()


LIBRARIES = (
    Library(
        "kdtoolkit",
        "kdtoolkit/gfl?backbone=resnet18",
        "kdtoolkit.detectors",
        "kdtoolkit.adapters.native",
        "timm",
        sources=("detectors/*.py",),
    ),
    Library(
        "torchvision",
        "torchvision/fcos_resnet50_fpn",
        "torchvision.models.detection",
        "kdtoolkit.adapters.torchvision",
        "torchvision",
        sources=("detectors/backbone.py", "detectors/precision.py", "detectors/towers.py"),
    ),
    Library(
        "timm",
        "timm/vit_small_patch14_dinov2.lvd142m",
        "timm",
        "kdtoolkit.adapters.timm",
        "timm",
        sources=("detectors/backbone.py",),
    ),
    Library(
        "hf",
        "hf/PATH-OR-NAME",
        "transformers",
        "kdtoolkit.adapters.transformers",
        "transformers",
        optional=True,
        sources=("detectors/precision.py",),
    ),
    Library(
        "ultralytics",
        "ultralytics/yolo11n",
        "ultralytics",
        "kdtoolkit.adapters.ultralytics",
        "ultralytics",
        optional=True,
        sources=("detectors/assign.py", "detectors/towers.py"),
    ),
)
ENTRY_POINTS = "kdtoolkit.adapters"


def library_of_name(name: str) -> Library | None:
    """The library that a model's name begins with, as in `hf/detr`; None for `package.module:callable`."""
    prefix = name.partition("?")[0].partition("/")[0]
    return next((library for library in LIBRARIES if library.prefix == prefix), None)


def adapter_classes(*, load: bool = False) -> list[type[DetectorAdapter]]:
    """The adapter classes of all libraries that are imported, and the adapter classes of other packages.

    With `load`, the libraries that are installed are imported first. Raises KDError where an announced class cannot be
    loaded.
    """
    if load:
        for library in LIBRARIES:
            with suppress(ImportError):
                importlib.import_module(library.module)
    return _own_classes(LIBRARIES) + announced(ENTRY_POINTS)


def adapt(model: nn.Module | DetectorAdapter) -> DetectorAdapter:
    """Wrap a detector in the adapter for its class; an adapter is returned as it is.

    Raises UnknownDetectorError where no adapter knows the class, and KDError where the adapter refuses the model.
    """
    if isinstance(model, DetectorAdapter):
        return model
    # Adapters of different libraries are not imported: the installed version of such a library may be too old. Other
    # packages' adapters are loaded only if none of ours knows the model.
    for classes in (lambda: _own_classes(_libraries_of(model)), lambda: announced(ENTRY_POINTS)):
        for cls in classes():
            if cls.matches(model):
                adapter: DetectorAdapter = cls(model)
                return adapter
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        raise KDError(
            f"this {type(inner).__qualname__} is compiled: hand in the model as it was before torch.compile. What can "
            "be compiled is the whole step: torch.compile(distiller)"
        )
    if isinstance(inner := getattr(model, "module", None), nn.Module):
        wrapper = type(model).__qualname__
        raise KDError(
            f"this is a {wrapper} around {type(inner).__qualname__}: hand in the model itself, model.module, and wrap "
            "the whole step instead, as in DistributedDataParallel(distiller)"
        )
    known = ", ".join([*(library.module for library in LIBRARIES), *(cls.__name__ for cls in announced(ENTRY_POINTS))])
    raise UnknownDetectorError(
        f"no adapter for {type(model).__module__}.{type(model).__qualname__}: there are some for detectors of {known} "
        "(docs/detectors.md). Write one: docs/own_detector.md."
    )


def _own_classes(libraries: Iterable[Library]) -> list[type[DetectorAdapter]]:
    """The adapter classes of all imported `libraries`. Raises KDError for a version that kdtoolkit cannot work with."""
    found: list[type[DetectorAdapter]] = []
    for library in libraries:
        if library.module not in sys.modules:
            continue
        try:
            found += importlib.import_module(library.adapters).ADAPTERS
        except ImportError as error:
            package = library.package
            requirement = f"'kdtoolkit[{package}]'" if library.optional else package
            raise KDError(
                f"kdtoolkit cannot work with this version of {package} (importing {library.adapters} failed: {error}): "
                f"pip install -U {requirement}"
            ) from error
    return found


def library_of_model(model: nn.Module) -> Library | None:
    """The library that the class of a model is from; None for a class of the user or of another package."""
    return next(iter(_libraries_of(model)), None)


def _libraries_of(model: nn.Module) -> Sequence[Library]:
    """The libraries that the class of a model, or one of its base classes, is from."""
    modules = [f"{cls.__module__}." for cls in type(model).__mro__]
    return [library for library in LIBRARIES if any(module.startswith(f"{library.module}.") for module in modules)]
