"""RT-DETR and RT-DETR v2 of transformers, and what they share with the other detectors that select their queries.

Follows the forwards in `models/{rt_detr,rt_detr_v2}/modeling_*.py` of transformers 5.23: the same submodules, called in
the same order, so that predictions, losses, and draws of noise and dropout are the library's own.

These detectors know no padding: boxes are relative to the canvas, and padding is looked at like any image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    image_transforms,
)
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher
from transformers.models.rt_detr import modeling_rt_detr
from transformers.models.rt_detr_v2 import modeling_rt_detr_v2

from kdtoolkit.adapters.transformers.base import (
    Queries,
    TransformersAdapter,
    from_state,
    pixel_mask,
    stirred,
    to_state,
)
from kdtoolkit.adapters.transformers.detr import tiny_backbone
from kdtoolkit.contract import (
    Assignment,
    Batch,
    Detections,
    DetectorSpec,
    HeadTrace,
    Predictions,
    Priors,
    State,
    keep_states,
)
from kdtoolkit.errors import KDError

Held = TypeVar("Held", "Queries", "Progress")

_transforms: Any = image_transforms  # whose types are wider than torch's
_matcher: Any = RTDetrHungarianMatcher


@dataclass(frozen=True)
class Memory:
    """What a decoder looks at: the `tokens` (N, S, C) of all levels, and the (H, W) of each level."""

    tokens: Tensor
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, features: tuple[Tensor, ...]) -> Memory:
        """The levels one after the other."""
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in features], 1)
        return cls(tokens, tuple((level.shape[-2], level.shape[-1]) for level in features))

    @cached_property
    def layout(self) -> dict[str, Any]:
        """How levels lie one after the other, as deformable attention takes it."""
        shapes = torch.as_tensor(self.shapes, dtype=torch.long, device=self.tokens.device)
        starts = torch.cat((shapes.new_zeros((1,)), shapes.prod(1).cumsum(0)[:-1]))
        return {"spatial_shapes": shapes, "spatial_shapes_list": list(self.shapes), "level_start_index": starts}


@dataclass(frozen=True)
class Selection:
    """What enters the decoder: `queries`, of which `shown` are those that detect.

    The others are of training alone (denoising, further groups). `logits` (N, Q, K) and `boxes` (N, Q, 4) are what the
    encoder said of the selected ones, None for queries of another detector; `mask` (Q, Q) is added to the scores of
    self-attention; `denoising` is what the library's loss wants to know of the noise.
    """

    queries: Queries
    shown: slice
    logits: Tensor | None = None
    boxes: Tensor | None = None
    mask: Tensor | None = None
    denoising: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Progress:
    """What goes from one decoder layer to the next: the state (N, Q, C), and boxes (N, Q, 4) as the library has them.

    At stage 0 the boxes are the references; after a layer they are its refined ones, with their gradient.
    """

    hidden: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Pass:
    """The context of a trace: memory, selection, the progress of all queries at each stage, and the batch."""

    memory: Memory
    selection: Selection
    progress: tuple[Progress, ...]
    batch: Batch

    def shown(self, stage: int) -> Progress:
        """The progress at a stage of the queries that detect."""
        return over_queries(self.progress[stage], lambda x: x[:, self.selection.shown])


def over_queries(held: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """`held` with all its tensors (N, Q, C) changed."""
    values = {field.name: getattr(held, field.name) for field in fields(held)}
    return replace(held, **{k: change(x) for k, x in values.items() if isinstance(x, Tensor) and x.ndim == 3})


class SelectingAdapter(TransformersAdapter):
    """Base of the adapters of detectors whose queries start at the encoder's best boxes."""

    masked: ClassVar[bool] = False

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return int(self.model.config.decoder_layers)

    @property
    def groups(self) -> int:
        """For how many groups of queries, blind to each other, the library's self-attention takes them."""
        return 1

    @abstractmethod
    def select(self, memory: Memory, batch: Batch) -> Selection:
        """The detector's own queries, and in train mode what the library trains besides."""

    @abstractmethod
    def layer(self, i: int, progress: Progress, memory: Memory, mask: Tensor | None) -> Tensor:
        """The state after decoder layer `i`."""

    @abstractmethod
    def refine(self, i: int, hidden: Tensor, progress: Progress) -> Progress:
        """The progress after layer `i`, from the state after it and the progress that entered it."""

    @abstractmethod
    def predict(self, progress: Progress, priors: Priors, batch: Batch) -> Predictions:
        """Predictions by the last layer's heads."""

    def start(self, queries: Queries) -> Progress:
        """The progress at stage 0."""
        assert queries.references is not None
        return Progress(queries.content, queries.references)

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Select queries and decode them, or those of `priors`.

        Raises KDError for images with fewer cells than queries to select.
        """
        memory = Memory.of(features)
        if priors is None:
            self.check_cells(self.model.config.num_queries, memory.tokens.shape[1], "num_queries")
        selection = self.select(memory, batch) if priors is None else self._given(priors, batch)
        progress = self._decode(self.start(selection.queries), 0, memory, selection.mask)
        past = Pass(memory, selection, tuple(progress), batch)
        shown = [past.shown(stage) for stage in range(len(progress))]
        if priors is None:
            priors = self.priors(over_queries(selection.queries, lambda x: x[:, selection.shown]), batch)
        predictions = self.predict(shown[-1], priors, batch)
        states, _ = keep_states((to_state(at.hidden) for at in shown), stages)
        return HeadTrace(states, predictions, past)

    def _given(self, priors: Priors, batch: Batch) -> Selection:
        queries = self.given_queries(priors, batch)
        if queries.references is None:
            raise KDError("these queries have no reference boxes: hand over those of a detector of equal prior_form")
        return Selection(self._as_groups(queries), slice(0, queries.content.shape[1]))

    def _as_groups(self, held: Held) -> Held:
        """The same queries as each of the groups that self-attention takes them for."""
        return over_queries(held, lambda x: x.repeat(1, self.groups, 1)) if self.groups > 1 else held

    def _decode(self, progress: Progress, start: int, memory: Memory, mask: Tensor | None) -> list[Progress]:
        """The progress from stage `start` on."""
        passed = [progress]
        for i in range(start, self.layers):
            hidden = self.layer(i, passed[-1], memory, mask)
            passed.append(self.refine(i, hidden, passed[-1]))
        return passed

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """The layers after `stage`, on the memory of `trace`, from the boxes that it has at that stage."""
        past: Any = trace.context
        hidden = from_state(state)
        if stage == self.layers:
            progress = self.refine(stage - 1, hidden, past.shown(stage - 1))
        else:
            entering = self._as_groups(replace(past.shown(stage), hidden=hidden))
            final = self._decode(entering, stage, past.memory, None)[-1]
            progress = over_queries(final, lambda x: x[:, : hidden.shape[1]])
        return self.predict(progress, trace.predictions.priors, past.batch)

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The library's own postprocessing, with no score threshold, by falling score.

        The library knows no padding here. What it finds there, by the centre, is left out.
        """
        canvas = batch.images.shape[-2], batch.images.shape[-1]
        found = super().detections(trace, batch)
        sizes = zip(batch.sizes, batch.original_sizes, strict=True)
        return [
            each if size == canvas else _within(each, original)
            for each, (size, original) in zip(found, sizes, strict=True)
        ]

    def encoder_outputs(self, trace: HeadTrace) -> tuple[Pass, Tensor, Tensor]:
        """The pass of a trace, and what the encoder said of its queries: logits and boxes, in float32.

        Raises KDError for queries of another detector, which the own encoder did not select.
        """
        past: Any = trace.context
        if past.selection.logits is None or past.selection.boxes is None:
            raise KDError("the library's losses are for a detector's own queries: take them from a pass without priors")
        return past, past.selection.logits.float(), past.selection.boxes.float()


