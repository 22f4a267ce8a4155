"""DETR, Conditional DETR, DAB-DETR and Deformable DETR of transformers.

Follows the forwards in `models/{detr,conditional_detr,dab_detr,deformable_detr}/modeling_*.py` of transformers 5.23:
the same submodules, called in the same order, so that predictions, losses and draws of dropout are the library's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DabDetrConfig,
    DabDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
)
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.conditional_detr import modeling_conditional_detr
from transformers.models.dab_detr import modeling_dab_detr
from transformers.models.deformable_detr import modeling_deformable_detr

from kdtoolkit.adapters.transformers.base import (
    Queries,
    TransformersAdapter,
    backbone_strides,
    from_state,
    pixel_mask,
    queries_of,
    stirred,
    to_state,
    weighted,
)
from kdtoolkit.contract import (
    Assignment,
    Batch,
    DetectorSpec,
    HeadTrace,
    Predictions,
    Priors,
    State,
    keep_states,
)

# Without types in the library.
_conditional: Any = modeling_conditional_detr
_dab: Any = modeling_dab_detr
_deformable: Any = modeling_deformable_detr
_attention_mask: Any = create_bidirectional_mask
_resnet: Any = ResNetConfig


@dataclass(frozen=True)
class Memory:
    """What a decoder looks at: the encoder's `tokens` (N, S, C), and which of them are content: `mask` (N, S) bool.

    `positions` (N, S, C) where cross-attention adds them. `shapes` are the (H, W) of each level.
    """

    tokens: Tensor
    mask: Tensor
    shapes: tuple[tuple[int, int], ...]
    positions: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """The context of a trace: the memory, and the references (N, Q, 2 or 4) that entered each layer, None if none.

    `states` are the hidden ones (N, Q, C) of all stages, of which the losses of inner layers are made; `attend` is the
    mask of cross-attention as the library prepares it, which makes a GPU's host wait.
    """

    memory: Memory
    references: tuple[Tensor | None, ...]
    states: tuple[Tensor, ...]
    attend: Tensor | None


class _DetrKin(TransformersAdapter):
    """What the four have in common: a decoder whose layers are run one by one."""

    processor: ClassVar[type[Any]] = ConditionalDetrImageProcessor

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
        """Run decoder layer `i` on (N, Q, C); `attend` is the mask of cross-attention as the library prepares it."""

    def refine(self, i: int, hidden: Tensor, reference: Tensor | None) -> Tensor | None:
        """The references that enter layer `i + 1`, from the state after layer `i`: the same where none are refined."""
        return reference

    def attention_mask(self, queries: Queries, memory: Memory) -> Tensor | None:
        """The mask of cross-attention, as the library's decoder prepares it."""
        mask: Tensor | None = _attention_mask(
            config=self.model.model.decoder.config,
            inputs_embeds=queries.content,
            attention_mask=memory.mask,
            encoder_hidden_states=memory.tokens,
        )
        return mask

    @abstractmethod
    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class logits and boxes in [0, 1] by the heads of layer `i`, from its normalised state (N, Q, C)."""

    def last_norm(self, hidden: Tensor) -> Tensor:
        """The norm between the last layer and the heads."""
        normalised: Tensor = self.model.model.decoder.layernorm(hidden)
        return normalised

    def auxiliary_norm(self, hidden: Tensor) -> Tensor:
        """The norm between an inner layer and the heads, for auxiliary losses."""
        return hidden

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Decode the own queries, or those of `priors`."""
        memory = self.memory(features, batch)
        queries = self.queries(memory) if priors is None else self.given_queries(priors, batch)
        attend = self.attention_mask(queries, memory)
        states, references = self._decode(queries.content, 0, queries.references, queries, memory, attend)
        logits, boxes = self._predict(states[-1], references[-1])
        predictions = self.predictions(logits, boxes, self.priors(queries, batch), batch)
        kept, _ = keep_states(map(to_state, states), stages)
        return HeadTrace(kept, predictions, Pass(memory, tuple(references), tuple(states), attend))

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """The layers after `stage`, on the memory of `trace`, from the references that entered there."""
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
        """The states from stage `start` on, and the references that entered each layer from there on (one at least)."""
        states, references = [hidden], [reference]
        for i in range(start, len(self.model.model.decoder.layers)):
            if i > start:
                references.append(self.refine(i - 1, states[-1], references[-1]))
            states.append(self.layer(i, states[-1], references[-1], queries, memory, attend))
        return states, references

    def _predict(self, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.judge(len(self.model.model.decoder.layers) - 1, self.last_norm(hidden), reference)

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """The library's terms with its weights, those of inner layers too if the config has `auxiliary_loss`."""
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

    def matcher(self) -> nn.Module:
        """The library's matcher with the costs of the config."""
        config = self.model.config
        kind = HungarianMatcher if self.activation == "softmax" else DeformableDetrHungarianMatcher
        matcher: nn.Module = kind(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
        return matcher


class DetrAdapter(_DetrKin):
    """Adapter of DetrForObjectDetection: one map of stride 32, scores a softmax, queries without a place."""

    activation: ClassVar[Literal["sigmoid", "softmax"]] = "softmax"
    processor: ClassVar[type[Any]] = DetrImageProcessor
    kind: ClassVar[type[nn.Module]] = DetrForObjectDetection
    prior_form: ClassVar[str] = "queries of content {0}, positions {0}"

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow and shallow DETR."""
        return {"DETR": partial(stirred, partial(_tiny, DetrForObjectDetection, DetrConfig))}

    @cached_property
    def spec(self) -> DetectorSpec:
        """The detector's facts."""
        config = self.model.config
        return self.describe(
            strides=backbone_strides(self._backbone())[-1:],
            width=config.hidden_size,
            layers=config.decoder_layers,
            prior_form=self.prior_form.format(config.hidden_size),
        )

    def _backbone(self) -> nn.Module:
        backbone: nn.Module = self.model.model.backbone.model
        return backbone

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Backbone and encoder: the encoder's output as one map."""
        model = self.model.model
        feature_map, mask = model.backbone(batch.images, pixel_mask(batch))[-1]
        encoded = model.encoder(
            inputs_embeds=_to_tokens(model.input_projection(feature_map)),
            attention_mask=mask.flatten(1),
            spatial_position_embeddings=self._positions(feature_map, mask, batch),
            return_dict=True,
        )
        return (_to_map(encoded.last_hidden_state, feature_map.shape[-2:]),)

    def _positions(self, feature_map: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        position = self.model.model.position_embedding(
            shape=feature_map.shape, device=mask.device, dtype=batch.images.dtype, mask=mask
        )
        return _to_tokens(position)

    def memory(self, features: tuple[Tensor, ...], batch: Batch) -> Memory:
        """The encoder's output with the positions that cross-attention adds."""
        (encoded,) = features
        height, width = encoded.shape[-2:]
        mask = _mask_at(batch, (height, width))
        positions = self._positions(encoded, mask, batch)
        return Memory(_to_tokens(encoded), mask.flatten(1), ((height, width),), positions)

    def queries(self, memory: Memory) -> Queries:
        """Learned positions; the content is zero."""
        positions = _repeat(self.model.model.query_position_embeddings.weight, memory)
        return Queries(torch.zeros_like(positions), positions)

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """One layer; with auxiliary losses the library normalises between layers."""
        decoder = self.model.model.decoder
        hidden = decoder.layers[i](
            hidden, None, memory.positions, queries.positions, memory.tokens, encoder_attention_mask=attend
        )
        return self._between(hidden)

    def _between(self, hidden: Tensor) -> Tensor:
        return self.model.model.decoder.layernorm(hidden) if self.model.config.auxiliary_loss else hidden

    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """The one pair of heads that all layers share."""
        return self.model.class_labels_classifier(hidden), self.model.bbox_predictor(hidden).float().sigmoid()


class ConditionalDetrAdapter(DetrAdapter):
    """Adapter of ConditionalDetrForObjectDetection: as DETR, but with scores by sigmoid and queries at points.

    The points are made from the positions by the decoder's own layers. They are handed over with them, so that queries
    are looked for at the same places in both detectors.
    """

    activation = "sigmoid"
    processor = ConditionalDetrImageProcessor
    kind = ConditionalDetrForObjectDetection
    prior_form = "queries of content {0}, positions {0}, reference points"

    def refuses(self) -> str | None:
        """Layers left out at random cannot be resumed."""
        if self.model.config.decoder_layerdrop:
            return (
                f"has decoder_layerdrop={self.model.config.decoder_layerdrop}, which leaves out layers at random: set "
                "model.config.decoder_layerdrop and model.model.decoder.layerdrop to 0"
            )
        return super().refuses()

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow and shallow Conditional DETR."""
        return {
            "Conditional DETR": partial(
                stirred, partial(_tiny, ConditionalDetrForObjectDetection, ConditionalDetrConfig)
            )
        }

    def queries(self, memory: Memory) -> Queries:
        """Learned positions, and the points made from them; the content is zero."""
        queries = super().queries(memory)
        return replace(queries, references=self.model.model.decoder.ref_point_head(queries.positions).sigmoid())

    def attention_mask(self, queries: Queries, memory: Memory) -> Tensor | None:
        """As the library's decoder prepares it."""
        mask: Tensor | None = _attention_mask(self.model.model.decoder.config, queries.content, memory.mask)
        return mask

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """One layer; the embedding of the points is scaled by the state, but for the first layer."""
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
        """The one pair of heads that all layers share; boxes are offsets from the points."""
        offsets = self.model.bbox_predictor(hidden).float()
        boxes = _offset(offsets, _conditional.inverse_sigmoid(reference)).sigmoid()
        return self.model.class_labels_classifier(hidden), boxes


class DabDetrAdapter(DetrAdapter):
    """Adapter of DabDetrForObjectDetection: queries are anchor boxes, refined from layer to layer."""

    activation = "sigmoid"
    processor = ConditionalDetrImageProcessor
    kind = DabDetrForObjectDetection
    prior_form = "queries of content {0}, reference boxes"

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow and shallow DAB-DETR."""
        return {"DAB-DETR": partial(stirred, partial(_tiny, DabDetrForObjectDetection, DabDetrConfig))}

    def _backbone(self) -> nn.Module:
        backbone: nn.Module = self.model.model.backbone.conv_encoder.model
        return backbone

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Backbone and encoder: the encoder's output as one map."""
        model = self.model.model
        maps, positions = model.backbone(batch.images, pixel_mask(batch))
        feature_map, mask = maps[-1]
        encoded = model.encoder(
            inputs_embeds=_to_tokens(model.input_projection(feature_map)),
            attention_mask=mask.flatten(1),
            object_queries=_to_tokens(positions[-1]),
            return_dict=True,
        )
        return (_to_map(encoded.last_hidden_state, feature_map.shape[-2:]),)

    def _positions(self, feature_map: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        return _to_tokens(self.model.model.backbone.position_embedding(feature_map, mask).to(feature_map.dtype))

    def queries(self, memory: Memory) -> Queries:
        """Learned anchor boxes; the content is zero, or each of `num_patterns` learned ones at each of the boxes."""
        model = self.model.model
        anchors = _repeat(model.query_refpoint_embeddings.weight, memory)
        if not model.num_patterns:
            content = anchors.new_zeros(*anchors.shape[:2], self.model.config.hidden_size)
        else:
            # The images side by side in memory, as the library has them: other strides give other last bits.
            patterns = model.patterns.weight.repeat_interleave(anchors.shape[1], 0).unsqueeze(1)
            content = patterns.repeat(1, len(anchors), 1).transpose(0, 1)
            anchors = anchors.repeat(1, model.num_patterns, 1)
        return Queries(content, references=anchors.sigmoid())

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """One layer; the embedding of the boxes' centres is scaled by the state, and by the boxes' sizes."""
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
        """Boxes after layer `i`: gradient flows into them from the next layer's prediction, not from the next layer."""
        assert reference is not None
        box = reference if i == 0 else reference.detach()
        refined: Tensor = self.model.model.decoder.bbox_embed(hidden).float() + _dab.inverse_sigmoid(box)
        return refined.sigmoid()

    def auxiliary_norm(self, hidden: Tensor) -> Tensor:
        """The last layer's norm: the library normalises beside the way from layer to layer."""
        return self.last_norm(hidden)

    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """The one pair of heads that all layers share; boxes are offsets from those that entered the layer."""
        offsets = self.model.bbox_predictor(hidden).float()
        boxes = (offsets + _dab.inverse_sigmoid(reference)).sigmoid()
        return self.model.class_embed(hidden), boxes


class DeformableDetrAdapter(_DetrKin):
    """Adapter of DeformableDetrForObjectDetection: a pyramid; queries at points, or (two_stage) at the best boxes.

    With `with_box_refine` references are refined from layer to layer. The library's loss leaves out
    the encoder's own boxes of two_stage, so that their heads do not learn; so it is here.
    """

    processor = DeformableDetrImageProcessor
    kind = DeformableDetrForObjectDetection

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow and shallow Deformable DETR with box refinement and two stages."""
        return {"Deformable DETR": partial(stirred, _tiny_deformable)}

    @cached_property
    def spec(self) -> DetectorSpec:
        """The detector's facts."""
        config = self.model.config
        strides = backbone_strides(self.model.model.backbone.model)
        if config.num_feature_levels == 1:
            strides = strides[-1:]
        while len(strides) < config.num_feature_levels:  # convolutions of stride 2 on the backbone's last map
            strides = (*strides, 2 * strides[-1])
        kind = "boxes" if config.two_stage else "points"
        return self.describe(
            strides=strides,
            width=config.d_model,
            layers=config.decoder_layers,
            prior_form=f"queries of content {config.d_model}, positions {config.d_model}, reference {kind}",
        )

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Backbone, projections and encoder: the encoder's output as maps."""
        model = self.model.model
        maps = [feature_map for feature_map, _ in model.backbone(batch.images, pixel_mask(batch))]
        sources = [project(x) for project, x in zip(model.input_proj, maps, strict=False)]
        for i in range(len(sources), self.model.config.num_feature_levels):
            sources.append(model.input_proj[i](maps[-1] if i == len(maps) else sources[-1]))
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in sources)
        masks = [_mask_at(batch, shape) for shape in shapes]
        positions = [
            _to_tokens(model.position_embedding(shape=x.shape, device=x.device, dtype=batch.images.dtype, mask=mask))
            + model.level_embed[i]
            for i, (x, mask) in enumerate(zip(sources, masks, strict=True))
        ]
        tokens = torch.cat([_to_tokens(x) for x in sources], 1)
        encoded = model.encoder(
            inputs_embeds=tokens,
            attention_mask=torch.cat([mask.flatten(1) for mask in masks], 1),
            spatial_position_embeddings=torch.cat(positions, 1),
            valid_ratios=self._valid_ratios(masks),
            return_dict=True,
            **_levels(shapes, tokens.device),
        ).last_hidden_state
        levels = torch.split(encoded, [height * width for height, width in shapes], 1)
        return tuple(_to_map(level, shape) for level, shape in zip(levels, shapes, strict=True))

    def _valid_ratios(self, masks: list[Tensor]) -> Tensor:
        """In float32 under autocast too: places in an image that are worked out in bfloat16 are off by pixels."""
        return torch.stack([self.model.model.get_valid_ratio(mask, dtype=torch.float32) for mask in masks], 1)

    def memory(self, features: tuple[Tensor, ...], batch: Batch) -> Memory:
        """The encoder's output."""
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in features)
        mask = torch.cat([_mask_at(batch, shape).flatten(1) for shape in shapes], 1)
        return Memory(torch.cat([_to_tokens(level) for level in features], 1), mask, shapes)

    def queries(self, memory: Memory) -> Queries:
        """Learned content and positions, with points made from these; or all three from the encoder's best boxes.

        Raises KDError for images with fewer cells than boxes to select.
        """
        model, width = self.model.model, self.model.config.d_model
        if not self.model.config.two_stage:
            positions, content = torch.split(_repeat(model.query_position_embeddings.weight, memory), width, -1)
            return Queries(content, positions, model.reference_points(positions).sigmoid())
        count = self.model.config.two_stage_num_proposals
        self.check_cells(count, memory.tokens.shape[1], "two_stage_num_proposals")
        # Of tokens in float32 under autocast too, for proposals are made in their precision.
        candidates, proposals = model.gen_encoder_output_proposals(memory.tokens.float(), ~memory.mask, memory.shapes)
        scores = model.decoder.class_embed[-1](candidates)[..., 0]
        boxes = model.decoder.bbox_embed[-1](candidates).float() + proposals
        best = scores.topk(count, dim=1).indices
        boxes = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)).detach()
        embedded = model.pos_trans_norm(model.pos_trans(model.get_proposal_pos_embed(boxes)))
        positions, content = torch.split(embedded, width, -1)
        return Queries(content, positions, boxes.sigmoid())

    def attention_mask(self, queries: Queries, memory: Memory) -> Tensor | None:
        """The mask itself: deformable attention takes it so."""
        return memory.mask

    def layer(
        self, i: int, hidden: Tensor, reference: Tensor | None, queries: Queries, memory: Memory, attend: Tensor | None
    ) -> Tensor:
        """One layer, which samples the memory around the references."""
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
            **_levels(memory.shapes, hidden.device),
        )
        return output

    def refine(self, i: int, hidden: Tensor, reference: Tensor | None) -> Tensor | None:
        """Boxes after layer `i`, cut from the gradient."""
        heads = self.model.model.decoder.bbox_embed
        return reference if heads is None else self._boxes(heads[i](hidden), reference).detach()

    def last_norm(self, hidden: Tensor) -> Tensor:
        """There is none."""
        return hidden

    def judge(self, i: int, hidden: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """The heads of layer `i`; boxes are offsets from the references that entered it."""
        # The library's heads see slices of all layers' states in one tensor. What is multiplied from other strides
        # differs in its last bits.
        hidden = torch.stack([hidden, hidden], 1)[:, 0]
        return self.model.class_embed[i](hidden), self._boxes(self.model.bbox_embed[i](hidden), reference)

    def _boxes(self, offsets: Tensor, reference: Tensor | None) -> Tensor:
        return _offset(offsets.float(), _deformable.inverse_sigmoid(reference)).sigmoid()


def _offset(offsets: Tensor, reference: Tensor) -> Tensor:
    """Offsets (..., 4) from a point (..., 2), which has no size, or from a box (..., 4)."""
    return offsets + F.pad(reference, (0, 4 - reference.shape[-1]))


def _to_tokens(level: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C)."""
    return level.flatten(2).transpose(1, 2)


def _to_map(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_to_tokens`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *shape)


def _mask_at(batch: Batch, shape: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: which cells of a level are content, as the library's backbones see it."""
    return F.interpolate(pixel_mask(batch)[None].float(), size=shape)[0].bool()


def _repeat(embedding: Tensor, memory: Memory) -> Tensor:
    """(Q, C) -> (N, Q, C)."""
    return embedding.unsqueeze(0).repeat(memory.tokens.shape[0], 1, 1)


def _levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> dict[str, Any]:
    """How levels lie one after the other, as deformable attention takes it."""
    spatial_shapes = torch.as_tensor(shapes, dtype=torch.long, device=device)
    starts = torch.cat((spatial_shapes.new_zeros((1,)), spatial_shapes.prod(1).cumsum(0)[:-1]))
    return {"spatial_shapes": spatial_shapes, "spatial_shapes_list": list(shapes), "level_start_index": starts}


def tiny_backbone(*stages: int) -> Any:
    """A narrow ResNet that gives the maps of `stages` (1 has stride 4, 4 has 32), for examples and tests."""
    return _resnet(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in stages],
    )


def _tiny(model: Callable[..., nn.Module], config: Callable[..., Any], num_classes: int, **changes: Any) -> nn.Module:
    width = {"hidden_size" if config is DabDetrConfig else "d_model": 32}
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
    return model(config(**{**settings, **changes}))


def _tiny_deformable(num_classes: int) -> nn.Module:
    # 64 channels: its group norm of 32 groups has nothing to compare in groups of one channel on a map of one cell.
    return _tiny(
        DeformableDetrForObjectDetection,
        DeformableDetrConfig,
        num_classes,
        backbone_config=tiny_backbone(2, 3, 4),
        d_model=64,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=20,
    )


ADAPTERS: tuple[type[TransformersAdapter], ...] = (
    DetrAdapter,
    ConditionalDetrAdapter,
    DabDetrAdapter,
    DeformableDetrAdapter,
)
