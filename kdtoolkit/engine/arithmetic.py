"""How a training step is computed: precision, memory format, algorithm of convolutions. The hardware decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.precision import Precision, autocast_type, resolve_precision
from kdtoolkit.winograd import FastConvolutions, gains, lay_out_kernels


@dataclass(frozen=True)
class Arithmetic:
    """How a step is computed. Values differ by rounding alone, except for those of the precision.

    Attributes:
        device: `cpu`, `cuda` ...
        precision: what the forward pass computes in.
        channels_last: whether the models' maps lie in memory with the channels last.
        winograd: whether large 3x3 convolutions are computed by Winograd's algorithm.
        why: why the channels are last or not, as the end of a sentence; empty if the user chose it.
    """

    device: str
    precision: Precision
    channels_last: bool
    winograd: bool
    why: str

    @classmethod
    def of(
        cls,
        distiller: Distiller,
        device: str | torch.device | None = None,
        *,
        precision: Literal["auto"] | Precision = "float32",
        channels_last: Literal["auto"] | bool = "auto",
        winograd: bool = True,
        compiled: bool = False,
    ) -> Arithmetic:
        """What suits the distiller's models on a device.

        Args:
            distiller: student and teacher.
            device: where they are trained; None asks the student itself.
            precision: as in `TrainConfig`.
            channels_last: "auto" chooses what is faster (docs/speed.md).
            winograd: False computes all convolutions directly.
            compiled: whether the step is compiled; then the compiler chooses how to compute convolutions.

        Raises KDError if there is no precision of that name.
        """
        device = torch.device(next(distiller.student.parameters()).device if device is None else device)
        found = resolve_precision(precision, device)
        fast = winograd and not compiled and device.type == "cpu" and found == "float32" and gains(*_models(distiller))
        if channels_last != "auto":
            return cls(device.type, found, channels_last, fast, "")
        last, why = _channels_last(device.type, found)
        return cls(device.type, found, last, fast, why)

    @classmethod
    def of_config(cls, distiller: Distiller, config: TrainConfig, device: torch.device) -> Arithmetic:
        """What `train` computes with."""
        return cls.of(
            distiller,
            device,
            precision=config.precision,
            channels_last=config.channels_last,
            winograd=config.winograd,
            compiled=config.compile,
        )

    def lay_out(self, distiller: Distiller) -> None:
        """Bring student and teacher into the memory format."""
        if self.channels_last:
            distiller.to(memory_format=torch.channels_last)
        if self.winograd:
            for model in _models(distiller):
                lay_out_kernels(model)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Context of a forward pass. Call `backward` outside of it."""
        with ExitStack() as stack:
            if self.precision != "float32":
                stack.enter_context(torch.autocast(self.device, autocast_type(self.precision)))
            if self.winograd:
                stack.enter_context(FastConvolutions())
            yield

    @property
    def convolutions(self) -> str:
        """How convolutions are computed, in words."""
        how = "channels last" if self.channels_last else "channels first"
        return f"{how}, Winograd's algorithm for large 3x3 ones" if self.winograd else how

    @property
    def convolutions_and_why(self) -> str:
        """How convolutions are computed and, if the hardware decided it, why."""
        return f"{self.convolutions} ({self.why})" if self.why else self.convolutions

    def __str__(self) -> str:
        return f"{self.precision}; convolutions: {self.convolutions_and_why}"


def _models(distiller: Distiller) -> list[nn.Module]:
    """Student and, if there is one, teacher."""
    return [distiller.student] + ([] if distiller.teacher_adapter is None else [distiller.teacher_adapter.model])


def _channels_last(device: str, precision: Precision) -> tuple[bool, str]:
    """Whether the channels are last on a kind of device, and why, as the end of a sentence."""
    if device == "cpu":
        return True, "as fast or faster on a CPU"
    if device == "cuda" and precision != "float32":
        return True, "tensor cores take half precision in this format"
    return False, "not measured on this device: torch's own format"
