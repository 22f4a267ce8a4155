"""Distillation methods, one file each. Files of this folder, and what other packages announce, are found here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache

from kdtoolkit.contract import Method
from kdtoolkit.methods.bckd import BCKD
from kdtoolkit.methods.cankd import CanKD
from kdtoolkit.methods.clockdistill import CLoCKDistill
from kdtoolkit.methods.cosine import Cosine
from kdtoolkit.methods.crosskd import CrossKD
from kdtoolkit.methods.cwd import CWD
from kdtoolkit.methods.defeat import DeFeat
from kdtoolkit.methods.detkds import DetKDS
from kdtoolkit.methods.detrdistill import DETRDistill
from kdtoolkit.methods.fbkd import FBKD
from kdtoolkit.methods.fgd import FGD
from kdtoolkit.methods.fitnet import FitNet
from kdtoolkit.methods.kd_detr import KDDETR
from kdtoolkit.methods.ld import LD
from kdtoolkit.methods.logitkd import LogitKD
from kdtoolkit.methods.mgd import MGD
from kdtoolkit.methods.mimic import Mimic
from kdtoolkit.methods.object_kd import ObjectKD
from kdtoolkit.methods.pkd import PKD
from kdtoolkit.methods.sl2 import SL2
from kdtoolkit.plugins import announced

__all__ = [
    "BCKD",
    "CWD",
    "FBKD",
    "FGD",
    "KDDETR",
    "LD",
    "MGD",
    "PKD",
    "SL2",
    "CLoCKDistill",
    "CanKD",
    "Cosine",
    "CrossKD",
    "DETRDistill",
    "DeFeat",
    "DetKDS",
    "FitNet",
    "LogitKD",
    "Mimic",
    "ObjectKD",
    "all_methods",
    "published_settings",
]

ENTRY_POINTS = "kdtoolkit.methods"


@cache
def _own_methods() -> dict[str, type[Method]]:
    """The methods that this package's modules define: subclasses of Method that are not abstract."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [(cls, module) for module in modules for cls in vars(module).values() if isinstance(cls, type)]
    methods = (cls for cls, module in found if issubclass(cls, Method) and cls.__module__ == module.__name__)
    return {cls.__name__: cls for cls in methods if not inspect.isabstract(cls)}


def all_methods() -> dict[str, type[Method]]:
    """Every method class by its name: this package's, and other packages' entry points of group kdtoolkit.methods.

    Raises KDError where an announced one cannot be loaded.
    """
    return _own_methods() | {cls.__name__: cls for cls in announced(ENTRY_POINTS)}


def published_settings(method: type[Method]) -> dict[str, Callable[[], Method]]:
    """A method's published settings for detectors that its defaults are not for, by name: `CrossKD.for_fcos`."""
    names = [name for name in dir(method) if name.startswith("for_")]
    return {f"{method.__name__}.{name}": getattr(method, name) for name in names}


def __getattr__(name: str) -> type[Method]:
    """Methods whose files are not imported above. The imports are there for type checkers and editors alone."""
    if name in (own := _own_methods()):
        return own[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
