"""RF-DETR and LW-DETR of transformers: plain vision transformers with windows, and groups of queries in training.

Follows the forwards in `models/{rf_detr,lw_detr}/modeling_*.py` of transformers 5.23: the same submodules, called in
the same order, so that predictions, losses and draws of dropout are the library's own.

The library can mask padding here, but its windows look at padding all the same. So it is not masked, and boxes are
relative to the canvas, as in the library without a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    DeformableDetrImageProcessor,
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    RfDetrConfig,
    RfDetrDinov2Config,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
)
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher
from transformers.models.lw_detr import modeling_lw_detr
from transformers.models.rf_detr import modeling_rf_detr

from kdtoolkit.adapters.transformers.base import Queries, pixel_mask, weighted
from kdtoolkit.adapters.transformers.selecting import Memory, Progress, SelectingAdapter, Selection
from kdtoolkit.canvas import Layout
from kdtoolkit.contract import Assignment, Batch, DetectorSpec, HeadTrace, Predictions, Priors, Target

_matcher: Any = LwDetrHungarianMatcher
_rf_detr: Any = RfDetrConfig
_rf_detr_backbone: Any = RfDetrDinov2Config
_lw_detr: Any = LwDetrConfig
_lw_detr_backbone: Any = LwDetrViTConfig


class LwDetrAdapter(SelectingAdapter):
    """Adapter of LwDetrForObjectDetection: learned queries at the encoder's best boxes, which no layer refines.

    In train mode the library decodes `group_detr` groups of queries. The first group detects.
    """

    processor: ClassVar[type[Any]] = DeformableDetrImageProcessor
    kind: ClassVar[type[nn.Module]] = LwDetrForObjectDetection
    family: ClassVar[str] = "LW-DETR"
    # The library's module of the model, without types there.
    modeling: ClassVar[Any] = modeling_lw_detr

    def __init__(
        self,
        model: nn.Module,
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, image_mean=image_mean, image_std=image_std)
        self.size_divisor = self._window()

    @classmethod
    def tiny(cls, num_classes: int) -> nn.Module:
        """Build a detector with 32 channels and three decoder layers."""
        return tiny_lw_detr(num_classes)

    def refuses(self) -> str | None:
        """Refuse a detector without levels. The library's default config has none."""
        if not self._strides():
            return "has no levels: build it with projector_scale_factors=[1.0] (large models have [2.0, 0.5])"
        return super().refuses()

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        width = self.model.config.d_model
        return self.decoder_spec(
            strides=self._strides(),
            width=width,
            layers=self.depth,
            prior_form=f"queries of content {width}, reference boxes",
        )

    def _strides(self) -> tuple[int, ...]:
        config = self.model.config
        return tuple(int(config.backbone_config.patch_size / scale) for scale in config.projector_scale_factors)

    def _window(self) -> int:
        """The sides of a canvas are multiples of this number of pixels."""
        config = self.model.config.backbone_config
        return int(config.patch_size * config.num_windows_side)

    @property
    def groups(self) -> int:
        """The number of groups of queries: `group_detr` in train mode, one in eval mode."""
        return int(self.model.config.group_detr) if self.model.training else 1

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and projector."""
        return tuple(level for level, _ in self.model.model.backbone(batch.images, pixel_mask(batch)))

    def select(self, memory: Memory, batch: Batch) -> Selection:
        """Select queries for each group: learned content, at the encoder's boxes that the group's heads score best.

        The references are these boxes, moved by learned offsets.
        """
        model, count = self.model.model, self.model.config.num_queries
        tokens, proposals, invalid = model.gen_encoder_output_proposals(
            memory.tokens.float(), self._no_padding(memory), memory.shapes
        )
        logits, boxes = [], []
        for i in range(self.groups):
            candidates = model.enc_output_norm[i](model.enc_output[i](tokens))
            scores = model.enc_out_class_embed[i](candidates).masked_fill(invalid, float("-inf"))
            refined = self.modeling.refine_bboxes(proposals, model.enc_out_bbox_embed[i](candidates))
            best = scores.max(-1).values.topk(count, dim=1).indices.unsqueeze(-1)
            chosen = candidates.gather(1, best.expand(-1, -1, candidates.shape[-1]))
            logits.append(model.enc_out_class_embed[i](chosen))
            boxes.append(refined.gather(1, best.expand(-1, -1, 4)))
        selected = torch.cat(boxes, 1)
        total, size = self.groups * count, len(memory.tokens)
        content, offsets = (
            embedding.weight[:total].unsqueeze(0).expand(size, -1, -1)
            for embedding in (model.query_feat, model.reference_point_embed)
        )
        references = self.modeling.refine_bboxes(selected.detach(), offsets)
        return Selection(Queries(content, references=references), slice(0, count), torch.cat(logits, 1), selected)

    @staticmethod
    def _no_padding(memory: Memory) -> Tensor:
        """(N, S) bool, all False: no cell is padding."""
        return torch.zeros(memory.tokens.shape[:2], dtype=torch.bool, device=memory.tokens.device)

    def layer(self, i: int, progress: Progress, memory: Memory, mask: Tensor | None) -> Tensor:
        """Run one layer. It samples the memory around the references."""
        decoder = self.model.model.decoder
        ratios = memory.tokens.new_ones(memory.tokens.shape[0], len(memory.shapes), 2)
        references, positions = decoder.get_reference(progress.boxes, ratios)
        output: Tensor = decoder.layers[i](
            progress.hidden,
            position_embeddings=positions,
            reference_points=references,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=~self._no_padding(memory),
            **memory.layout,
        )
        return output

    def refine(self, i: int, hidden: Tensor, progress: Progress) -> Progress:
        """Keep the references."""
        return replace(progress, hidden=hidden)

    def _judge(self, hidden: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and boxes in [0, 1] by the heads that all layers share, from normalised states."""
        boxes = self.modeling.refine_bboxes(references, self.model.bbox_embed(hidden))
        return self.model.class_embed(hidden), boxes

    def predict(self, i: int, progress: Progress, priors: Priors, batch: Batch) -> Predictions:
        """Predict by the heads, after the decoder's norm."""
        logits, boxes = self._judge(self.model.model.decoder.layernorm(progress.hidden), progress.boxes)
        return self.predictions(logits, boxes, priors, batch)

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """Compute the library's weighted loss terms.

        The encoder has terms too (`enc`), and inner layers if the config has `auxiliary_loss`.
        """
        past, encoder_logits, encoder_boxes = self.encoder_outputs(trace)
        config, final = self.model.config, past.progress[-1]
        normalised = torch.stack([self.model.model.decoder.layernorm(at.hidden) for at in past.progress[1:]])
        logits, boxes = self._judge(normalised[-1], final.boxes)
        inner = self._judge(normalised, final.boxes.unsqueeze(0)) if config.auxiliary_loss else (logits, boxes)
        losses, assignment = self.criticise(
            batch,
            lambda labels: self.model.loss_function(
                logits.float(),
                labels,
                batch.images.device,
                boxes.float(),
                config,
                *(output.float() for output in inner),
                encoder_logits,
                encoder_boxes,
            ),
            trace.predictions.logits.shape[1],
        )
        weights = {
            "loss_ce": config.class_loss_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        # In eval mode there is one group only, but the library's loss still matches several.
        return weighted(losses, weights), assignment if self.model.training else self.assign(trace, batch)

    def matcher(self) -> Any:
        """Build the library's matcher with the costs of the config, for one group."""
        config = self.model.config
        matcher = _matcher(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
        return partial(matcher, group_detr=1)


class RfDetrAdapter(LwDetrAdapter):
    """Adapter of RfDetrForObjectDetection: as LW-DETR, on DINOv2 and with one level.

    Canvases are square: on any other canvas the library's windows confuse height and width, and mix up rows.
    """

    processor: ClassVar[type[Any]] = RfDetrImageProcessor
    kind: ClassVar[type[nn.Module]] = RfDetrForObjectDetection
    family: ClassVar[str] = "RF-DETR"
    square: ClassVar[bool] = True
    modeling: ClassVar[Any] = modeling_rf_detr

    @classmethod
    def tiny(cls, num_classes: int) -> nn.Module:
        """Build a detector with 32 channels and three decoder layers."""
        return tiny_rf_detr(num_classes)

    def _strides(self) -> tuple[int, ...]:
        return (int(self.model.config.backbone_config.patch_size),)

    def _window(self) -> int:
        config = self.model.config.backbone_config
        return int(config.patch_size * config.num_windows)

    def lay_out(self, images: Sequence[Tensor], targets: Sequence[Target] | None, layout: Layout) -> Batch:
        """Place the images on a square canvas, as large as the largest side needs."""
        return super().lay_out(images, targets, layout.squared())

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and projector."""
        return (self.model.model.backbone(batch.images, pixel_mask(batch))[0],)


def tiny_lw_detr(num_classes: int, **changes: Any) -> nn.Module:
    """Build a narrow and shallow LW-DETR. `changes` are fields of the config."""
    backbone = _lw_detr_backbone(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=1,
        image_size=64,
        pretrain_image_size=64,
        patch_size=16,
        num_windows=4,
        window_block_indices=[0],
        out_indices=[1, 2],
    )
    settings = {"backbone_config": backbone, "projector_scale_factors": [2.0, 0.5], "num_labels": num_classes}
    return LwDetrForObjectDetection(_lw_detr(**{**settings, **_SMALL, **changes}))


def tiny_rf_detr(num_classes: int, **changes: Any) -> nn.Module:
    """Build a narrow and shallow RF-DETR. `changes` are fields of the config."""
    backbone = _rf_detr_backbone(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=1,
        image_size=64,
        patch_size=8,
        num_windows=2,
        out_indices=[1, 2],
    )
    return RfDetrForObjectDetection(
        _rf_detr(**{"backbone_config": backbone, "num_labels": num_classes, **_SMALL, **changes})
    )


_SMALL: Mapping[str, Any] = {
    "d_model": 32,
    "num_queries": 20,
    "group_detr": 3,
    "c2f_num_blocks": 1,
    "decoder_layers": 3,
    "decoder_ffn_dim": 32,
    "decoder_n_points": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
}
