"""What distillation costs at sizes that nobody has measured: a model of time and memory, with few constants.

    python benchmarks/speed/scale.py                       # COCO on 8 H100, from counts: some minutes
    python benchmarks/speed/scale.py --measure             # the model beside measured steps on this machine
    python benchmarks/speed/scale.py --pair gfl-tiny --small

What a step computes is counted, not guessed: floating-point operations of convolutions and matrix products, bytes that
all other operations read and write, and the number of operations. `count` runs a step for that. Each count is a form of
four numbers: one of the step, and one each for pixels, for pixels x classes and for pixels x boxes. Counts at five
small scenes give the forms, and the forms give the counts at any size.

A device then has a rate for each: operations, bytes and calls a second. On a CPU the three are fitted to measured
steps. For GPUs they are published (`DEVICES`). They have not been measured here.

A run is simulated step by step: which images the teacher's cache knows, what the slowest GPU of a step has to do, and
what the disk reads and writes meanwhile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.speed.parts import PAIRS, PLAIN, SETTINGS, TEACHER, Pair, Parts, Scene, observe
from benchmarks.speed.step import ALONE, facts, markdown, sample

GIGA = 1e9
NO_MEMORY = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.detach"}  # they touch no values
METHODS = ("CrossKD", "PKD", "CrossKD+PKD")
COCO_IMAGES, COCO_CLASSES, COCO_BOXES = 118_287, 80, 7
EPOCHS = 12  # 1x
TRAINING_SIZE = (800, 1216)


@dataclass(frozen=True)
class Counts:
    """What a part of a step does once.

    `flops`: of convolutions and matrix products. `bytes`: read and written by all other operations. `calls`: number of
    operations that are no views. `kept`: bytes that a teacher's cache holds of all images of the batch. `peak`: bytes
    of memory above what was there before, where the gradients were. `gradients`: bytes of all gradients.
    """

    flops: float
    bytes: float
    calls: float
    peak: float = 0.0
    kept: float = 0.0
    gradients: float = 0.0

    @property
    def memory(self) -> float:
        """Bytes that a step needs. Of large images all maps, before the first gradient; of small ones all gradients."""
        return max(self.peak, self.gradients)


FIELDS = ("flops", "bytes", "calls", "peak", "kept", "gradients")


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and the bytes that those without counted arithmetic read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and str(func.overloadpacket) not in NO_MEMORY:
            self.calls += 1
            if func.overloadpacket not in flop_registry:
                self.bytes += sum(map(_size, tree_leaves((args, kwargs, found))))
        return found


def _size(x: object) -> int:
    """Bytes of a tensor; an expanded one has no more than its storage."""
    return min(x.nbytes, x.untyped_storage().nbytes()) if isinstance(x, Tensor) else 0


def count(work: Callable[[], object]) -> Counts:
    """Run a part once and count."""
    traffic, flops = _Traffic(), FlopCounterMode(display=False)
    with flops, traffic:
        work()
    return Counts(flops.get_total_flops(), traffic.bytes, traffic.calls)


def terms(scene: Scene) -> list[float]:
    """What counts depend on: nothing, and the batch's megapixels alone, times classes, and times boxes."""
    pixels = scene.images * scene.size[0] * scene.size[1] / 1e6
    return [1.0, pixels, pixels * scene.classes, pixels * scene.boxes]


@dataclass(frozen=True)
class Form:
    """Counts as a function of the scene: coefficients of `terms`, for each field of Counts."""

    coefficients: Mapping[str, tuple[float, ...]]

    @classmethod
    def through(cls, points: Sequence[tuple[Scene, Counts]]) -> Form:
        """The form that fits these counts best, relative to their size."""
        found = {}
        for name in FIELDS:
            values = np.array([getattr(counts, name) for _, counts in points], float)
            weights = 1 / np.maximum(values, 1)
            matrix = np.array([terms(scene) for scene, _ in points]) * weights[:, None]
            found[name] = tuple(np.linalg.lstsq(matrix, values * weights, rcond=None)[0].tolist())
        return cls(found)

    def __call__(self, scene: Scene) -> Counts:
        """The counts at a scene."""
        return Counts(*(max(0.0, float(np.dot(self.coefficients[name], terms(scene)))) for name in FIELDS))


