"""Small detectors by name, one of each library, and what they detect."""

import torch

from kdtoolkit.libraries import adapt

_TINY = 'backbone=resnet10t&backbone_args={"channels": [8, 8, 16, 16], "stem_width": 4}'
_BACKBONE = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_RT_DETR = {
    **dict.fromkeys(("d_model", "encoder_hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "decoder_layers"), 2),
    "num_queries": 10,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "backbone_config": _BACKBONE,
}

GFL = f"kdtoolkit/gfl?{_TINY}&neck_channels=16&head_channels=16&head_groups=4&bins=5"
FCOS = f"torchvision/fcos?{_TINY}&out_channels=64&min_size=128&max_size=128"
YOLO = "ultralytics/yolo11n"
RT_DETR = "hf/rt_detr"

NAMES = {GFL: {}, FCOS: {}, YOLO: {}, RT_DETR: _RT_DETR}
"""A name and its arguments for each library."""


def stirred(model, scale=0.05, seed=0):
    """The model with noise on its weights, so that scores differ from place to place, and on its statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.add_(scale * torch.randn(value.shape, generator=generator))
            if name.endswith("bias") and value.min() < -3:  # of class scores, all near 0 in the beginning
                value.add_(4)
        for name, value in model.named_buffers():
            if "running_var" in name:
                value.add_(torch.rand(value.shape, generator=generator))
    return model


@torch.no_grad()
def detect(model, image=None):
    """What the model detects through its adapter: in an image (3, H, W) of uint8, or in a random one of 128 px."""
    adapter = adapt(model)
    adapter.model.eval()
    pixels = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(1)) if image is None else image / 255
    batch = adapter.prepare([pixels])
    return adapter.detections(adapter.head(adapter.features(batch), batch), batch)[0]


def assert_same(found, expected, tolerance=0.0):
    """Check that two detections agree, and that there are some."""
    assert len(expected["scores"])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance)
