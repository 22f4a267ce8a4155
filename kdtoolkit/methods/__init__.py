"""Distillation methods, one file each. `all_methods` finds them, and those that other packages announce."""

from __future__ import annotations

from importlib.metadata import entry_points

from kdtoolkit.contract import Method
from kdtoolkit.methods.bckd import BCKD
from kdtoolkit.methods.cankd import CanKD
from kdtoolkit.methods.crosskd import CrossKD
from kdtoolkit.methods.cwd import CWD
from kdtoolkit.methods.defeat import DeFeat
from kdtoolkit.methods.detkds import DetKDS
from kdtoolkit.methods.fbkd import FBKD
from kdtoolkit.methods.fgd import FGD
from kdtoolkit.methods.fitnet import FitNet
from kdtoolkit.methods.kd_detr import KDDETR
from kdtoolkit.methods.ld import LD
from kdtoolkit.methods.logitkd import LogitKD
from kdtoolkit.methods.mgd import MGD
from kdtoolkit.methods.mimic import Mimic
from kdtoolkit.methods.pkd import PKD

__all__ = [
    "BCKD",
    "CWD",
    "FBKD",
    "FGD",
    "KDDETR",
    "LD",
    "MGD",
    "PKD",
    "CanKD",
    "CrossKD",
    "DeFeat",
    "DetKDS",
    "FitNet",
    "LogitKD",
    "Mimic",
    "all_methods",
]

ENTRY_POINTS = "kdtoolkit.methods"


def all_methods() -> dict[str, type[Method]]:
    """Every method class by its name: this package's, and other packages' entry points of group kdtoolkit.methods."""
    own: list[type[Method]] = [
        *(CrossKD, PKD, FGD, LD, FitNet, CWD, MGD, FBKD, DeFeat, CanKD, DetKDS),
        *(Mimic, BCKD, LogitKD, KDDETR),
    ]
    found = own + [entry.load() for entry in entry_points(group=ENTRY_POINTS)]
    return {cls.__name__: cls for cls in found}