def _within(found: Detections, size: tuple[int, int]) -> Detections:
    """The detections whose centre lies in an image of (height, width)."""
    doubled = found["boxes"][:, :2] + found["boxes"][:, 2:]
    keep = (doubled <= 2 * doubled.new_tensor([size[1], size[0]])).all(1)
    return Detections(boxes=found["boxes"][keep], scores=found["scores"][keep], labels=found["labels"][keep])


class RTDetrAdapter(SelectingAdapter):
    """Adapter of RTDetrForObjectDetection: a pyramid; boxes are refined from layer to layer.

    Features are the encoder's maps as the decoder looks at them, that is after its input projections. These have batch
    norms, whose statistics a second pass of the head, for another detector's queries, must not count again.
    """

    # Images are rescaled to [0, 1] and no more.
    default_mean: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0)
    default_std: ClassVar[tuple[float, ...]] = (1.0, 1.0, 1.0)
    processor: ClassVar[type[Any]] = RTDetrImageProcessor
    kind: ClassVar[type[nn.Module]] = RTDetrForObjectDetection
    # The library's module of the model, without types there.
    modeling: ClassVar[Any] = modeling_rt_detr

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow and shallow RT-DETR."""
        return {"RT-DETR": partial(stirred, partial(tiny, RTDetrForObjectDetection, RTDetrConfig))}

    def refuses(self) -> str | None:
        """What configs can ask for and the library's forward cannot run (5.24): published ones do not."""
        config = self.model.config
        if config.learn_initial_query:
            return "has learn_initial_query, which the library cannot run: build it without"
        if getattr(config, "eval_idx", -1) not in (-1, self.layers - 1):
            return f"has eval_idx={config.eval_idx}, which the library cannot run: build it with -1, the last layer"
        return super().refuses()

    @cached_property
    def spec(self) -> DetectorSpec:
        """The detector's facts."""
        config, projections = self.model.config, self.model.model.decoder_input_proj
        strides = list(self._map_strides())
        # Further levels come from the encoder's last map, each of them.
        strides += [
            strides[-1] * (1 if isinstance(project, nn.Identity) else 2) for project in projections[len(strides) :]
        ]
        return self.describe(
            strides=strides,
            width=config.d_model,
            layers=self.layers,
            prior_form=f"queries of content {config.d_model}, reference boxes",
        )

    def _map_strides(self) -> Sequence[int]:
        """Strides of the encoder's maps."""
        strides: Sequence[int] = self.model.config.feat_strides
        return strides

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Backbone, encoder, and the decoder's input projections.

        Raises KDError where the config's `feat_strides` are not those of the maps.
        """
        model = self.model.model
        maps = self.encode(batch)
        levels = [project(level) for project, level in zip(model.decoder_input_proj, maps, strict=False)]
        levels += [project(maps[-1]) for project in model.decoder_input_proj[len(maps) :]]
        width, strides = batch.images.shape[-1], self.spec.strides
        found = [level.shape[-1] for level in levels]
        if found != [-(-width // stride) for stride in strides]:
            raise KDError(
                f"the maps of {type(self.model).__name__} are {found} cells wide for {width} px, which does not fit "
                f"strides {strides}: set model.config.feat_strides to those of its backbone's maps"
            )
        return tuple(levels)

    def encode(self, batch: Batch) -> Sequence[Tensor]:
        """Backbone and encoder: one map a level."""
        model = self.model.model
        maps = model.backbone(batch.images, pixel_mask(batch))
        projected = [project(x) for project, (x, _) in zip(model.encoder_input_proj, maps, strict=False)]
        encoded: Sequence[Tensor] = model.encoder(projected, return_dict=True).last_hidden_state
        return encoded

    def select(self, memory: Memory, batch: Batch) -> Selection:
        """The encoder's best boxes, behind them in train mode noisy versions of the ground truth."""
        model, config, tokens = self.model.model, self.model.config, memory.tokens
        noise = self._noise(batch)
        # In float32 under autocast too: anchors in bfloat16 are off by pixels.
        anchors, valid = model.generate_anchors(memory.shapes, device=tokens.device, dtype=torch.float32)
        candidates = model.enc_output(valid.to(tokens.dtype) * tokens)
        scores = model.enc_score_head(candidates)
        boxes = model.enc_bbox_head(candidates) + anchors
        best = scores.max(-1).values.topk(config.num_queries, dim=1).indices.unsqueeze(-1)
        scores, boxes, content = (x.gather(1, best.expand(-1, -1, x.shape[-1])) for x in (scores, boxes, candidates))
        logits, references, content = scores, boxes.detach(), content.detach()
        if noise is None:
            return Selection(Queries(content, references=references.sigmoid()), slice(None), logits, boxes.sigmoid())
        noisy_content, noisy_references, mask, denoising = noise
        queries = Queries(
            torch.cat([noisy_content, content], 1),
            references=torch.cat([noisy_references, references], 1).detach().sigmoid(),
        )
        shown = slice(denoising["dn_num_split"][0], None)
        return Selection(queries, shown, logits, boxes.sigmoid(), mask, denoising)

    def _noise(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Any]] | None:
        """Content, unnormalised references, mask and facts of the library's denoising queries; None without any."""
        config = self.model.config
        if not self.model.training or config.num_denoising <= 0 or not batch.labels:
            return None
        content, references, mask, denoising = self.modeling.get_contrastive_denoising_training_group(
            targets=self.library_labels(batch),
            num_classes=config.num_labels,
            num_queries=config.num_queries,
            class_embed=self.model.model.denoising_class_embed,
            num_denoising_queries=config.num_denoising,
            label_noise_ratio=config.label_noise_ratio,
            box_noise_scale=config.box_noise_scale,
        )
        return None if content is None else (content, references, mask, denoising)

    def layer(self, i: int, progress: Progress, memory: Memory, mask: Tensor | None) -> Tensor:
        """One layer, which samples the memory around the boxes, cut from their gradient."""
        decoder, references = self.model.model.decoder, progress.boxes.detach()
        output: Tensor = decoder.layers[i](
            progress.hidden,
            object_queries_position_embeddings=decoder.query_pos_head(references),
            encoder_hidden_states=memory.tokens,
            reference_points=references.unsqueeze(2),
            encoder_attention_mask=mask,
            **memory.layout,
        )
        return output

    def refine(self, i: int, hidden: Tensor, progress: Progress) -> Progress:
        """Boxes by the head of layer `i`, offsets from those that entered it."""
        offsets = self.model.model.decoder.bbox_embed[i](hidden)
        boxes = (offsets + self.modeling.inverse_sigmoid(progress.boxes.detach())).sigmoid()
        return Progress(hidden, boxes)

    def classify(self, i: int, progress: Progress) -> Tensor:
        """Class logits (N, Q, K) by the head of layer `i`, from the progress after it."""
        logits: Tensor = self.model.model.decoder.class_embed[i](progress.hidden)
        return logits

    def predict(self, progress: Progress, priors: Priors, batch: Batch) -> Predictions:
        """Predictions by the last layer's heads."""
        return self.predictions(self.classify(self.layers - 1, progress), progress.boxes, priors, batch)

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """The library's terms with its weights: of each layer (`aux`), and of denoising (`dn`)."""
        past, encoder_logits, encoder_boxes = self.encoder_outputs(trace)
        outputs = {name: torch.stack(each, 1).float() for name, each in self.layer_outputs(past.progress).items()}
        losses, assignment = self.criticise(
            batch,
            lambda labels: self.model.loss_function(
                outputs["outputs_class"][:, -1],
                labels,
                batch.images.device,
                outputs["outputs_coord"][:, -1],
                self.model.config,
                enc_topk_logits=encoder_logits,
                enc_topk_bboxes=encoder_boxes,
                denoising_meta_values=past.selection.denoising,
                **outputs,
            ),
            trace.predictions.logits.shape[1],
        )
        return dict(losses), assignment

    def layer_outputs(self, progress: tuple[Progress, ...]) -> dict[str, list[Tensor]]:
        """What the library's loss takes of each layer, by the names of its arguments."""
        after = progress[1:]
        return {
            "outputs_class": [self.classify(i, at) for i, at in enumerate(after)],
            "outputs_coord": [at.boxes for at in after],
        }

    def matcher(self) -> Any:
        """The library's matcher with the costs of the config."""
        return _matcher(self.model.config)


class RTDetrV2Adapter(RTDetrAdapter):
    """Adapter of RTDetrV2ForObjectDetection: as RT-DETR, with another way to sample the memory."""

    kind: ClassVar[type[nn.Module]] = RTDetrV2ForObjectDetection
    modeling: ClassVar[Any] = modeling_rt_detr_v2

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow and shallow RT-DETR v2."""
        return {"RT-DETR v2": partial(stirred, partial(tiny, RTDetrV2ForObjectDetection, RTDetrV2Config))}


def tiny(model: Callable[..., nn.Module], config: Callable[..., Any], num_classes: int, **changes: Any) -> nn.Module:
    """A narrow and shallow detector of RT-DETR's kin, for examples and tests; `changes` are fields of the config."""
    settings: dict[str, Any] = {
        "backbone_config": tiny_backbone(2, 3, 4),
        "num_labels": num_classes,
        "num_queries": 20,
        "num_denoising": 8,
        "d_model": 32,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [8, 16, 16],
        "decoder_in_channels": [32, 32, 32],
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "hidden_expansion": 0.5,
    }
    return model(config(**{**settings, **changes}))


ADAPTERS: tuple[type[SelectingAdapter], ...] = (RTDetrAdapter, RTDetrV2Adapter)
