"""A gallery: the images on which the rows of a board differ most, with what each row detects on them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from kdtoolkit.benchmark.cell import build_detector
from kdtoolkit.benchmark.cells import Cells
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.detections_file import GroundTruth, detections_path, read_detections, read_ground_truth
from kdtoolkit.benchmark.judging import Judged, judge
from kdtoolkit.benchmark.keys import digest
from kdtoolkit.benchmark.runs import Run
from kdtoolkit.benchmark.score_maps import draw_map, score_map
from kdtoolkit.benchmark.store import CellResult, DamagedError, Store, StoreError, discard, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, TEACHER, Suite
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.dataset import own_ids
from kdtoolkit.data.drawing import draw_boxes
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.engine.matching import Objects
from kdtoolkit.engine.scoring import Floats
from kdtoolkit.errors import KDError
from kdtoolkit.models import is_code
from kdtoolkit.weights import read_weights
from kdtoolkit.words import counted

FORMAT = 2  # of stored galleries; a later version that draws differently has a higher one
SIDE = 560  # pixels, of a picture's longest side
MANY = 12  # boxes; the captions of more would cover the picture
RIGHT, WRONG, MISSED = 2, 0, 1  # labels with the colours green, red and blue
DASHES = {RIGHT: 0, WRONG: 9, MISSED: 3}  # pixels, so that nobody needs to see colours
TRUTH = "ground truth"
_SCORES = "scores: "
_FOREIGN = "the run's ground truth is not known to be that of the images on which it was evaluated"
LEGEND = (
    "Detections with low scores are not shown: each class has its own least score, the one with the best F1. Solid "
    "green boxes are right, dashed red ones are wrong, and dotted blue ones are objects that were missed. A score map "
    "shows the largest class score at each place before detections are chosen. Lighter means higher. "
    f"Pictures with more than {MANY} boxes have no captions."
)


class Panel(BaseModel):
    """One picture.

    `name`: what it shows: "ground truth", a row, or for a score map "scores: ROW". `content`: what is on it, such as
    "3 right, 0 wrong, 1 missed". `mime`: the format of `image`.
    """

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    name: str
    content: str
    image: bytes
    mime: str

    @property
    def alt(self) -> str:
        """The picture in words, for those who cannot see it."""
        return f"{self.name}: {self.content}"

    @property
    def is_map(self) -> bool:
        """Whether it is a score map."""
        return self.name.startswith(_SCORES)


class Item(BaseModel):
    """One image of the data: `title` names it, `alt` says how the rows differ on it, `panels` lie side by side."""

    model_config = ConfigDict(frozen=True)

    title: str
    alt: str
    panels: tuple[Panel, ...]


class Gallery(BaseModel):
    """The images on which the rows differ most. `note`: how they were chosen, and what is missing, in sentences."""

    model_config = ConfigDict(frozen=True)

    items: tuple[Item, ...] = ()
    note: str = ""


def gallery(run: Run, *, count: int = 6) -> Gallery:
    """The `count` images on which the rows of a run differ most, with what each row detects on them.

    It is made from stored detections; score maps are made from stored weights, and left out where there are none. The
    result is kept in the run's folder until the run's results change. A folder that cannot be written keeps none.

    Raises KDError if the ground truth is damaged.
    """
    store, truth = run.store, read_ground_truth(run.store.ground_truth_path)
    if truth is None:
        return Gallery(note="There are no pictures: the run was made by an earlier version, which kept no detections.")
    made_from = [[result.entry, result.seed, result.key, result.date] for result in run.results]
    path = store.root / "gallery" / f"{digest([FORMAT, count, truth.fingerprint, made_from])}.json"
    with suppress(OSError, ValidationError):
        return Gallery.model_validate_json(path.read_bytes())
    found, is_whole = _Making(store, run.suite, run.cells, truth).gallery(count)
    if is_whole:
        with suppress(StoreError):  # a folder that cannot be written can be read
            for old in path.parent.glob("*.json"):
                discard(old)
            write_atomic(path, found.model_dump_json().encode())
    return found


@dataclass(frozen=True)
class _Shown:
    """A row in the pictures: a cell of it, what that gets right and wrong, and mean mistakes on each image (I,)."""

    name: str
    result: CellResult
    judged: Judged
    mistakes: Floats


class _Making:
    def __init__(self, store: Store, suite: Suite, cells: Cells, truth: GroundTruth) -> None:
        self.store = store
        self.suite = suite
        self.cells = cells
        self.fingerprint = truth.fingerprint
        self.truth: dict[str, Any] = truth.truth
        self.objects = Objects.of(self.truth)
        self.names = [category["name"] for category in self.truth["categories"]]
        self.missing: list[str] = []  # what is not in the pictures and why, one sentence each

    def gallery(self, count: int) -> tuple[Gallery, bool]:
        """The gallery, and whether nothing is missing in it."""
        rows = [shown for row in (BASELINE, *self.suite.entries) if (shown := self._row(row, self.cells.rows[row]))]
        if len(rows) < 2:
            sentences = ["There are no pictures yet: they need detections of two rows.", *self.missing]
            return Gallery(note=" ".join(sentences)), False
        try:
            images = load_data(self.suite.data, self.store.pictures).val
        except KDError as error:
            return Gallery(note=f"There are no pictures, since the images cannot be read: {error}"), False
        if images.coco()["images"] != self.truth["images"]:
            return Gallery(note="There are no pictures, since the images have changed after the run."), False
        chosen = self._differing(rows, count)
        teacher = self._row(TEACHER, [self.cells.teacher] if self.cells.teacher else [])
        all_rows = [*([teacher] if teacher else []), *rows]
        pixels = {place: images[place][0] for place in chosen}
        maps = self._score_maps(all_rows, images, pixels)
        with ThreadPoolExecutor() as pool:  # a picture that is encoded holds up no other thread
            items = tuple(pool.map(lambda place: self._item(place, pixels[place], all_rows, rows, maps[place]), chosen))
        return Gallery(items=items, note=" ".join([self._note(rows, chosen), *self.missing])), not self.missing

    def _row(self, name: str, results: Sequence[CellResult]) -> _Shown | None:
        """A row with the detections of all its seeds; None if there are none."""
        judged = {}
        for result in results:
            if result.fingerprints.get("val_data") != self.fingerprint:
                self.missing.append(f"{result.name} is not in the pictures: {_FOREIGN}.")
                continue
            path = self.store.teacher_copy if name == TEACHER else self.store.result_path(name, result.seed)
            try:
                found = read_detections(detections_path(path), result)
            except DamagedError as error:
                self.missing.append(f"{error}.")
                continue
            if found is not None:
                judged[result.seed] = judge(self.truth, self.objects, found)
        if not judged:
            return None
        first = min(judged)
        result = next(result for result in results if result.seed == first)
        return _Shown(name, result, judged[first], np.mean([each.mistakes for each in judged.values()], 0))

    def _differing(self, rows: Sequence[_Shown], count: int) -> list[int]:
        """The images with the largest range of mistakes over the rows."""
        spans = np.ptp(np.stack([row.mistakes for row in rows]), 0)
        return [place for place in np.argsort(-spans, kind="stable")[:count].tolist() if spans[place] > 0]

    def _note(self, rows: Sequence[_Shown], chosen: Sequence[int]) -> str:
        if not chosen:
            return "There are no pictures: the rows make the same number of mistakes on every image."
        baseline, *methods = rows
        fewer = sum(any(row.mistakes[place] < baseline.mistakes[place] for row in methods) for place in chosen)
        return (
            f"Of {counted(len(self.truth['images']), 'image')}, these are the {len(chosen)} on which the rows' "
            "numbers of mistakes (wrong detections and missed objects, mean over seeds) differ most, so differences "
            f"are larger here than elsewhere. On {fewer} of them a method makes fewer mistakes than the "
            f"{baseline.name}. Each row is shown with its lowest seed. {LEGEND}"
        )

    def _item(
        self,
        place: int,
        pixels: Tensor,
        shown: Sequence[_Shown],
        rows: Sequence[_Shown],
        maps: Mapping[str, Floats],
    ) -> Item:
        picture = _picture(pixels)
        entry = self.truth["images"][place]
        scale = picture.width / entry["width"]
        panels = [self._truth(place, picture, scale), *(self._detected(row, place, picture, scale) for row in shown)]
        for name, scores in maps.items():
            highest = f"highest score {scores.max():.2f}"
            panels.append(_panel(_SCORES + name, highest, draw_map(picture, scores)))
        mistakes = ", ".join(f"{row.name} {row.mistakes[place]:.3g}" for row in rows)
        return Item(title=entry["file_name"], alt=f"Mistakes, mean over seeds: {mistakes}", panels=tuple(panels))

    def _truth(self, place: int, picture: Image.Image, scale: float) -> Panel:
        own = np.flatnonzero((self.objects.images == place) & ~self.objects.crowds)
        names = [self.names[label] for label in self.objects.classes[own]]
        drawn = _drawn(picture, _corners(self.objects.boxes[own], scale), [RIGHT] * len(own), names)
        counts = ", ".join(f"{name} ({count})" for name, count in Counter(names).items())
        return _panel(TRUTH, counts or "no objects", drawn)

    def _detected(self, row: _Shown, place: int, picture: Image.Image, scale: float) -> Panel:
        """What a row detects on an image. The best detections are drawn last."""
        judged = row.judged
        own = np.flatnonzero(judged.found.images == place)
        own = own[np.argsort(judged.found.scores[own], kind="stable")]
        missed = np.flatnonzero((self.objects.images == place) & judged.missed)
        marks = [MISSED] * len(missed) + [RIGHT if right else WRONG for right in judged.right[own]]
        names = [self.names[label] for label in [*self.objects.classes[missed], *judged.found.classes[own]]]
        scores = ["missed"] * len(missed) + [f"{score:.2f}" for score in judged.found.scores[own]]
        words = [
            f"wrong: {name} {score}" if mark == WRONG else f"{name} {score}" if mark == RIGHT else f"missed: {name}"
            for mark, name, score in zip(marks, names, scores, strict=True)
        ]
        boxes = np.concatenate([self.objects.boxes[missed], judged.found.boxes[own]])
        drawn = _drawn(picture, _corners(boxes, scale), marks, words)
        counts = Counter(marks)
        content = f"{counts[RIGHT]} right, {counts[WRONG]} wrong, {counts[MISSED]} missed"
        return _panel(row.name, content, drawn)

    def _score_maps(
        self, shown: Iterable[_Shown], images: DetectionDataset, pixels: Mapping[int, Tensor]
    ) -> dict[int, dict[str, Floats]]:
        """For each image the score map of each row. `pixels`: the images by their place."""
        maps: dict[int, dict[str, Floats]] = {place: {} for place in pixels}
        for row in shown:
            try:
                detector = self._detector(row, images)
            except (KDError, OSError, RuntimeError) as error:
                self.missing.append(f"There is no score map of {row.name}: {str(error).splitlines()[0].rstrip('.')}.")
                continue
            for place, image in pixels.items():
                if detector is not None and (scores := score_map(detector, image)) is not None:
                    maps[place][row.name] = scores
        return maps

    def _detector(self, row: _Shown, images: DetectionDataset) -> nn.Module | None:
        """The trained detector of a row; None if it is a file of detections.

        Raises KDError, OSError or RuntimeError if it cannot be opened.
        """
        section = self.suite.teacher if row.name == TEACHER else self.suite.student
        if is_code(section.model):
            raise KDError(f"{section.model} is code of its own, which a report does not run")
        path = self.store.result_path(row.name, row.result.seed)
        weights = (self.store.teacher_path(row.result.key) if row.name == TEACHER else path).with_suffix(".pt")
        if not weights.is_file():
            raise KDError(f"its weights ({weights.name}) are not beside the result")
        args = {name: value for name, value in section.args.items() if name != "pretrained"}  # its own follow
        alone = section.model_copy(update={"args": args})
        detector = build_detector(alone, images.class_names, 0, own_ids(images)).model
        if isinstance(detector, RecordedDetector):
            return None
        detector.load_state_dict(read_weights(weights))
        return detector.eval()


def _picture(pixels: Tensor) -> Image.Image:
    """An image (3, H, W) uint8 whose longest side is `SIDE`."""
    whole = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    size = [max(1, round(side * SIDE / max(whole.size))) for side in whole.size]
    return whole.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _corners(boxes: Floats, scale: float) -> list[list[float]]:
    """Corners in pixels of a scaled picture, from boxes (D, 4) xywh."""
    corners: list[list[float]] = (scale * np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)).tolist()
    return corners


def _drawn(
    picture: Image.Image, boxes: Sequence[Sequence[float]], marks: Sequence[int], words: Sequence[str]
) -> Image.Image:
    """A picture with boxes, and with their captions unless there are many."""
    captions = [""] * len(words) if len(words) > MANY else words
    return draw_boxes(picture, boxes, marks, captions, dashes=[DASHES[mark] for mark in marks], least_side=SIDE)


def _panel(name: str, content: str, picture: Image.Image) -> Panel:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return Panel(name=name, content=content, image=buffer.getvalue(), mime="image/webp")
