"""How many images a second the loader gives, and how many a step takes: python benchmarks/speed/loader.py [SUITE ...].

The first table has the changes that `Augmentation` knows, one at a time, on pictures of three sizes. The second has the
suites: what the loader gives with the suite's images and augmentation, and what the student's own steps take. They are
the fastest steps of a suite. All numbers are of one thread and in CPU time. `--no-suites` leaves the second table out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch

from kdtoolkit.benchmark.suite import DetectorSection
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.data import Augmentation, DetectionDataset, LoadedBatch, ProceduralShapes, batches
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.train import train
from kdtoolkit.models import build_model

CHANGES = {
    "nothing": Augmentation(flip=0),
    "flip": Augmentation(flip=0.5),
    "colour 0.2": Augmentation(flip=0, colour=0.2),
    "photometric 0.5": Augmentation(flip=0, photometric=0.5),
    "photometric 1": Augmentation(flip=0, photometric=1),
    "zoom 0.67 to 1.5": Augmentation(flip=0, zoom=(0.67, 1.5)),
    "mosaic 1": Augmentation(flip=0, mosaic=1),
    "mixup 1": Augmentation(flip=0, mixup=1),
}
SIZES = (64, 96, 256)
BATCH = 8
WARM_UP, STEPS = 5, 30


def rate(images: DetectionDataset, augment: Augmentation, seconds: float) -> float:
    """Images a second of the loader: the median of three rounds."""
    found = []
    for seed in range(3):
        read = _batches(images, augment, seed)
        next(read)
        begun, count = time.process_time(), 0
        while time.process_time() - begun < seconds:
            count += len(next(read).images)
        found.append(count / (time.process_time() - begun))
    return statistics.median(found)


def _batches(images: DetectionDataset, augment: Augmentation, seed: int) -> Iterator[LoadedBatch]:
    return batches(images, batch_size=BATCH, steps=10**6, seed=seed, augment=augment)


def step_rate(section: DetectorSection, images: DetectionDataset) -> float:
    """Images a second of a detector's training, with the loader."""
    assert section.train is not None
    torch.manual_seed(0)
    distiller = Distiller(None, build_model(section.model, len(images.class_names), section.args))
    for steps in (WARM_UP, STEPS):
        config = section.train.model_copy(update={"steps": steps, "warmup_steps": 0, "lr": 1e-4})
        result = train(distiller, images, config, seed=0)
    assert result.cpu_seconds is not None
    return STEPS * config.batch_size / result.cpu_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=["quick", "photos", "standard", "plenty"])
    parser.add_argument("--no-suites", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round")
    args = parser.parse_args()
    torch.set_num_threads(1)

    pictures = {size: ProceduralShapes(64, image_size=size) for size in SIZES}
    print("| images a second of " + " | ".join(f"{size} px" for size in SIZES) + " |")
    print("|---|" + "--:|" * len(SIZES))
    for name, augment in CHANGES.items():
        rates = (rate(pictures[size], augment, args.seconds) for size in SIZES)
        print(f"| {name} | " + " | ".join(f"{each:,.0f}" for each in rates) + " |", flush=True)
    if args.no_suites:
        return
    print("\n| suite | px | loader, images/s | plain steps, images/s | ratio |\n|---|--:|--:|--:|--:|")
    for name in args.suites:
        suite = load_suite(name)
        size = suite.data.image_size
        assert size is not None
        assert suite.student.train is not None
        images = ProceduralShapes(64, image_size=size)
        given = rate(images, suite.student.train.augmentation, args.seconds)
        taken = step_rate(suite.student, images)
        print(f"| `{name}` | {size} | {given:,.0f} | {taken:,.0f} | {given / taken:.0f} x |", flush=True)


if __name__ == "__main__":
    main()
