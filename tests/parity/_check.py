"""One compared quantity: what the modules of tests/parity yield and the report prints."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LOSS_BOUND = 1e-4  # of the reference's largest entry
GRADIENT_BOUND = 1e-3
FLOOR = 1e-6  # stands for the largest entry of a reference that is (nearly) zero all over


class Check(NamedTuple):
    """`ours` against `reference`, both of one shape; `bound` is for the largest relative difference.

    Differences are relative to the reference's largest entry, or to `scale` where that is larger: for references that
    are rounding noise around zero.
    """

    quantity: str
    ours: Tensor | np.ndarray | float
    reference: Tensor | np.ndarray | float
    bound: float = LOSS_BOUND
    scale: float = FLOOR

    @property
    def difference(self) -> float:
        """max |ours - reference| / max |reference| (or `scale`); infinite where shapes differ or a value is NaN."""
        ours, reference = (torch.as_tensor(x).detach().double() for x in (self.ours, self.reference))
        if ours.shape != reference.shape:
            return float("inf")
        if ours.numel() == 0:
            return 0.0
        # Infinities that agree are no difference.
        gap = torch.where(ours == reference, 0.0, (ours - reference).abs()).max()
        ratio = (gap / reference.abs().max().clamp(min=self.scale)).item()
        return ratio if ratio == ratio else float("inf")

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bound."""
        return self.difference <= self.bound
