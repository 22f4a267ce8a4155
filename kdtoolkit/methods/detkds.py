"""DetKDS: the feature distiller found by search for detectors (Li et al., ICML 2024, openreview SBR8Gwe1E2).

The paper searches for the best transformations and distances. For the whole pyramid it found one chain for GFL,
RepPoints, RetinaNet, FCOS and Faster R-CNN with ResNet teachers: weigh channels by attention, f * sqrt(C softmax(mean
|f| / T)); take the maximum of each 2 x 2 cells; divide each value by its L2 norm over the images of the batch; mean
absolute difference.

Follows the published configurations (lliai/DetKDS @9e43bfa). For GFL and RepPoints this is all. For the others they
add terms on boxes or logits, which are not here. The paper's AP for GFL, 43.7, belongs to a student that was trained
twice as long, on several scales, and that started from the teacher's neck and head. One thing differs. On maps that
end in a ReLU, a value can be 0 in all images. Here such a value gets no gradient; there it gets 1e12 times the loss's
gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.errors import IncompatibleError
from kdtoolkit.methods.features import FeatureMethod, Level


def weigh_channels(x: Tensor, temperature: float = 0.5) -> Tensor:
    """Features (N, C, H, W) times the root of their channel attention, which is C softmax(mean |x| / T)."""
    attention = (x.abs().mean((2, 3), keepdim=True) / temperature).log_softmax(1)
    return x * (attention / 2).exp() * math.sqrt(x.shape[1])


def pool(x: Tensor) -> Tensor:
    """The maximum of each 2 x 2 block of (N, C, H, W). Maps of odd size are padded with 0 at the right and bottom.

    If cells of a block have the same largest value, they share its gradient, as in the published code.
    """
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    # Not max_pool2d, which gives all gradient to the first of equal cells.
    x = torch.maximum(x[..., ::2], x[..., 1::2])
    return torch.maximum(x[..., ::2, :], x[..., 1::2, :])


def normalise_over_images(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Values of (N, ...) divided by their L2 norm over the N images. A norm below `eps` gives 0, without gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=0, keepdim=True)
    return torch.where(norm < eps, 0.0, x / norm.clamp(min=eps))


def detkds_loss(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    """Mean absolute difference of maps (N, C, H, W) after the chain found by search: a scalar, in float32.

    No gradient reaches the teacher. A batch of one image has no gradient: each value is divided by itself.
    """
    student, teacher = (
        normalise_over_images(pool(weigh_channels(x.float(), temperature))) for x in (student, teacher.detach())
    )
    return (student - teacher).abs().mean()


class DetKDS(FeatureMethod):
    """Imitate how the teacher's features differ between the images of a batch, where channels are strong.

    For all detectors with a pyramid, in batches of two images or more. The default weight is the published one for
    GFL. The published weights for RetinaNet (6) and FCOS (5) are used together with other terms.

    Args:
        weight: factor of the loss summed over levels.
        temperature: of the channel attention.
    """

    vanishing = ("feature",)
    paper = "openreview SBR8Gwe1E2 (ICML 2024)"

    def __init__(self, *, weight: float = 10.0, temperature: float = 0.5) -> None:
        super().__init__(weight=weight)
        self.temperature = temperature

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level.

        Raises IncompatibleError for a batch of one image, in which there is nothing to compare.
        """
        if len(teacher) < 2:
            raise IncompatibleError(
                "DetKDS compares the images of a batch, and this one has one image: train with batches of two or more "
                "images on each device"
            )
        return detkds_loss(student, teacher, self.temperature)
