"""Tiny models of timm that show features alone, by name and as a file of weights."""

import torch
from safetensors.torch import save_file

from kdtoolkit.build import build_model

TINY_VIT = "depth=2&embed_dim=32&num_heads=2"
DINOV2 = f"timm/vit_small_patch14_reg4_dinov2.lvd142m?{TINY_VIT}"
DINOV3 = f"timm/vit_small_patch16_dinov3.lvd1689m?{TINY_VIT}"
CONVNEXT = "timm/convnext_tiny.dinov3_lvd1689m?depths=[1, 1, 1, 1]&dims=[8, 16, 24, 32]"


def foundation(name=DINOV3, seed=0):
    torch.manual_seed(seed)
    return build_model(name, 1)


def write_weights(path, name=DINOV3, **more):
    """A file with the state dict of such a model, and perhaps further tensors."""
    save_file({key: value.contiguous() for key, value in foundation(name).state_dict().items()} | more, path)
    return path
