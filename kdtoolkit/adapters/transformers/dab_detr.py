"""DAB-DETR of transformers.

Follows the forward in `models/dab_detr/modeling_dab_detr.py` of transformers 5.23: the same submodules,
called in the same order, so that predictions, losses and draws of dropout are the library's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ConditionalDetrImageProcessor, DabDetrForObjectDetection
from transformers.models.dab_detr import modeling_dab_detr

from kdtoolkit.adapters.transformers.base import Queries, pixel_mask, to_tokens
from kdtoolkit.adapters.transformers.detr import DetrAdapter
from kdtoolkit.adapters.transformers.detr_base import Memory, repeated, to_map
from kdtoolkit.contract import Batch, Priors

# Without types in the library.
_dab: Any = modeling_dab_detr


class DabDetrAdapter(DetrAdapter):
    """Adapter of DabDetrForObjectDetection: queries are anchor boxes, which each layer refines."""

    activation = "sigmoid"
    processor = ConditionalDetrImageProcessor
    kind = DabDetrForObjectDetection
    family = "DAB-DETR"
    prior_form = "queries of content {0}, reference boxes"

    def _backbone(self) -> nn.Module:
        backbone: nn.Module = self.model.model.backbone.conv_encoder.model
        return backbone

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and encoder. The encoder's output is the one map."""
        model = self.model.model
        maps, positions = model.backbone(batch.images, pixel_mask(batch))
        feature_map, mask = maps[-1]
        encoded = model.encoder(
            inputs_embeds=to_tokens(model.input_projection(feature_map)),
            attention_mask=mask.flatten(1),
            object_queries=to_tokens(positions[-1]),
            return_dict=True,
        )
        return (to_map(encoded.last_hidden_state, feature_map.shape[-2:]),)

    def _positions(self, feature_map: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        return to_tokens(self.model.model.backbone.position_embedding(feature_map, mask).to(feature_map.dtype))

    def queries(self, memory: Memory) -> Queries:
        """Learned anchor boxes. The content is zero; with `num_patterns`, each box gets each learned content once."""
        model = self.model.model
        anchors = repeated(model.query_refpoint_embeddings.weight, memory)
        if not model.num_patterns:
            content = anchors.new_zeros(*anchors.shape[:2], self.model.config.hidden_size)
        else:
            # The images lie side by side in memory, as in the library: other memory strides would give other last bits.
            patterns = model.patterns.weight.repeat_interleave(anchors.shape[1], 0).unsqueeze(1)
            content = patterns.repeat(1, len(anchors), 1).transpose(0, 1)
            anchors = anchors.repeat(1, model.num_patterns, 1)
        return Queries(content, references=anchors.sigmoid())

    def queries_at(self, content: Tensor, boxes: Tensor, batch: Batch) -> Priors:
        """Make queries of any content with references at given boxes."""
        return self.priors(Queries(content, references=self.references_at(boxes, batch)), batch)

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """Run one layer. The state and the boxes' sizes scale the embedding of the boxes' centres."""
        assert reference is not None
        decoder, width = self.model.model.decoder, self.model.config.hidden_size
        box = reference if i == 0 else reference.detach()
        sine = _dab.encode_sinusoidal_position_embedding(box, num_pos_feats=width // 2)
        positions = decoder.ref_point_head(sine)
        centre = sine[..., :width] * (1 if i == 0 else decoder.query_scale(hidden))
        size = decoder.ref_anchor_head(hidden).sigmoid()
        along_y, along_x = centre[..., : width // 2], centre[..., width // 2 :]
        centre = torch.cat(
            [
                along_y * (size[..., 1] / box[..., 3]).unsqueeze(-1),
                along_x * (size[..., 0] / box[..., 2]).unsqueeze(-1),
            ],
            -1,
        )
        output: Tensor = decoder.layers[i](
            hidden, None, memory.positions, positions, centre, memory.tokens, encoder_attention_mask=attend
        )[0]
        return output

    def refine(self, i: int, hidden: Tensor, reference: Tensor | None) -> Tensor:
        """The boxes after layer `i`.

        Gradient flows into them from the next layer's prediction, but not from the layer itself.
        """
        assert reference is not None
        box = reference if i == 0 else reference.detach()
        refined: Tensor = self.model.model.decoder.bbox_embed(hidden).float() + _dab.inverse_sigmoid(box)
        return refined.sigmoid()

    def auxiliary_norm(self, hidden: Tensor) -> Tensor:
        """The last layer's norm. The library applies it for the heads only, not between the layers."""
        return self.last_norm(hidden)

    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the one pair of heads that all layers share. Boxes are offsets from those that entered the layer."""
        offsets = self.model.bbox_predictor(hidden).float()
        boxes = (offsets + _dab.inverse_sigmoid(reference)).sigmoid()
        return self.model.class_embed(hidden), boxes
