"""D-FINE and DEIMv2 of transformers: relatives of RT-DETR that predict a distribution for each box side.

Follows the forwards in `models/{d_fine,deimv2}/modeling_*.py` of transformers 5.23: the same submodules, called in the
same order, so that predictions, losses and draws of noise are the library's own.

Each detector makes a first guess of the box from its own state after the first layer. The distribution of a side is
over corrections of that guess: distances from the guessed side, as fractions of the guess's width or height (`bins`).
So if two detectors predict equal distributions, they make equal corrections. But their guesses, and then their boxes,
may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Deimv2ForObjectDetection, DFineForObjectDetection
from transformers.models.d_fine import modeling_d_fine
from transformers.models.deimv2 import modeling_deimv2

from kdtoolkit.adapters.transformers.base import IMAGENET_MEAN, IMAGENET_STD, Queries, corners
from kdtoolkit.adapters.transformers.rtdetr import RTDetrAdapter
from kdtoolkit.adapters.transformers.selecting import Memory, Progress
from kdtoolkit.contract import Assignment, Batch, Detections, DetectorSpec, HeadTrace, Predictions, Priors


@dataclass(frozen=True)
class Refinement(Progress):
    """Progress of box distributions: `corners` (N, Q, 4 * B) are logits, summed over layers.

    `guess` (N, Q, 4) is the first guess of boxes, with its gradient; at stage 0 it is the references. `bins` (B,) are
    the values of the bins.
    """

    corners: Tensor
    guess: Tensor
    bins: Tensor


class DFineAdapter(RTDetrAdapter):
    """Adapter of DFineForObjectDetection: box sides are distributions, which each layer corrects."""

    kind: ClassVar[type[nn.Module]] = DFineForObjectDetection
    family: ClassVar[str] = "D-FINE"
    modeling: ClassVar[Any] = modeling_d_fine

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        return replace(super().describe(), bins=tuple(self._bins().tolist()))

    def _bins(self) -> Tensor:
        decoder = self.model.model.decoder
        bins: Tensor = self.modeling.weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
        return bins

    def start(self, queries: Queries) -> Refinement:
        """The progress at stage 0, without corrections."""
        progress = super().start(queries)
        zero = progress.hidden.new_zeros(1, 1, 1).expand(*progress.hidden.shape[:2], 1)
        return Refinement(progress.hidden, progress.boxes, zero, progress.boxes, self._bins())

    def layer(self, i: int, progress: Progress, memory: Memory, mask: Tensor | None) -> Tensor:
        """Run one layer. It samples the memory around the boxes, and no gradient flows into these."""
        decoder, references = self.model.model.decoder, progress.boxes.detach()
        output: Tensor = decoder.layers[i](
            progress.hidden,
            position_embeddings=decoder.query_pos_head(references).clamp(min=-10, max=10),
            encoder_hidden_states=memory.tokens,
            reference_points=references.unsqueeze(2),
            encoder_attention_mask=mask,
            **memory.layout,
        )
        return output

    def refine(self, i: int, hidden: Tensor, progress: Progress) -> Refinement:
        """Correct the distributions by the head of layer `i`, which takes the states before and after it."""
        assert isinstance(progress, Refinement)
        decoder, guess = self.model.model.decoder, progress.guess
        if i == 0:
            references = self.modeling.inverse_sigmoid(progress.boxes.detach())
            guess = (decoder.pre_bbox_head(hidden) + references).sigmoid()
            logits = decoder.bbox_embed[i](hidden)
        else:
            logits = decoder.bbox_embed[i](hidden + progress.hidden.detach()) + progress.corners
        boxes = self._integrate(logits, guess.detach(), progress.bins)
        return Refinement(hidden, boxes, logits, guess, progress.bins)

    def _integrate(self, logits: Tensor, guess: Tensor, bins: Tensor) -> Tensor:
        """Boxes (N, Q, 4) in [0, 1] from logits (N, Q, 4 * B). Each side lies at the mean of its distribution."""
        decoder = self.model.model.decoder
        boxes: Tensor = self.modeling.distance2bbox(guess, decoder.integral(logits, bins), decoder.reg_scale)
        return boxes

    def classify(self, i: int, progress: Progress) -> Tensor:
        """Class logits by the head of layer `i`, corrected by the box quality that the distributions show."""
        assert isinstance(progress, Refinement)
        logits: Tensor = self.model.model.decoder.lqe_layers[i](super().classify(i, progress), progress.corners)
        return logits

    def predict(self, i: int, progress: Progress, priors: Priors, batch: Batch) -> Predictions:
        """Predict by the heads of layer `i`. `decode` starts from the first guess of this pass."""
        assert isinstance(progress, Refinement)
        return Predictions(
            logits=self.classify(i, progress).float(),
            regression=progress.corners.float().reshape(*progress.corners.shape[:2], 4, -1),
            priors=priors,
            decode=_Decoder(
                self._integrate, progress.guess.detach().float(), progress.bins, self.scale(batch)[:, None]
            ),
        )

    def layer_outputs(self, progress: tuple[Progress, ...]) -> dict[str, list[Tensor]]:
        """Each layer's outputs, for the library's loss. In eval mode its decoder gives only the last layer's."""
        after = [at for at in progress[1:] if isinstance(at, Refinement)]
        wanted = [i for i in range(self.depth) if self.model.training or i == self.depth - 1]
        outputs = {
            "outputs_class": [self.classify(i, after[i]) for i in wanted],
            "outputs_coord": [after[i].boxes for i in wanted],
            "predicted_corners": [after[i].corners for i in wanted],
            "initial_reference_points": [after[i].guess.detach() for i in wanted],
        }
        if wanted[0] == 0:  # the first guess counts as a layer
            outputs["outputs_class"].insert(0, super().classify(0, after[0]))
            outputs["outputs_coord"].insert(0, after[0].guess)
        return outputs

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Match the last layer's boxes as the library does: its loss clamps them to the canvas."""
        return super().assign(_with_boxes(trace, clamp=True), batch)

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Run the library's own postprocessing without a score threshold, and leave out what lies in padding."""
        return super().detections(_with_boxes(trace, clamp=False), batch)


