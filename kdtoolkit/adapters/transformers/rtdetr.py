"""RT-DETR and RT-DETR v2 of transformers.

Follows the forwards in `models/{rt_detr,rt_detr_v2}/modeling_*.py` of transformers 5.23: the same submodules, called in
the same order, so that predictions, losses, and draws of noise and dropout are the library's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrV2ForObjectDetection,
)
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher
from transformers.models.rt_detr import modeling_rt_detr
from transformers.models.rt_detr_v2 import modeling_rt_detr_v2

from kdtoolkit.adapters.transformers.base import Queries, pixel_mask
from kdtoolkit.adapters.transformers.detr_base import tiny_backbone
from kdtoolkit.adapters.transformers.selecting import Memory, Progress, SelectingAdapter, Selection
from kdtoolkit.contract import Assignment, Batch, DetectorSpec, HeadTrace, Predictions, Priors
from kdtoolkit.detectors.precision import without_narrow_bfloat16
from kdtoolkit.errors import KDError

_matcher: Any = RTDetrHungarianMatcher


class RTDetrAdapter(SelectingAdapter):
    """Adapter of RTDetrForObjectDetection: a pyramid, and boxes that each layer refines.

    Features are the encoder's maps after the decoder's input projections. These have batch norms, whose statistics must
    not count a second pass of the head for another detector's queries.
    """

    # Images are rescaled to [0, 1] and no more.
    default_mean: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0)
    default_std: ClassVar[tuple[float, ...]] = (1.0, 1.0, 1.0)
    processor: ClassVar[type[Any]] = RTDetrImageProcessor
    kind: ClassVar[type[nn.Module]] = RTDetrForObjectDetection
    family: ClassVar[str] = "RT-DETR"
    # The library's module of the model, without types there.
    modeling: ClassVar[Any] = modeling_rt_detr

    @classmethod
    def tiny(cls, num_classes: int) -> nn.Module:
        """Build a detector with 32 channels and three decoder layers."""
        return tiny_rt_detr(cls.kind, num_classes)

    def refuses(self) -> str | None:
        """Refuse two settings of a config that the library's own forward cannot run (5.24).

        No published config has them.
        """
        config = self.model.config
        if config.learn_initial_query:
            return "has learn_initial_query=True, which the library cannot run: set learn_initial_query=False"
        if getattr(config, "eval_idx", -1) not in (-1, self.depth - 1):
            return f"has eval_idx={config.eval_idx}, which the library cannot run: build it with eval_idx=-1"
        return super().refuses()

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        config, projections = self.model.config, self.model.model.decoder_input_proj
        strides = list(self._map_strides())
        # Further levels come from the encoder's last map, each of them.
        strides += [
            strides[-1] * (1 if isinstance(project, nn.Identity) else 2) for project in projections[len(strides) :]
        ]
        return self.decoder_spec(
            strides=strides,
            width=config.d_model,
            layers=self.depth,
            prior_form=f"queries of content {config.d_model}, reference boxes",
        )

    def _map_strides(self) -> Sequence[int]:
        """Strides of the encoder's maps."""
        strides: Sequence[int] = self.model.config.feat_strides
        return strides

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone, encoder, and the decoder's input projections.

        Raises KDError if the config's `feat_strides` are not the strides of the maps.
        """
        model = self.model.model
        with without_narrow_bfloat16(batch.images, self.spec.strides[-1]):
            maps = self.encode(batch)
            levels = [project(level) for project, level in zip(model.decoder_input_proj, maps, strict=False)]
            levels += [project(maps[-1]) for project in model.decoder_input_proj[len(maps) :]]
        width, strides = batch.images.shape[-1], self.spec.strides
        found = [level.shape[-1] for level in levels]
        if found != [-(-width // stride) for stride in strides]:
            raise KDError(
                f"the maps of {type(self.model).__name__} are {found} cells wide for {width} px, which does not fit "
                f"strides {strides}: set model.config.feat_strides to the strides of its backbone's maps"
            )
        return tuple(levels)

    def encode(self, batch: Batch) -> Sequence[Tensor]:
        """Run backbone and encoder; returns one map per level."""
        model = self.model.model
        maps = model.backbone(batch.images, pixel_mask(batch))
        projected = [project(x) for project, (x, _) in zip(model.encoder_input_proj, maps, strict=False)]
        encoded: Sequence[Tensor] = model.encoder(projected, return_dict=True).last_hidden_state
        return encoded

    def select(self, memory: Memory, batch: Batch) -> Selection:
        """Select the encoder's best boxes. In train mode noisy versions of the ground truth stand before them."""
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
        """Content, unnormalised references, mask and facts of the library's denoising queries, if there are any."""
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
        """Run one layer. It samples the memory around the boxes, and no gradient flows into these."""
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
        """Refine boxes by the head of layer `i`: it gives offsets from the boxes that entered it."""
        offsets = self.model.model.decoder.bbox_embed[i](hidden)
        boxes = (offsets + self.modeling.inverse_sigmoid(progress.boxes.detach())).sigmoid()
        return Progress(hidden, boxes)

    def classify(self, i: int, progress: Progress) -> Tensor:
        """Compute class logits (N, Q, K) by the head of layer `i`, from the progress after it."""
        logits: Tensor = self.model.model.decoder.class_embed[i](progress.hidden)
        return logits

    def predict(self, i: int, progress: Progress, priors: Priors, batch: Batch) -> Predictions:
        """Predict by the heads of layer `i`, from the progress after it."""
        return self.predictions(self.classify(i, progress), progress.boxes, priors, batch)

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """Compute the library's weighted terms: for each layer (`aux`), and for denoising (`dn`)."""
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
        """Each layer's outputs, for the library's loss, by the names of its arguments."""
        after = progress[1:]
        return {
            "outputs_class": [self.classify(i, at) for i, at in enumerate(after)],
            "outputs_coord": [at.boxes for at in after],
        }

    def matcher(self) -> Any:
        """Build the library's matcher with the costs of the config."""
        return _matcher(self.model.config)


class RTDetrV2Adapter(RTDetrAdapter):
    """Adapter of RTDetrV2ForObjectDetection: as RT-DETR, with a different way to sample the memory."""

    kind: ClassVar[type[nn.Module]] = RTDetrV2ForObjectDetection
    family: ClassVar[str] = "RT-DETR v2"
    modeling: ClassVar[Any] = modeling_rt_detr_v2


def tiny_rt_detr(kind: Any, num_classes: int, **changes: Any) -> nn.Module:
    """Build a narrow and shallow RT-DETR or a relative of it. `changes` are fields of the config."""
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
    model: nn.Module = kind(kind.config_class(**{**settings, **changes}))
    return model
