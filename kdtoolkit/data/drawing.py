"""Draws boxes with their names on pictures, so that one can read them."""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 640  # pixels; the names would hide the objects of a smaller picture

GAP = (25, 25, 35)  # the colour between dashes

FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")

Area = tuple[float, float, float, float]  # left, top, right, bottom
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_boxes(
    picture: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    captions: Sequence[str],
    *,
    dashes: Sequence[int] | None = None,
    least_side: int = LEAST_SIDE,
) -> Image.Image:
    """A copy of an RGB picture with boxes, each with its caption on a bright ground.

    Pictures whose longest side is below `least_side` are enlarged. Where captions would cover each other, they move to
    a different edge of their box.

    Args:
        picture: the picture. It stays as it is.
        boxes: xyxy in pixels of `picture`. Later ones cover earlier ones.
        labels: boxes of equal labels have the same colour.
        captions: the text of each box; an empty one draws none.
        dashes: the length of a box's dashes in pixels, as long as the dark gaps between them; 0 for a solid line. None
            draws all lines solid.
        least_side: in pixels.
    """
    factor = max(1, round(least_side / max(picture.size)))
    drawn = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(drawn)
    longest = max(drawn.size)
    font, captions = _readable(captions, max(12, longest // 60))
    width = max(3, longest // 400)
    places = [[factor * side for side in box] for box in boxes]
    for box, label, dash in zip(places, labels, dashes or [0] * len(places), strict=True):
        _frame(draw, box, colour(label), width, dash)
    taken: list[Area] = []
    # The last box is the topmost, so its caption chooses first.
    named = [(box, label, caption) for box, label, caption in zip(places, labels, captions, strict=True) if caption]
    chosen = [_place(draw, font, box, caption, drawn.size, taken) for box, _, caption in reversed(named)]
    for area, (_, label, caption) in zip(reversed(chosen), named, strict=True):
        draw.rectangle(area, fill=colour(label))
        draw.text((area[0] + 2, area[1] + 1), caption, "black", font, anchor="lt")
    return drawn


def _frame(draw: ImageDraw.ImageDraw, box: Sequence[float], ink: tuple[int, int, int], width: int, dash: int) -> None:
    x1, y1, x2, y2 = box
    right, bottom = max(x2 - 1, x1), max(y2 - 1, y1)
    if not dash:
        draw.rectangle((x1, y1, right, bottom), outline=ink, width=width)
        return
    draw.rectangle((x1, y1, right, bottom), outline=GAP, width=width)  # else dashes fade on a bright ground
    thick = width - 1
    for x in np.arange(x1, right, 2 * dash):
        for y in (y1, bottom - thick):
            draw.rectangle((x, y, min(x + dash - 1, right), y + thick), fill=ink)
    for y in np.arange(y1, bottom, 2 * dash):
        for x in (x1, right - thick):
            draw.rectangle((x, y, x + thick, min(y + dash - 1, bottom)), fill=ink)


def colour(label: int) -> tuple[int, int, int]:
    """A bright colour, different for neighbouring labels."""
    r, g, b = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.6, 1)
    return round(255 * r), round(255 * g), round(255 * b)


def _readable(captions: Sequence[str], size: int) -> tuple[Font, list[str]]:
    """A font of a size in pixels, and the captions in letters that it has.

    Pillow's own font has ASCII alone. For other letters a font of the system is used. If there is none, letters lose
    their accents, and those that still are not ASCII become question marks.
    """
    if not all(caption.isascii() for caption in captions):
        for name in FONTS:
            with suppress(OSError):
                return ImageFont.truetype(name, size), list(captions)
    plain = (
        "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)) for text in captions
    )
    return ImageFont.load_default(size), [text.encode("ascii", "replace").decode() for text in plain]


def _place(
    draw: ImageDraw.ImageDraw,
    font: Font,
    box: Sequence[float],
    caption: str,
    size: tuple[int, int],
    taken: list[Area],
) -> Area:
    """Where a caption goes: above, below or inside its box. `taken` has the areas of captions, and gets this one."""
    left, top, right, bottom = draw.textbbox((0, 0), caption, font, anchor="lt")
    width, height = right - left + 4, bottom - top + 4
    x1, y1, x2, y2 = box
    corners = [(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2), (x1, y1), (x1, y2 - height)]
    areas = [_inside(x, y, width, height, size) for x, y in corners]
    best = min(areas, key=lambda area: sum(_common(area, other) for other in taken))
    taken.append(best)
    return best


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> Area:
    """The area of a caption, shifted into the picture of `size` (width, height)."""
    x, y = max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height))
    return x, y, x + width, y + height


def _common(a: Area, b: Area) -> float:
    """How many pixels two areas share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
