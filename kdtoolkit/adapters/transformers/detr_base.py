"""What DETR, Conditional DETR, DAB-DETR and Deformable DETR have in common: a decoder that is run layer by layer.

Follows the forwards in `models/{detr,conditional_detr,dab_detr,deformable_detr}/modeling_*.py` of transformers 5.23:
the same submodules, called in the same order, so that predictions, losses and draws of dropout are the library's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConditionalDetrImageProcessor, DabDetrForObjectDetection, ResNetConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher
from transformers.masking_utils import create_bidirectional_mask

from kdtoolkit.adapters.transformers.base import (
    Queries,
    TransformersAdapter,
    from_state,
    pixel_mask,
    queries_of,
    to_state,
    weighted,
)
from kdtoolkit.contract import Assignment, Batch, HeadTrace, Predictions, Priors, State, keep_states

# Without types in the library.
attention_mask_of: Any = create_bidirectional_mask
_resnet: Any = ResNetConfig


@dataclass(frozen=True)
class Memory:
    """What a decoder looks at: the encoder's `tokens` (N, S, C), and `mask` (N, S) bool, which is True for content.

    `positions` (N, S, C) are added in cross-attention, if there are any. `shapes` are the (H, W) of each level.
    """

    tokens: Tensor
    mask: Tensor
    shapes: tuple[tuple[int, int], ...]
    positions: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """The context of a trace: the memory, and the references that entered each layer.

    `references` are (N, Q, 2 or 4), None if the detector has none. `states` are the hidden states (N, Q, C) of all
    stages; the losses of inner layers need them. `attend` is the mask of cross-attention as the library prepares it. It
    is kept, because making it again would let a GPU's host wait.
    """

    memory: Memory
    references: tuple[Tensor | None, ...]
    states: tuple[Tensor, ...]
    attend: Tensor | None


class DetrBase(TransformersAdapter):
    """Base of the four adapters: a decoder that is run layer by layer."""

    processor: ClassVar[type[Any]] = ConditionalDetrImageProcessor

    @classmethod
    def tiny(cls, num_classes: int) -> nn.Module:
        """Build a detector with 32 channels and three decoder layers."""
        return tiny_detr(cls.kind, num_classes)

    @abstractmethod
    def memory(self, features: tuple[Tensor, ...], batch: Batch) -> Memory:
        """What the decoder looks at, from the encoder's maps."""

    @abstractmethod
    def queries(self, memory: Memory) -> Queries:
        """The detector's own queries."""

    @abstractmethod
    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """Run decoder layer `i` on (N, Q, C). `attend` is the mask of cross-attention as the library prepares it."""

    def refine(self, i: int, hidden: Tensor, reference: Tensor | None) -> Tensor | None:
        """The references that enter layer `i + 1`, from the state after layer `i`. By default they stay the same."""
        return reference

    def attention_mask(self, queries: Queries, memory: Memory) -> Tensor | None:
        """The mask of cross-attention, as the library's decoder prepares it."""
        mask: Tensor | None = attention_mask_of(
            config=self.model.model.decoder.config,
            inputs_embeds=queries.content,
            attention_mask=memory.mask,
            encoder_hidden_states=memory.tokens,
        )
        return mask

    @abstractmethod
    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute class logits and boxes in [0, 1] by the heads of layer `i`, from its normalised state (N, Q, C)."""

    def last_norm(self, hidden: Tensor) -> Tensor:
        """Apply the norm between the last layer and the heads."""
        normalised: Tensor = self.model.model.decoder.layernorm(hidden)
        return normalised

    def auxiliary_norm(self, hidden: Tensor) -> Tensor:
        """Apply the norm between an inner layer and the heads."""
        return hidden

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Decode the detector's own queries. With `priors`, decode the queries of `priors` instead."""
        memory = self.memory(features, batch)
        queries = self.queries(memory) if priors is None else self.given_queries(priors, batch)
        attend = self.attention_mask(queries, memory)
        states, references = self._decode(queries.content, 0, queries.references, queries, memory, attend)
        logits, boxes = self._predict(states[-1], references[-1])
        predictions = self.predictions(logits, boxes, self.priors(queries, batch), batch)
        kept, _ = keep_states(map(to_state, states), stages)
        return HeadTrace(kept, predictions, Pass(memory, tuple(references), tuple(states), attend))

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the layers after `stage` on the memory of `trace`, from the references that entered there."""
        past: Any = trace.context
        reference = past.references[min(stage, len(past.references) - 1)]
        queries = queries_of(trace.predictions.priors)
        states, references = self._decode(from_state(state), stage, reference, queries, past.memory, past.attend)
        logits, boxes = self._predict(states[-1], references[-1])
        return replace(trace.predictions, logits=logits.float(), regression=boxes.float())

    def _decode(
        self,
        hidden: Tensor,
        start: int,
        reference: Tensor | None,
        queries: Queries,
        memory: Memory,
        attend: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The states from stage `start` on, and the references that entered each layer from there on (at least one)."""
        states, references = [hidden], [reference]
        for i in range(start, len(self.model.model.decoder.layers)):
            if i > start:
                references.append(self.refine(i - 1, states[-1], references[-1]))
            states.append(self.layer(i, states[-1], references[-1], queries, memory, attend))
        return states, references

    def _predict(self, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.judge(len(self.model.model.decoder.layers) - 1, self.last_norm(hidden), reference)

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """Compute the library's weighted terms. With `auxiliary_loss` in the config, inner layers have terms too."""
        config, predictions = self.model.config, trace.predictions
        logits, boxes = None, None
        if config.auxiliary_loss:
            inner = self._inner_layers(trace)
            logits = torch.stack([*(each for each, _ in inner), predictions.logits])
            boxes = torch.stack([*(each for _, each in inner), predictions.regression])
        device = predictions.logits.device
        losses, assignment = self.criticise(
            batch,
            lambda labels: self.model.loss_function(
                predictions.logits, labels, device, predictions.regression, config, logits, boxes
            ),
            predictions.logits.shape[1],
        )
        weights = {
            "loss_ce": 1.0,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        return weighted(losses, weights), assignment

    def _inner_layers(self, trace: HeadTrace) -> list[tuple[Tensor, Tensor]]:
        """Logits and boxes after each layer but the last, in float32."""
        past: Any = trace.context
        judged = [
            self.judge(i, self.auxiliary_norm(state), past.references[i]) for i, state in enumerate(past.states[1:-1])
        ]
        return [(logits.float(), boxes.float()) for logits, boxes in judged]

    def layers(self, trace: HeadTrace) -> tuple[HeadTrace, ...]:
        """What the heads say after each layer."""
        inner = [
            replace(
                trace,
                states=trace.states[: i + 2],
                predictions=replace(trace.predictions, logits=logits, regression=boxes),
            )
            for i, (logits, boxes) in enumerate(self._inner_layers(trace))
        ]
        return (*inner, trace)

    def matcher(self) -> nn.Module:
        """Build the library's matcher with the costs of the config."""
        config = self.model.config
        kind = HungarianMatcher if self.activation == "softmax" else DeformableDetrHungarianMatcher
        matcher: nn.Module = kind(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
        return matcher


def offset(offsets: Tensor, reference: Tensor) -> Tensor:
    """Offsets (..., 4) from a point (..., 2), which has no size, or from a box (..., 4)."""
    return offsets + F.pad(reference, (0, 4 - reference.shape[-1]))


def to_map(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_tokens`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *shape)


def mask_at(batch: Batch, shape: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: which cells of a level are content, as the library's backbones see it."""
    return F.interpolate(pixel_mask(batch)[None].float(), size=shape)[0].bool()


def repeated(embedding: Tensor, memory: Memory) -> Tensor:
    """(Q, C) -> (N, Q, C)."""
    return embedding.unsqueeze(0).repeat(memory.tokens.shape[0], 1, 1)


def tiny_backbone(*stages: int) -> Any:
    """Build the config of a narrow ResNet that gives the maps of `stages` (1 has stride 4, 4 has 32)."""
    return _resnet(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in stages],
    )


def tiny_detr(kind: Any, num_classes: int, **changes: Any) -> nn.Module:
    """Build a narrow and shallow detector of these four kinds. `changes` are fields of the config."""
    width = {"hidden_size" if kind is DabDetrForObjectDetection else "d_model": 32}
    settings: dict[str, Any] = {
        "backbone_config": tiny_backbone(4),
        "num_labels": num_classes,
        "num_queries": 20,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        **width,
    }
    model: nn.Module = kind(kind.config_class(**{**settings, **changes}))
    return model