def scenes_to_count() -> list[Scene]:
    """Five scenes in which pixels, classes, boxes and images differ. Their sides fit the coarsest stride."""
    base = Scene((128, 128), images=1, classes=10, boxes=2)
    return [
        base,
        replace(base, size=(256, 256)),
        replace(base, classes=200),
        replace(base, boxes=60),
        replace(base, images=2, classes=100, boxes=20),
    ]


def forms(pair: Pair, settings: str, methods: Sequence[str], scenes: Iterable[Scene]) -> dict[str, Form]:
    """The form of each part and step of a pair in a setting."""
    points: dict[str, list[tuple[Scene, Counts]]] = {}
    for scene in scenes:
        parts = Parts(pair, scene, SETTINGS[settings], methods, torch.device("cpu"))
        for name, work in parts.works.items():
            kept = 0
            if parts.cache is not None:
                if name not in methods:
                    continue
                parts = Parts(pair, scene, SETTINGS[settings], [name], torch.device("cpu"))  # a cache of its own
                work = parts.works[name]
                parts.warm_up(work)
                assert parts.cache is not None
                kept = parts.cache.bytes
            work()  # gradients are there after it
            peak = observe(parts, work).peak_mb * 2**20
            gradients = float(sum(p.grad.nbytes for p in parts.parameters if p.grad is not None))
            parts.reset()
            found = replace(count(work), peak=peak, kept=float(kept), gradients=gradients)
            parts.reset()
            points.setdefault(name, []).append((scene, found))
    return {name: Form.through(each) for name, each in points.items()}


@dataclass(frozen=True)
class Device:
    """Rates a second: floating-point operations, bytes of memory, calls; and bytes from host to device.

    `overlaps`: calls are issued while the device computes, so that the slower of both counts.
    """

    name: str
    flops: float
    bytes: float
    calls: float
    copied: float = np.inf
    overlaps: bool = False

    def seconds(self, counts: Counts) -> float:
        """What a step takes."""
        busy = counts.flops / self.flops + counts.bytes / self.bytes
        issued = counts.calls / self.calls
        return (max(busy, issued) if self.overlaps else busy + issued) + counts.kept / self.copied

    @classmethod
    def fitted(cls, name: str, measured: Sequence[tuple[Counts, float]]) -> Device:
        """The device whose seconds are nearest to measured ones, relative to these."""
        rows = [[x / seconds for x in (c.flops, c.bytes, c.calls)] for c, seconds in measured]
        scale = np.array([1e12, 1e10, 1e4])
        cost = nnls(np.array(rows) / scale, np.ones(len(rows)))[0] / scale
        return cls(name, *(1 / x if x else np.inf for x in cost.tolist()))


# Published: NVIDIA's data sheets of A100 SXM 80 GB and H100 SXM. Dense, without sparsity; bytes of HBM.
A100 = {"bfloat16": 312e12, "tf32": 156e12, "bytes": 2.039e12}
H100 = {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12, "bytes": 3.35e12}
# Published: images a second of ResNet-50 v1.5 training at 224 px on one A100 80 GB, NVIDIA DeepLearningExamples,
# PyTorch container 21.03. It says which share of the peaks a training reaches (`published_share`).
RESNET50 = {"bfloat16": 2470.0, "tf32": 938.0}
CALLS = 1e5  # assumed: operations that one process of eager PyTorch issues a second, forward and backward
COPIED = 25e9  # assumed: bytes a second from pinned host memory, of 64 GB/s that PCIe 5 has in one direction


