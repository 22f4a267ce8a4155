"""Deformable DETR of transformers.

Follows the forward in `models/deformable_detr/modeling_deformable_detr.py` of transformers 5.23: the same submodules,
called in the same order, so that predictions, losses and draws of dropout are the library's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeformableDetrForObjectDetection, DeformableDetrImageProcessor
from transformers.models.deformable_detr import modeling_deformable_detr

from kdtoolkit.adapters.transformers.base import Queries, backbone_strides, level_layout, pixel_mask, to_tokens
from kdtoolkit.adapters.transformers.detr_base import (
    DetrBase,
    Memory,
    mask_at,
    offset,
    repeated,
    tiny_backbone,
    tiny_detr,
    to_map,
)
from kdtoolkit.contract import Batch, DetectorSpec, Priors
from kdtoolkit.detectors.precision import without_narrow_bfloat16

# Without types in the library.
_deformable: Any = modeling_deformable_detr


class DeformableDetrAdapter(DetrBase):
    """Adapter of DeformableDetrForObjectDetection: a pyramid, and queries at points.

    With `two_stage` queries start at the encoder's best boxes. With `with_box_refine` each layer refines the
    references. With `two_stage` the library's loss leaves out the encoder's own boxes. So their heads learn nothing,
    in the library as here.
    """

    processor = DeformableDetrImageProcessor
    kind = DeformableDetrForObjectDetection
    family = "Deformable DETR"

    @classmethod
    def tiny(cls, num_classes: int) -> nn.Module:
        """Build a detector with box refinement and two stages."""
        # 64 channels: its group norm of 32 groups has nothing to compare in groups of one channel on a map of one cell.
        return tiny_detr(
            cls.kind,
            num_classes,
            backbone_config=tiny_backbone(2, 3, 4),
            d_model=64,
            two_stage=True,
            with_box_refine=True,
            two_stage_num_proposals=20,
        )

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        config = self.model.config
        strides = backbone_strides(self.model.model.backbone.model)
        if config.num_feature_levels == 1:
            strides = strides[-1:]
        while len(strides) < config.num_feature_levels:  # convolutions of stride 2 on the backbone's last map
            strides = (*strides, 2 * strides[-1])
        kind = "boxes" if config.two_stage else "points"
        return self.decoder_spec(
            strides=strides,
            width=config.d_model,
            layers=config.decoder_layers,
            prior_form=f"queries of content {config.d_model}, positions {config.d_model}, reference {kind}",
        )

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone, projections and encoder. The encoder's output is split into maps."""
        model = self.model.model
        with without_narrow_bfloat16(batch.images, self.spec.strides[-1]):
            maps = [feature_map for feature_map, _ in model.backbone(batch.images, pixel_mask(batch))]
            sources = [project(x) for project, x in zip(model.input_proj, maps, strict=False)]
            for i in range(len(sources), self.model.config.num_feature_levels):
                sources.append(model.input_proj[i](maps[-1] if i == len(maps) else sources[-1]))
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in sources)
        masks = [mask_at(batch, shape) for shape in shapes]
        positions = [
            to_tokens(model.position_embedding(shape=x.shape, device=x.device, dtype=batch.images.dtype, mask=mask))
            + model.level_embed[i]
            for i, (x, mask) in enumerate(zip(sources, masks, strict=True))
        ]
        tokens = torch.cat([to_tokens(x) for x in sources], 1)
        encoded = model.encoder(
            inputs_embeds=tokens,
            attention_mask=torch.cat([mask.flatten(1) for mask in masks], 1),
            spatial_position_embeddings=torch.cat(positions, 1),
            valid_ratios=self._valid_ratios(masks),
            return_dict=True,
            **level_layout(shapes, tokens.device),
        ).last_hidden_state
        levels = torch.split(encoded, [height * width for height, width in shapes], 1)
        return tuple(to_map(level, shape) for level, shape in zip(levels, shapes, strict=True))

    def _valid_ratios(self, masks: list[Tensor]) -> Tensor:
        """The shares of the canvas that images fill, in float32: bfloat16 would move places by pixels."""
        return torch.stack([self.model.model.get_valid_ratio(mask, dtype=torch.float32) for mask in masks], 1)

    def memory(self, features: tuple[Tensor, ...], batch: Batch) -> Memory:
        """The encoder's output."""
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in features)
        mask = torch.cat([mask_at(batch, shape).flatten(1) for shape in shapes], 1)
        return Memory(torch.cat([to_tokens(level) for level in features], 1), mask, shapes)

    def queries(self, memory: Memory) -> Queries:
        """Learned content and positions, and points computed from these.

        With `two_stage` all three come from the best boxes.

        Raises KDError if images have fewer cells than boxes to select.
        """
        model, width = self.model.model, self.model.config.d_model
        if not self.model.config.two_stage:
            positions, content = torch.split(repeated(model.query_position_embeddings.weight, memory), width, -1)
            return Queries(content, positions, model.reference_points(positions).sigmoid())
        count = self.model.config.two_stage_num_proposals
        self.check_cells(count, memory.tokens.shape[1], "two_stage_num_proposals")
        # Tokens are float32 even under autocast, because proposals get their precision.
        candidates, proposals = model.gen_encoder_output_proposals(memory.tokens.float(), ~memory.mask, memory.shapes)
        scores = model.decoder.class_embed[-1](candidates)[..., 0]
        boxes = model.decoder.bbox_embed[-1](candidates).float() + proposals
        best = scores.topk(count, dim=1).indices
        boxes = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)).detach()
        positions, content = self._embedded(boxes)
        return Queries(content, positions, boxes.sigmoid())

    def _embedded(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and content (N, Q, C) of the queries at boxes (N, Q, 4), which are logits of the references."""
        model = self.model.model
        embedded = model.pos_trans_norm(model.pos_trans(model.get_proposal_pos_embed(boxes)))
        positions, content = torch.split(embedded, self.model.config.d_model, -1)
        return positions, content

    def queries_at(self, content: Tensor, boxes: Tensor, batch: Batch) -> Priors:
        """Make queries of any content with references at given boxes.

        Without `two_stage` the references are the boxes' centres, and the queries have no positions besides.
        """
        references = self.references_at(boxes, batch)
        if not self.model.config.two_stage:
            return self.priors(Queries(content, torch.zeros_like(content), references[..., :2]), batch)
        positions, _ = self._embedded(_deformable.inverse_sigmoid(references))
        return self.priors(Queries(content, positions, references), batch)

    def attention_mask(self, queries: Queries, memory: Memory) -> Tensor | None:
        """The mask itself, as deformable attention takes it."""
        return memory.mask

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """Run one layer. It samples the memory around the references."""
        assert reference is not None
        levels = torch.split(memory.mask, [height * width for height, width in memory.shapes], 1)
        masks = [mask.reshape(-1, *shape) for mask, shape in zip(levels, memory.shapes, strict=True)]
        ratios = self._valid_ratios(masks).repeat(1, 1, reference.shape[-1] // 2)
        output: Tensor = self.model.model.decoder.layers[i](
            hidden,
            queries.positions,
            reference[:, :, None] * ratios[:, None],
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=attend,
            **level_layout(memory.shapes, hidden.device),
        )
        return output

    def refine(self, i: int, hidden: Tensor, reference: Tensor | None) -> Tensor | None:
        """The boxes after layer `i`, without gradient."""
        heads = self.model.model.decoder.bbox_embed
        return reference if heads is None else self._boxes(heads[i](hidden), reference).detach()

    def last_norm(self, hidden: Tensor) -> Tensor:
        """Return the state as it is: there is no norm."""
        return hidden

    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the heads of layer `i`. Boxes are offsets from the references that entered it."""
        # The library's heads see slices of one tensor with all layers' states. With different memory strides the last
        # bits of a product differ.
        hidden = torch.stack([hidden, hidden], 1)[:, 0]
        return self.model.class_embed[i](hidden), self._boxes(self.model.bbox_embed[i](hidden), reference)

    def _boxes(self, offsets: Tensor, reference: Tensor | None) -> Tensor:
        return offset(offsets.float(), _deformable.inverse_sigmoid(reference)).sigmoid()
