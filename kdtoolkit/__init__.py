"""Knowledge distillation for object detectors: any method, alone or combined, on any detector."""

import importlib
from typing import TYPE_CHECKING

from kdtoolkit.errors import IncompatibleError, KDError, NonFiniteLossError

__all__ = [
    "Distiller",
    "IncompatibleError",
    "KDError",
    "Losses",
    "NonFiniteLossError",
    "adapt",
    "distill",
    "evaluate",
    "export",
    "predict",
    "probe",
    "pseudo_label",
    "train",
    "tune",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kdtoolkit.deploy import export
    from kdtoolkit.distiller import Distiller, Losses
    from kdtoolkit.libraries import adapt
    from kdtoolkit.probing import probe
    from kdtoolkit.tuning.calls import tune
    from kdtoolkit.workflow.calls import distill, train
    from kdtoolkit.workflow.evaluate import evaluate
    from kdtoolkit.workflow.predict import predict
    from kdtoolkit.workflow.pseudo_label import pseudo_label
else:
    # Imported at their first use, because they import torch, which takes seconds and which `kd --help` does not need.
    _LATE = {
        "Distiller": "kdtoolkit.distiller",
        "Losses": "kdtoolkit.distiller",
        "adapt": "kdtoolkit.libraries",
        "distill": "kdtoolkit.workflow.calls",
        "evaluate": "kdtoolkit.workflow.evaluate",
        "export": "kdtoolkit.deploy",
        "predict": "kdtoolkit.workflow.predict",
        "probe": "kdtoolkit.probing",
        "pseudo_label": "kdtoolkit.workflow.pseudo_label",
        "train": "kdtoolkit.workflow.calls",
        "tune": "kdtoolkit.tuning.calls",
    }

    def __getattr__(name: str) -> object:
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_LATE[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATE})
