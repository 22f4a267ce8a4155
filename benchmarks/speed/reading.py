"""How fast photos are read: 40 of 12 megapixels, shrunk to 256 px, as each process of a benchmark does.

python benchmarks/speed/reading.py
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from kdtoolkit.data import Augmentation, batches, open_dataset
from kdtoolkit.data.pictures import decode

COUNT, SIZE, MAX_SIZE = 40, (4000, 3000), 256


def write(root: Path) -> None:
    """A data set of photos that hardly compress less than real ones: blurred noise."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i in range(COUNT):
        noise = np.random.default_rng(i).integers(0, 256, (SIZE[1] // 4, SIZE[0] // 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(SIZE).save(root / "images" / f"{i}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": SIZE[0], "height": SIZE[1]})
        annotations.append({"image_id": i, "category_id": 1, "bbox": [100, 100, 900, 900]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "noise"}]}
    (root / "annotations" / "train.json").write_text(json.dumps(document))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write(root)
        megabytes = sum(path.stat().st_size for path in (root / "images").iterdir()) / 1e6
        print(f"{COUNT} photos of {SIZE[0]}x{SIZE[1]}, {megabytes:.0f} MB, shrunk to {MAX_SIZE} px; seconds:")

        def timed(what: str, cache: Path | None) -> None:
            start = time.perf_counter()
            open_dataset(root, "train", max_size=MAX_SIZE, cache=cache).in_memory()
            print(f"| {what} | {time.perf_counter() - start:.2f} |", flush=True)

        start = time.perf_counter()
        for path in (root / "images").iterdir():
            decode(path, (SIZE[1], SIZE[0]))
        print(f"| decoded in full, by one thread | {time.perf_counter() - start:.2f} |", flush=True)
        timed("decoded at reduced scale, into memory", None)
        timed("the same into the cache: the first process", Path(folder) / "cache")
        timed("from the cache: each further process", Path(folder) / "cache")
        data = open_dataset(root, "train", max_size=MAX_SIZE, cache=Path(folder) / "cache")
        steps = 200
        start = time.perf_counter()
        for _ in batches(data, batch_size=8, steps=steps, seed=0, augment=Augmentation()):
            pass
        print(f"| loader from the cache: images/s | {8 * steps / (time.perf_counter() - start):.0f} |")


if __name__ == "__main__":
    main()
