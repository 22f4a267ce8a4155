"""Exports detectors of all families to ONNX, and prints the table of docs/export.md.

    python -m benchmarks.export.table [--real] [NAME...]

Detectors have random weights. Where all class scores are alike, their layers are scaled, so that scores spread over
(0, 1) and detections differ from each other, as those of a trained detector do. With --real: real sizes, instead of
tiny examples.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from kdtoolkit.build import build_model
from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.deploy import export
from kdtoolkit.detector import Detector
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families

REAL = {
    "kdtoolkit/gfl?backbone=resnet18": 320,
    "kdtoolkit/atss?backbone=resnet18": 320,
    "kdtoolkit/retinanet?backbone=resnet18": 320,
    "kdtoolkit/fcos?backbone=resnet18": 320,
    "torchvision/fcos_resnet50_fpn?min_size=320&max_size=512": 320,
    "torchvision/retinanet_resnet50_fpn?min_size=320&max_size=512": 320,
    "torchvision/fasterrcnn_resnet50_fpn?min_size=320&max_size=512": 320,
    "torchvision/ssdlite320_mobilenet_v3_large": 320,
    "ultralytics/yolo11n": 640,
    "hf/rt_detr": 320,
    "hf/d_fine": 320,
    "hf/deformable_detr": 320,
}
TINY_SIZE = 256
CLASSES = 3


def score_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that predict class scores or objectness."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("cls_logits", "cls_score") or name == "predictors.cls":
            yield module
        if "classification_head.module_list" in name and isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            yield module
        if ".cv3." in name and isinstance(module, nn.Conv2d) and module.out_channels == CLASSES:
            yield module


@torch.no_grad()
def enliven(model: nn.Module, size: int) -> DetectorAdapter:
    """Scale the class scores of a detector whose scores are all alike."""
    adapter = adapt(model.eval())
    spreads: list[tuple[nn.Module, float, float]] = []

    def look(module: nn.Module, args: object, output: torch.Tensor) -> None:
        spreads.append((module, float(output.std()), float(output.mean())))

    hooks = [layer.register_forward_hook(look) for layer in score_layers(model)]
    batch = adapter.prepare([torch.rand(3, size, size)])
    adapter.head(adapter.features(batch), batch)
    for hook in hooks:
        hook.remove()
    for layer in {id(module): module for module, _, _ in spreads}.values():
        stds = [std for module, std, _ in spreads if module is layer]
        means = [mean for module, _, mean in spreads if module is layer]
        factor = 1.5 / max(1e-6, sum(stds) / len(stds))
        if factor < 3:
            continue
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.sub_(sum(means) / len(means)).mul_(factor).sub_(1.0)
    return adapter


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    names = [argument for argument in arguments if not argument.startswith("--")]
    known = families()
    chosen = REAL if "--real" in arguments else dict.fromkeys(known, TINY_SIZE)
    print("| detector | input | largest difference of scores | of boxes, px | detections compared | unpaired | s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, size in chosen.items():
            if names and not any(part in name for part in names):
                continue
            torch.manual_seed(0)
            model = known[name](CLASSES) if name in known else build_model(name, CLASSES)
            enliven(model, size)
            start = time.perf_counter()
            try:
                done = export(Detector(model, name, ("a", "b", "c")), out=Path(folder, "m.onnx"), image_size=size)
            except KDError as error:
                print(f"| {name} | not exported: {error} | | | | | |", flush=True)
                continue
            check = done.check
            print(
                f"| {name} | {done.free} | {check.score:.1e} | {check.box:.4f} | {check.compared} | {check.missing} "
                f"| {time.perf_counter() - start:.0f} |",
                flush=True,
            )
            for note in done.notes:
                print(f"<!-- {note} -->", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
