"""Export a trained detector as an ONNX file, and run that with onnxruntime alone.

    python examples/export_onnx.py --model runs/distill-birds --data birds --photo photo.jpg

The export compares the file's detections with PyTorch's on images of the data set. It needs kdtoolkit[onnx].
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import kdtoolkit


def detect(file: Path, photo: Path, score: float) -> None:
    """Print the detections on a photo. Nothing of kdtoolkit is used here."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about.get("class_names", "{}"))
    height, width = json.loads(about["image_size"])
    picture = Image.open(photo).convert("RGB")
    factor = min(height / picture.height, width / picture.width, 1)
    canvas = Image.new("RGB", (width, height), (114, 114, 114))
    canvas.paste(picture.resize((round(picture.width * factor), round(picture.height * factor))), (0, 0))
    pixels = np.asarray(canvas, np.float32).transpose(2, 0, 1)[None] / 255
    boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"images": pixels})
    for box, value, label in zip(boxes[0] / factor, scores[0], labels[0], strict=True):
        if value >= score:
            print(names[label] if names else label, f"{value:.2f}", box.round(1).tolist())


def main() -> None:
    """Export, then detect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained detector, as kd train writes it")
    parser.add_argument("--data", type=Path, required=True, help="images for the comparison")
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    parser.add_argument("--score", type=float, default=0.3)
    given = parser.parse_args()
    done = kdtoolkit.export(given.model, data=given.data, out=given.out)
    detect(done.file, given.photo, given.score)


if __name__ == "__main__":
    main()
