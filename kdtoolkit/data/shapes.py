"""The embedded data set: small pictures of shapes, drawn by seed without download. Good and bad detectors differ on it.

Classes differ in fine detail (a ring and a ring with a gap); objects overlap, are covered by bars, differ in size,
colour and texture, and lie among lines, specks and crosses that are no objects.
"""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from kdtoolkit.data.dataset import DetectionDataset, Sample, digest
from kdtoolkit.errors import KDError
from kdtoolkit.files import write_beside

VERSION = 1  # raise it with any change of what is drawn
CLASS_NAMES = ("disc", "square", "triangle", "star", "ring", "gapped ring")
MIN_VISIBLE = 0.35  # of an object's area; what is hidden more is not labelled
SUPERSAMPLING = 2  # all is drawn larger by this and averaged

Point = tuple[float, float]
Colour = tuple[int, int, int]


class ProceduralShapes(DetectionDataset):
    """`count` square pictures with shapes of six classes.

    At 96 px a picture has 1 to 6 objects of 10 to 24 px radius. Larger pictures have more objects, whose radius is from
    10 px to a quarter of the side. Picture i depends on seed and size, not on the count. Pictures are drawn when the
    first one is asked for. If there is a `folder`, they are drawn once into a file there, which all processes map.

    Raises KDError if an argument is out of range, or the folder cannot be written.
    """

    def __init__(self, count: int, *, image_size: int = 96, seed: int = 0, folder: Path | None = None) -> None:
        if count < 1:
            raise KDError(f"ProceduralShapes: count must be at least 1, not {count}")
        if image_size < 32:
            raise KDError(f"ProceduralShapes: image_size must be at least 32 px, not {image_size}")
        if seed < 0:
            raise KDError(f"ProceduralShapes: seed must not be negative, as {seed} is")
        self.class_names = CLASS_NAMES
        self._count = count
        self._size = image_size
        self._seed = seed
        self._folder = folder

    def __str__(self) -> str:
        return "procedural shapes"

    def __len__(self) -> int:
        """Number of pictures."""
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Sample]:
        """Picture (3, H, W) uint8 and its objects."""
        return self._pictures["images"][index], self._samples[index]

    @property
    def drawn(self) -> Path | None:
        """The file with the pictures, which is there once the first one was asked for; None without a folder."""
        return None if self._folder is None else self._folder / f"shapes-{self.fingerprint()}.safetensors"

    @functools.cached_property
    def _pictures(self) -> dict[str, Tensor]:
        """`images` (N, 3, S, S) uint8; `boxes` (G, 4) and `labels` (G,) of all pictures; `counts` (N,) of each."""
        path = self.drawn
        if path is None or self._folder is None:
            return self._drawn()
        with suppress(FileNotFoundError, SafetensorError):  # a damaged file is written again
            return load_file(path)
        pictures = self._drawn()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_beside(path, save(pictures))
        except OSError as error:
            raise KDError(f"cannot write the drawn pictures to {path}: {error}") from error
        return load_file(path)

    def _drawn(self) -> dict[str, Tensor]:
        images = torch.empty((self._count, 3, self._size, self._size), dtype=torch.uint8)
        objects = []
        for index in range(self._count):
            scene = _Scene(self._size, np.random.default_rng([self._seed, index]))
            images[index] = torch.from_numpy(scene.pixels()).permute(2, 0, 1)
            objects.append(scene.objects())
        return {
            "images": images,
            "boxes": torch.cat([boxes for boxes, _ in objects]),
            "labels": torch.cat([labels for _, labels in objects]),
            "counts": torch.tensor([len(labels) for _, labels in objects]),
        }

    @functools.cached_property
    def _samples(self) -> list[Sample]:
        counts = self._pictures["counts"].tolist()
        objects = zip(*(torch.split(self._pictures[name], counts) for name in ("boxes", "labels")), strict=True)
        return [
            {"boxes": boxes, "labels": labels, "image_id": index, "original_size": (self._size, self._size)}
            for index, (boxes, labels) in enumerate(objects, start=1)
        ]

    def coco(self) -> dict[str, Any]:
        """Ground truth in COCO's format; category ids count from 1."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for sample in self._samples:
            height, width = sample["original_size"]
            image_id = sample["image_id"]
            images.append({"id": image_id, "file_name": f"{image_id:06}.png", "width": width, "height": height})
            for (x1, y1, x2, y2), label in zip(sample["boxes"].tolist(), sample["labels"].tolist(), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(self.class_names)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def fingerprint(self) -> str:
        """Digest of the arguments and of the version of the drawing."""
        return digest("procedural shapes", VERSION, self._count, self._size, self._seed)


class _Scene:
    """One picture while it is drawn, back to front. `owner` says which object each drawn pixel shows, 0 for none."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.size = size
        self.side = size * SUPERSAMPLING
        self.boxes: list[tuple[float, ...]] = []
        self.labels: list[int] = []
        self.areas: list[int] = []
        self.ground = self.colour()
        self.canvas = Image.new("RGB", (self.side, self.side), self.ground)
        self.canvas.paste(self.shade(self.ground), (0, 0), self.texture((self.side, self.side)))
        self.owner = Image.new("L", (self.side, self.side))
        self.compose()

    def compose(self) -> None:
        unit = self.size / 96
        for _ in range(self.integer(3, round(8 * unit) + 3)):
            self.draw_speck()
        largest = self.size / 4
        smallest = min(10.0, self.size / 8)
        placed: list[tuple[float, float, float]] = []
        for _ in range(self.integer(1, max(2, round(6 * unit)))):
            radius = smallest * (largest / smallest) ** self.rng.random()
            for _ in range(8):  # tries to find a place that is not taken
                x, y = (self.uniform(0.6 * radius, self.size - 0.6 * radius) for _ in range(2))
                if all(math.hypot(x - px, y - py) > 0.85 * (radius + pr) for px, py, pr in placed):
                    placed.append((x, y, radius))
                    self.draw_object(x, y, radius)
                    break
        if self.rng.random() < 0.3:
            self.draw_cross(self.uniform(smallest, largest) / 1.5)
        for x, y, radius in placed:
            if self.rng.random() < 0.2:
                self.draw_bar(x, y, radius)

    def draw_object(self, x: float, y: float, radius: float) -> None:
        label = self.integer(0, len(CLASS_NAMES) - 1)
        ratio = self.uniform(0.85, 1.18)
        mask, left, top = self.outline(label, x, y, radius * ratio, radius / ratio)
        self.areas.append(mask.histogram()[255])
        self.labels.append(label)
        extent = mask.getbbox()
        assert extent is not None  # every shape covers some pixels
        x1, y1, x2, y2 = extent
        self.boxes.append(tuple(v / SUPERSAMPLING for v in (x1 + left, y1 + top, x2 + left, y2 + top)))
        self.fill(mask, left, top, self.colour_apart(), len(self.labels))

    def outline(self, label: int, x: float, y: float, width: float, height: float) -> tuple[Image.Image, int, int]:
        """A shape of a class as a mask, and where the mask's corner lies in drawn pixels."""
        width, height = width * SUPERSAMPLING, height * SUPERSAMPLING
        reach = math.ceil(max(width, height)) + 1
        turn = self.uniform(0, 2 * math.pi)
        mask = Image.new("L", (2 * reach, 2 * reach))
        draw = ImageDraw.Draw(mask)

        def polygon(angles_and_radii: list[Point], value: int) -> None:
            points = [
                (reach + width * r * math.cos(turn + a), reach + height * r * math.sin(turn + a))
                for a, r in angles_and_radii
            ]
            draw.polygon(points, fill=value)

        name = CLASS_NAMES[label]
        if name in ("square", "triangle"):
            polygon(_regular(4 if name == "square" else 3, 1), 255)
        elif name == "star":
            inner = self.uniform(0.4, 0.55)
            polygon([(math.pi * i / 5, 1 if i % 2 else inner) for i in range(10)], 255)
        else:
            polygon(_regular(40, 1), 255)
        if name in ("ring", "gapped ring"):
            polygon(_regular(40, self.uniform(0.45, 0.65)), 0)
        if name == "gapped ring":
            gap = self.uniform(0.25, 0.5)  # half its angle
            polygon([(0, 0), (-gap, 1.5), (gap, 1.5)], 0)
        return mask, round(x * SUPERSAMPLING) - reach, round(y * SUPERSAMPLING) - reach

    def fill(self, mask: Image.Image, left: int, top: int, colour: Colour, owner: int) -> None:
        """Paint a mask in a colour with texture; `owner` is the object it shows, 0 for none."""
        self.canvas.paste(colour, (left, top), mask)
        if self.rng.random() < 0.4:
            self.canvas.paste(self.shade(colour), (left, top), ImageChops.multiply(mask, self.texture(mask.size)))
        self.owner.paste(owner, (left, top), mask)

    def draw_speck(self) -> None:
        """Draw a line, or a blot that is smaller than any object."""
        draw = ImageDraw.Draw(self.canvas)
        x, y, dx, dy = (self.uniform(-0.1, 1.1) * self.side for _ in range(4))
        colour = self.colour()
        if self.rng.random() < 0.6:
            draw.line((x, y, (x + dx) / 2, (y + dy) / 2), fill=colour, width=self.integer(1, 3 * SUPERSAMPLING))
        else:
            width, height = (self.uniform(1, 4) * SUPERSAMPLING for _ in range(2))
            draw.ellipse((x - width, y - height, x + width, y + height), fill=colour)

    def draw_cross(self, radius: float) -> None:
        """Draw a cross: as large as an object, but none."""
        arm = self.uniform(0.15, 0.3)
        x, y = (self.uniform(0, self.size) for _ in range(2))
        mask, left, top = self.strip(x, y, radius, arm * radius, self.uniform(0, math.pi))
        other, *_ = self.strip(x, y, arm * radius, radius, self.uniform(0, math.pi))
        self.fill(ImageChops.lighter(mask, other), left, top, self.colour_apart(), 0)

    def draw_bar(self, x: float, y: float, radius: float) -> None:
        """Draw a bar that covers a part of an object."""
        x, y = (v + self.uniform(-0.8, 0.8) * radius for v in (x, y))
        width = self.uniform(0.15, 0.45) * radius
        mask, left, top = self.strip(x, y, 2 * radius, width, self.uniform(0, math.pi))
        self.fill(mask, left, top, self.colour(), 0)

    def strip(self, x: float, y: float, length: float, width: float, turn: float) -> tuple[Image.Image, int, int]:
        """A rectangle as `outline` gives it. Length and width are measured from its middle."""
        reach = math.ceil(math.hypot(length, width) * SUPERSAMPLING) + 1
        along = (length * SUPERSAMPLING * math.cos(turn), length * SUPERSAMPLING * math.sin(turn))
        across = (-width * SUPERSAMPLING * math.sin(turn), width * SUPERSAMPLING * math.cos(turn))
        corners = [
            (reach + i * along[0] + j * across[0], reach + i * along[1] + j * across[1])
            for i, j in ((-1, -1), (-1, 1), (1, 1), (1, -1))
        ]
        mask = Image.new("L", (2 * reach, 2 * reach))
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        return mask, round(x * SUPERSAMPLING) - reach, round(y * SUPERSAMPLING) - reach

    def colour(self) -> Colour:
        r, g, b = self.rng.integers(0, 256, 3).tolist()
        return r, g, b

    def colour_apart(self) -> Colour:
        """A colour that can be told from the ground."""
        return max(
            (self.colour() for _ in range(2)),
            key=lambda c: sum(abs(p - q) for p, q in zip(c, self.ground, strict=True)),
        )

    def shade(self, colour: Colour) -> Colour:
        """A colour not far from this one."""
        r, g, b = (min(max(v + d, 0), 255) for v, d in zip(colour, self.rng.integers(-70, 71, 3).tolist(), strict=True))
        return r, g, b

    def texture(self, size: tuple[int, int]) -> Image.Image:
        """A mask of some pattern, at most twice as large as the picture."""
        bank = _textures(self.side)
        left, top = (self.integer(0, 2 * self.side - length) for length in size)
        return bank[self.integer(0, len(bank) - 1)].crop((left, top, left + size[0], top + size[1]))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + int((high - low + 1) * self.rng.random())

    def pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The finished picture (H, W, 3): averaged, with noise."""
        picture = np.asarray(self.canvas.reduce(SUPERSAMPLING)).astype(np.int16)
        strength = self.integer(2, 14)
        noise = self.rng.integers(0, 256, picture.shape, dtype=np.uint8).astype(np.int16)
        picture += ((noise - 128) * strength) >> 7
        return picture.clip(0, 255).astype(np.uint8)

    def objects(self) -> tuple[Tensor, Tensor]:
        """Boxes (G, 4) float32 and labels (G,) of the objects that are visible enough."""
        visible = self.owner.histogram()
        keep = [i for i, area in enumerate(self.areas) if visible[i + 1] >= MIN_VISIBLE * area]
        boxes = torch.tensor([self.boxes[i] for i in keep], dtype=torch.float32).reshape(-1, 4)
        return boxes.clamp(0, self.size), torch.tensor([self.labels[i] for i in keep], dtype=torch.int64)


def _regular(corners: int, radius: float) -> list[Point]:
    return [(2 * math.pi * i / corners, radius) for i in range(corners)]


@functools.cache
def _textures(side: int) -> list[Image.Image]:
    """Masks (2 side, 2 side): stripes, checks and clouds; the same in every process."""
    y, x = np.mgrid[: 2 * side, : 2 * side].astype(np.float32)
    stripes = [
        np.sin(2 * math.pi / length * (x * math.cos(turn) + y * math.sin(turn)))
        for length in (7, 12, 20)
        for turn in np.linspace(0, math.pi, 4, endpoint=False).tolist()
    ]
    checks = [stripes[i] * stripes[i + 2] for i in range(4, 8)]
    tiles = [Image.fromarray((127.5 + 127.5 * pattern).astype(np.uint8)) for pattern in stripes + checks]
    rng = np.random.default_rng(0)
    for cell in (4, 8, 16, 32):
        cells = -(-2 * side // cell)
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        tiles.append(coarse.resize((2 * side, 2 * side), Image.Resampling.BICUBIC))
    return tiles
