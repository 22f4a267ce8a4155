"""Knowledge distillation for object detectors: any method, alone or combined, on any detector."""

from kdtoolkit.contract import adapt
from kdtoolkit.distiller import Distiller, Losses
from kdtoolkit.errors import IncompatibleError, KDError, NonFiniteLossError

__all__ = ["Distiller", "IncompatibleError", "KDError", "Losses", "NonFiniteLossError", "adapt"]

__version__ = "0.1.0"
