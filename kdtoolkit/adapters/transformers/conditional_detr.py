"""Conditional DETR of transformers.

Follows the forward in `models/conditional_detr/modeling_conditional_detr.py` of transformers 5.23: the same submodules,
called in the same order, so that predictions, losses and draws of dropout are the library's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from transformers.models.conditional_detr import modeling_conditional_detr

from kdtoolkit.adapters.transformers.base import Queries
from kdtoolkit.adapters.transformers.detr import DetrAdapter
from kdtoolkit.adapters.transformers.detr_base import Memory, attention_mask_of, offset
from kdtoolkit.contract import Batch, Priors

# Without types in the library.
_conditional: Any = modeling_conditional_detr


class ConditionalDetrAdapter(DetrAdapter):
    """Adapter of ConditionalDetrForObjectDetection: as DETR, but scores are sigmoids and queries have points.

    The decoder's own layers compute the points from the positions. Another detector gets the points with the queries,
    so that both look at the same places.
    """

    activation = "sigmoid"
    processor = ConditionalDetrImageProcessor
    kind = ConditionalDetrForObjectDetection
    family = "Conditional DETR"
    prior_form = "queries of content {0}, positions {0}, reference points"

    def refuses(self) -> str | None:
        """Refuse a model that skips decoder layers at random (layer drop): its head cannot be resumed from a state."""
        if self.model.config.decoder_layerdrop:
            return (
                f"has decoder_layerdrop={self.model.config.decoder_layerdrop}, which leaves out layers at random: set "
                "model.config.decoder_layerdrop and model.model.decoder.layerdrop to 0"
            )
        return super().refuses()

    def queries(self, memory: Memory) -> Queries:
        """Learned positions, and the points computed from them. The content is zero."""
        queries = super().queries(memory)
        return replace(queries, references=self.model.model.decoder.ref_point_head(queries.positions).sigmoid())

    def queries_at(self, content: Tensor, boxes: Tensor, batch: Batch) -> Priors:
        """Make queries of any content with points at the centres of given boxes. They have no positions besides."""
        points = self.references_at(boxes, batch)[..., :2]
        return self.priors(Queries(content, torch.zeros_like(content), points), batch)

    def attention_mask(self, queries: Queries, memory: Memory) -> Tensor | None:
        """The mask as the library's decoder prepares it."""
        mask: Tensor | None = attention_mask_of(self.model.model.decoder.config, queries.content, memory.mask)
        return mask

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """Run one layer. In all layers but the first, the state scales the embedding of the points."""
        decoder = self.model.model.decoder
        sine = _conditional.encode_sinusoidal_position_embedding(
            reference, num_pos_feats=self.model.config.d_model // 2
        )
        hidden = decoder.layers[i](
            hidden,
            None,
            memory.positions,
            queries.positions,
            sine * (1 if i == 0 else decoder.query_scale(hidden)),
            memory.tokens,
            encoder_attention_mask=attend,
            is_first=i == 0,
        )
        return self._between(hidden)

    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the one pair of heads that all layers share. Boxes are offsets from the points."""
        offsets = self.model.bbox_predictor(hidden).float()
        boxes = offset(offsets, _conditional.inverse_sigmoid(reference)).sigmoid()
        return self.model.class_labels_classifier(hidden), boxes
