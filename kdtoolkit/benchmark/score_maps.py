"""Where in an image a detector sees something: its class scores before any detection is chosen, as a map."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from kdtoolkit.contract import Capability
from kdtoolkit.engine.scoring import Floats
from kdtoolkit.libraries import adapt

_SHADES = (0.0, 0.35, 0.7, 1.0)
_COLOURS = ((20, 10, 60), (150, 30, 110), (240, 120, 40), (255, 245, 160))  # lighter means a higher score
_PALETTE = np.stack(  # (256, 3) from 0 to 1: many times as fast as interpolating at each pixel
    [np.interp(np.linspace(0, 1, 256), _SHADES, channel) for channel in zip(*_COLOURS, strict=True)], -1
).astype(np.float32)


def score_map(detector: nn.Module, image: Tensor) -> Floats | None:
    """The largest class score at each pixel (H, W), in [0, 1]; None if the detector has no predictions.

    `image`: (3, H, W) uint8. If the detector predicts on grids, a pixel has the score of its cell, the largest over all
    levels. Else it has the largest score of the boxes that cover it.
    """
    adapter = adapt(detector)
    if Capability.PREDICTIONS not in adapter.spec.capabilities:
        return None
    with torch.no_grad():
        batch = adapter.prepare([image.float() / 255])
        predictions = adapter.head(adapter.features(batch), batch).predictions
        canvas = (batch.images.shape[-2], batch.images.shape[-1])
        scores, priors = predictions.scores[0], predictions.priors
        if priors.grid:
            levels = zip(torch.split(scores, list(priors.per_level)), priors.grid, strict=True)
            cells = [own.view(1, 1, *size, -1).amax(-1) for own, size in levels]
            found = torch.stack([F.interpolate(each, canvas, mode="nearest") for each in cells]).amax(0)[0, 0]
        else:
            found = _of_boxes(predictions.boxes[0], scores, canvas)
        height, width = batch.sizes[0]
        own = found[None, None, :height, :width]
        result: Floats = F.interpolate(own, image.shape[-2:], mode="nearest")[0, 0].double().cpu().numpy()
    return result


def _of_boxes(boxes: Tensor, scores: Tensor, canvas: tuple[int, int]) -> Tensor:
    found = scores.new_zeros(canvas)
    for index in scores.argsort().tolist():  # the highest score is written last
        x1, y1, x2, y2 = (max(0, round(side)) for side in boxes[index].tolist())
        found[y1:y2, x1:x2] = scores[index]
    return found


def draw_map(picture: Image.Image, scores: Floats) -> Image.Image:
    """A map (H, W) of scores in [0, 1] over a dark, grey copy of a picture. Lighter means a higher score."""
    shade = np.asarray(Image.fromarray(scores.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    shade = np.sqrt(shade.clip(0, 1))  # so that low scores can be seen
    colours = _PALETTE[(shade * (len(_PALETTE) - 1)).round().astype(np.uint8)]
    grey = np.asarray(picture.convert("L"), np.float32)[..., None] * np.float32(0.5)
    cover = 0.25 + 0.75 * shade[..., None]
    return Image.fromarray((cover * colours + (1 - cover) * grey).round().astype(np.uint8))
