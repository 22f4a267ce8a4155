"""The state dict of a native detector with the names that published checkpoints have."""

import re

import torch

_NAMES = (
    (r"neck\.inner_blocks\.(\d)\.0\.(.+)", r"neck.lateral_convs.\1.conv.\2"),
    (r"neck\.layer_blocks\.(\d)\.0\.(.+)", r"neck.fpn_convs.\1.conv.\2"),
    (r"towers\.(\w+)\.(\d)\.0\.(.+)", r"bbox_head.\1_convs.\2.conv.\3"),
    (r"towers\.(\w+)\.(\d)\.1\.(.+)", r"bbox_head.\1_convs.\2.gn.\3"),
)


def published_state(model):
    """The model's weights under published names."""
    found = {}
    predictors = {ours: theirs for theirs, ours in model.published_predictors.items()}
    for key, value in model.state_dict().items():
        if key == "scales":
            found |= {f"bbox_head.scales.{i}.scale": scale for i, scale in enumerate(value)}
        elif match := re.fullmatch(r"neck\.extra_blocks\.convs\.(\d)\.(.+)", key):
            found[f"neck.fpn_convs.{int(match[1]) + 3}.conv.{match[2]}"] = value
        elif match := re.fullmatch(r"predictors\.(\w+)\.(.+)", key):
            found[f"bbox_head.{predictors[match[1]]}.{match[2]}"] = value
        else:
            for ours, theirs in _NAMES:
                key = re.sub(f"^{ours}$", theirs, key)
            found[key] = value
    if model.bins:
        found["bbox_head.integral.project"] = torch.arange(float(model.bins))
    return found