@dataclass(frozen=True)
class _Decoder:
    """`Predictions.decode` of one pass. Its boxes start from the first guess of that pass."""

    integrate: Callable[[Tensor, Tensor, Tensor], Tensor]
    guess: Tensor
    bins: Tensor
    scale: Tensor

    def normalised(self, regression: Tensor) -> Tensor:
        """Boxes (N, Q, 4) as (centre x, centre y, width, height) in [0, 1]."""
        # In float32 under autocast too: a mean of 33 bins in bfloat16 is off by pixels.
        with torch.autocast(regression.device.type, enabled=False):
            return self.integrate(regression.float().flatten(2), self.guess, self.bins)

    def __call__(self, regression: Tensor, priors: Priors) -> Tensor:
        """Boxes (N, Q, 4) xyxy in pixels."""
        return corners(self.normalised(regression), self.scale)


def _with_boxes(trace: HeadTrace, *, clamp: bool) -> HeadTrace:
    """The trace with boxes in [0, 1] in place of distributions, for code that needs boxes."""
    predictions = trace.predictions
    decode: Any = predictions.decode
    boxes = decode.normalised(predictions.regression)
    boxes = boxes.clamp(min=0, max=1) if clamp else boxes
    return replace(trace, predictions=replace(predictions, regression=boxes))


class Deimv2Adapter(DFineAdapter):
    """Adapter of Deimv2ForObjectDetection: as D-FINE, with different blocks and losses.

    Without an image processor, images on DINOv3 are normalised by ImageNet's mean and std. On other backbones they stay
    in [0, 1], as in the published models on HGNet.
    """

    kind: ClassVar[type[nn.Module]] = Deimv2ForObjectDetection
    family: ClassVar[str] = "DEIMv2"
    modeling: ClassVar[Any] = modeling_deimv2

    def default_normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and std that published models need, by their backbone."""
        on_dinov3 = self.model.config.backbone_config.model_type.startswith("dinov3")
        return (IMAGENET_MEAN, IMAGENET_STD) if on_dinov3 else super().default_normalisation()

    def _map_strides(self) -> Sequence[int]:
        """The strides of the encoder's maps. The lite encoder makes a second map, whose stride is not in the config."""
        strides = super()._map_strides()
        return (strides[0], 2 * strides[0]) if self.model.config.encoder_type == "lite" else strides

    def encode(self, batch: Batch) -> Sequence[Tensor]:
        """Run backbone and encoder; returns one map per level."""
        model = self.model.model
        encoded: Sequence[Tensor] = model.encoder(model.conv_encoder(batch.images), return_dict=True).feature_maps
        return encoded
