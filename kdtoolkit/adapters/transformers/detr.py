"""DETR of transformers.

Follows the forward in `models/detr/modeling_detr.py` of transformers 5.23: the same submodules,
called in the same order, so that predictions, losses and draws of dropout are the library's own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import DetrForObjectDetection, DetrImageProcessor

from kdtoolkit.adapters.transformers.base import Queries, backbone_strides, pixel_mask, to_tokens
from kdtoolkit.adapters.transformers.detr_base import DetrBase, Memory, mask_at, repeated, to_map
from kdtoolkit.contract import Batch, DetectorSpec


class DetrAdapter(DetrBase):
    """Adapter of DetrForObjectDetection: one map of stride 32, a softmax over classes, and queries without a place."""

    activation: ClassVar[Literal["sigmoid", "softmax"]] = "softmax"
    processor: ClassVar[type[Any]] = DetrImageProcessor
    kind: ClassVar[type[nn.Module]] = DetrForObjectDetection
    family: ClassVar[str] = "DETR"
    prior_form: ClassVar[str] = "queries of content {0}, positions {0}"

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        config = self.model.config
        return self.decoder_spec(
            strides=backbone_strides(self._backbone())[-1:],
            width=config.hidden_size,
            layers=config.decoder_layers,
            prior_form=self.prior_form.format(config.hidden_size),
        )

    def _backbone(self) -> nn.Module:
        backbone: nn.Module = self.model.model.backbone.model
        return backbone

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and encoder. The encoder's output is the one map."""
        model = self.model.model
        feature_map, mask = model.backbone(batch.images, pixel_mask(batch))[-1]
        encoded = model.encoder(
            inputs_embeds=to_tokens(model.input_projection(feature_map)),
            attention_mask=mask.flatten(1),
            spatial_position_embeddings=self._positions(feature_map, mask, batch),
            return_dict=True,
        )
        return (to_map(encoded.last_hidden_state, feature_map.shape[-2:]),)

    def _positions(self, feature_map: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        position = self.model.model.position_embedding(
            shape=feature_map.shape, device=mask.device, dtype=batch.images.dtype, mask=mask
        )
        return to_tokens(position)

    def memory(self, features: tuple[Tensor, ...], batch: Batch) -> Memory:
        """The encoder's output, with the positions that cross-attention adds."""
        (encoded,) = features
        height, width = encoded.shape[-2:]
        mask = mask_at(batch, (height, width))
        positions = self._positions(encoded, mask, batch)
        return Memory(to_tokens(encoded), mask.flatten(1), ((height, width),), positions)

    def queries(self, memory: Memory) -> Queries:
        """Learned positions. The content is zero."""
        positions = repeated(self.model.model.query_position_embeddings.weight, memory)
        return Queries(torch.zeros_like(positions), positions)

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """Run one layer. With auxiliary losses the library normalises between layers."""
        decoder = self.model.model.decoder
        hidden = decoder.layers[i](
            hidden, None, memory.positions, queries.positions, memory.tokens, encoder_attention_mask=attend
        )
        return self._between(hidden)

    def _between(self, hidden: Tensor) -> Tensor:
        return self.model.model.decoder.layernorm(hidden) if self.model.config.auxiliary_loss else hidden

    def auxiliary_norm(self, hidden: Tensor) -> Tensor:
        """The last layer's norm, if the layers do not have it between them already."""
        return hidden if self.model.config.auxiliary_loss else self.last_norm(hidden)

    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the one pair of heads that all layers share."""
        return self.model.class_labels_classifier(hidden), self.model.bbox_predictor(hidden).float().sigmoid()