def resnet50(precision: str) -> Counts:
    """What one further image adds to a step of ResNet-50's training at 224 px: forward and backward, counted."""
    model: nn.Module = timm.create_model("resnet50").train()

    def step(images: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(torch.rand(images, 3, 224, 224))
        nn.functional.cross_entropy(logits.float(), torch.arange(images)).backward()

    fewer, more = (count(partial(step, images)) for images in (2, 3))
    return Counts(more.flops - fewer.flops, more.bytes - fewer.bytes, more.calls - fewer.calls)


def published_share(precision: str) -> float:
    """The share of both of A100's peaks, arithmetic and memory, that ResNet-50's published throughput asks for.

    It is 0.55 in TF32 and 0.91 in bfloat16, in a recipe that fuses batch norm, ReLU and addition.
    """
    image = resnet50(precision)
    return RESNET50[precision] * (image.flops / A100[precision] + image.bytes / A100["bytes"])


def devices() -> dict[str, Device]:
    """H100 in three precisions, at the share of the peaks that A100 reaches in plain TF32.

    TF32 is what PyTorch's convolutions use for float32 tensors unless they are told otherwise.
    """
    share = published_share("tf32")
    return {
        name: Device(f"H100, {name}", share * H100[name], share * H100["bytes"], CALLS, COPIED, overlaps=True)
        for name in ("bfloat16", "tf32", "float32")
    }


@dataclass(frozen=True)
class Training:
    """A training run on several GPUs.

    `batch`: images of one GPU. `views`: how many different pictures an image has (2 if it is flipped at random).
    `live`: seconds of a GPU's step without a cache. With a cache: `warm` if it knows all images, and `miss` more for
    each image that it does not know, since the teacher sees these one by one. `kept`: bytes that the cache has of a
    view. `disk`: bytes a second, of reading and of writing; `room`: bytes that the cache may have.
    """

    images: int
    epochs: int
    gpus: int
    batch: int
    live: float
    warm: float = 0.0
    miss: float = 0.0
    views: int = 2
    kept: float = 0.0
    disk: float = np.inf
    room: float = np.inf
    cached: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a run went: hours; the share of images whose answers were known; bytes on disk; the share spent waiting."""

    hours: float
    known: float
    stored: float
    waiting: float


def simulate(run: Training, seed: int = 0) -> Outcome:
    """Go through a run step by step. Reads and writes go on beside the step; the slower of both counts."""
    rng = np.random.default_rng(seed)
    stored = np.zeros((run.images, run.views), bool)
    together = run.gpus * run.batch
    limit = np.inf if not run.kept else run.room / run.kept
    held = known = shown = 0
    seconds = waited = 0.0
    for _ in range(run.epochs):
        order = rng.permutation(run.images)
        views = rng.integers(run.views, size=run.images)
        for start in range(0, run.images - together + 1, together):
            each, seen = order[start : start + together], views[start : start + together]
            hits = stored[each, seen] & run.cached
            most = run.batch - hits.reshape(run.gpus, run.batch).sum(1).min()
            computed = run.warm + run.miss * most if run.cached else run.live
            fresh = np.flatnonzero(~hits)[: int(min(limit - held, together))] if run.cached else []
            stored[each[fresh], seen[fresh]] = True
            held += len(fresh)
            moved = (hits.sum() + len(fresh)) * run.kept / run.disk
            seconds += max(computed, moved)
            waited += max(0.0, moved - computed)
            known += int(hits.sum())
            shown += together
    return Outcome(seconds / 3600, known / shown, held * run.kept, waited / seconds)


Row = list[str]


def coco(found: Mapping[str, Mapping[str, Form]], cards: Mapping[str, Device], images: int, epochs: int) -> list[Row]:
    """What COCO costs with and without a cache, by methods and precision."""
    rows = [
        [
            "methods, precision",
            "images/s a GPU",
            "hours",
            "hours, cache",
            "cache on disk, TB",
            "read, GB/s",
            "hours, 2 GB/s disk",
            "pays from, GB/s",
        ]
    ]
    for precision, card in cards.items():
        live, warm = found[precision], found[f"{precision} cache"]
        scene = at_scale(8)
        for name in (PLAIN, *(each for each in warm if each not in ALONE)):
            seconds = card.seconds(live[name](scene))
            run = Training(images, epochs, 8, scene.images, seconds, cached=False)
            row = [f"{name}, {precision}", f"{scene.images / seconds:.0f}", f"{simulate(run).hours:.1f}"]
            if name == PLAIN:
                rows.append([*row, *["-"] * 5])
                continue
            counts = warm[name](scene)
            kept, known = counts.kept / scene.images, card.seconds(counts)
            miss = card.seconds(live[TEACHER](replace(scene, images=1)))
            cached = replace(run, warm=known, miss=miss, kept=kept, cached=True)
            free, slow = simulate(cached), simulate(replace(cached, disk=2 * GIGA))
            reading = 8 * scene.images * kept / known
            saved = seconds - known
            pays = 8 * scene.images * kept / seconds if saved > 0 else np.inf
            rows.append(
                [
                    *row,
                    f"{free.hours:.1f}",
                    f"{free.stored / 1e12:.2f}",
                    f"{reading / GIGA:.1f}",
                    f"{slow.hours:.1f}",
                    f"{pays / GIGA:.1f}" if np.isfinite(pays) else "never",
                ]
            )
    return rows


def at_scale(images: int) -> Scene:
    return Scene(TRAINING_SIZE, images, COCO_CLASSES, COCO_BOXES)


def slopes(live: Mapping[str, Form], card: Device, base: Scene, name: str) -> list[Row]:
    """How time and memory of a step grow with each number of the scene."""
    cases: dict[str, Scene] = {"as it is": base}
    cases |= {f"{h} x {w} px": replace(base, size=(h, w)) for h, w in ((320, 320), (640, 640), (1024, 1024))}
    cases |= {f"{k} classes": replace(base, classes=k) for k in (3, 365, 1203)}
    cases |= {f"{g} boxes an image": replace(base, boxes=g) for g in (1, 50, 200)}
    cases |= {f"{n} images": replace(base, images=n) for n in (1, 2, 16)}
    rows = [["scene", f"{name}, ms", "plain step, ms", "KD / plain", "memory, GB", "plain, GB"]]
    for title, scene in cases.items():
        counts, plain = live[name](scene), live[PLAIN](scene)
        ms, plain_ms = (1000 * card.seconds(each) for each in (counts, plain))
        memory = [f"{each.memory / GIGA:.1f}" for each in (counts, plain)]
        rows.append([title, f"{ms:.1f}", f"{plain_ms:.1f}", f"{ms / plain_ms:.2f}", *memory])
    return rows


def gpus(card: Device, live: Form, warm: Form, teacher: Form, images: int, epochs: int) -> list[Row]:
    """Hours by the number of GPUs, and what a cache's disk must read a second."""
    rows = [["GPUs", "hours", "hours, cache", "read, GB/s"]]
    scene = at_scale(8)
    seconds, counts = card.seconds(live(scene)), warm(scene)
    miss = card.seconds(teacher(replace(scene, images=1)))
    for number in (1, 2, 4, 8, 16, 64):
        run = Training(images, epochs, number, scene.images, seconds, cached=False)
        known = card.seconds(counts)
        cached = replace(run, warm=known, miss=miss, kept=counts.kept / scene.images, cached=True)
        reading = number * counts.kept / known
        rows.append(
            [f"{number}", f"{simulate(run).hours:.1f}", f"{simulate(cached).hours:.1f}", f"{reading / GIGA:.1f}"]
        )
    return rows


@dataclass(frozen=True)
class Compared:
    """A measured step beside the model: seconds and bytes."""

    part: str
    scene: Scene
    seconds: float
    peak: float
    fitted: bool


def scenes_to_measure(small: bool) -> Iterator[tuple[Scene, bool]]:
    """Scenes with one number changed at a time, and whether the device's rates are fitted to them."""
    base = Scene((64, 64) if small else (256, 256), images=1, classes=80, boxes=7)
    yield base, True
    for side in (96,) if small else (128, 192, 320, 448, 640):
        yield replace(base, size=(side, side)), side == 128
    for classes in (3, 365, 1203):
        yield replace(base, classes=classes), classes == 365
    for boxes in (1, 50, 200):
        yield replace(base, boxes=boxes), boxes == 200
    yield replace(base, images=2), False


def measured(pair: Pair, settings: str, methods: Sequence[str], small: bool, rounds: int) -> Iterator[Compared]:
    """Measure all parts and steps at all scenes."""
    for scene, fitted in scenes_to_measure(small):
        parts = Parts(pair, scene, SETTINGS[settings], methods, torch.device("cpu"))
        found: dict[str, list[float]] = {name: [] for name in parts.works}
        peaks = {}
        for name, work in parts.works.items():
            parts.reset()
            peaks[name] = observe(parts, work).peak_mb * 2**20
        for _ in range(rounds):
            for name, work in parts.works.items():
                found[name].append(sample(parts, work, torch.get_num_threads())[0] / 1000)
        for name, seconds in found.items():
            yield Compared(name, scene, median(seconds), peaks[name], fitted)


def beside(found: Mapping[str, Form], points: Sequence[Compared], card: Device) -> list[Row]:
    """Measured steps beside the model."""
    rows = [["part", "scene", "measured, ms", "model, ms", "off", "measured, MB", "model, MB", "off"]]
    for point in points:
        counts, scene = found[point.part](point.scene), point.scene
        ms, peak = 1000 * card.seconds(counts), counts.memory / 2**20
        title = f"{scene.size[0]} px, {scene.classes} classes, {scene.boxes} boxes, {scene.images} image(s)"
        rows.append(
            [
                point.part,
                title + (", fitted" if point.fitted else ""),
                f"{1000 * point.seconds:.0f}",
                f"{ms:.0f}",
                f"{ms / 1000 / point.seconds - 1:+.0%}",
                f"{point.peak / 2**20:.0f}",
                f"{peak:.0f}",
                f"{peak * 2**20 / point.peak - 1:+.0%}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="gfl-r50-r101")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument(
        "--precision", nargs="+", choices=("bfloat16", "tf32", "float32"), default=["bfloat16"], help="of the GPUs"
    )
    parser.add_argument("--measure", action="store_true", help="measure on this CPU and compare, in place of GPUs")
    parser.add_argument("--settings", choices=SETTINGS, default="channels-last", help="of --measure")
    parser.add_argument("--rounds", type=int, default=2, help="of --measure")
    parser.add_argument("--small", action="store_true", help="small scenes and a short run, to try the script")
    parser.add_argument("--out", type=Path, help="folder for scale.md and scale.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pair, console = PAIRS[args.pair], Console(width=160)
    scenes = scenes_to_count()
    tables: dict[str, list[Row]] = {}
    stored: dict[str, object] = {}
    if args.measure:
        found = forms(pair, args.settings, args.methods, scenes)
        points = list(measured(pair, args.settings, args.methods, args.small, args.rounds))
        fitted = [(found[each.part](each.scene), each.seconds) for each in points if each.fitted]
        card = Device.fitted("this CPU", fitted)
        told = f"{facts(torch.device('cpu'), args.rounds)}; {args.settings}"
        tables[
            f"{args.pair}: {card.flops / 1e9:.1f} GFLOP/s, {card.bytes / 1e9:.2f} GB/s, {card.calls:.0f} calls/s"
        ] = beside(found, points, card)
        stored = {"device": asdict(card), "measured": [asdict(point) for point in points]}
    else:
        cards = {name: card for name, card in devices().items() if name in args.precision}
        told = "; ".join(
            f"{card.name}: {card.flops / 1e12:.0f} TFLOP/s, {card.bytes / 1e12:.2f} TB/s" for card in cards.values()
        )
        every: dict[str, dict[str, Form]] = {}
        for precision in args.precision:
            setting = "bfloat16" if precision == "bfloat16" else "channels-last"
            every[precision] = forms(pair, setting, args.methods, scenes)
            every[f"{precision} cache"] = forms(pair, f"{setting}-cache", args.methods, scenes)
        images, epochs = (2000, 3) if args.small else (COCO_IMAGES, EPOCHS)
        first, name = args.precision[0], args.methods[-1]
        live, warm = every[first], every[f"{first} cache"]
        heading = f"{args.pair}: {images} images, {epochs} epochs, 8 GPUs with 8 images each"
        tables[heading] = coco(every, cards, images, epochs)
        tables[f"{args.pair}: a step in {first}"] = slopes(live, cards[first], at_scale(8), name)
        tables[f"{args.pair}: {name} in {first}, by GPUs"] = gpus(
            cards[first], live[name], warm[name], live[TEACHER], images, epochs
        )
        stored = {
            "devices": [asdict(card) for card in cards.values()],
            "forms": {key: {part: form.coefficients for part, form in each.items()} for key, each in every.items()},
        }
    text = told + "\n\n" + "\n".join(f"### {title}\n\n{markdown(rows)}" for title, rows in tables.items())
    console.print(text, markup=False, soft_wrap=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scale.md").write_text(text, "utf-8")
        (args.out / "scale.json").write_text(json.dumps({"facts": told, **stored}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
