import numpy as np
import pytest
from PIL import Image, ImageFont

from kdtoolkit.data.drawing import colour, draw_boxes


def painted(picture, label):
    """(H, W) bool, where a picture has the colour of a label."""
    return (np.asarray(picture).astype(int) == colour(label)).all(-1)


def test_boxes_and_captions_are_drawn_and_the_picture_stays():
    black = Image.new("RGB", (800, 600))
    drawn = draw_boxes(black, [[100, 200, 300, 400]], [2], ["ball 0.91"])
    assert drawn.size == (800, 600)
    assert black.getbbox() is None
    where = painted(drawn, 2)
    assert where[200, 100:300].all()
    assert where[399, 100:300].all()
    assert where[200:400, 100].all()
    assert not where[210:390, 110:290].any()
    caption = where[184:199, 102:150]  # above the box
    assert 0.3 < caption.mean() < 1  # its ground, without the letters


def ground(boxes, label=0):
    """How many pixels a caption colours in a picture of 800 x 600."""
    captions = ["a long name 0.50"] * len(boxes)
    drawn = painted(draw_boxes(Image.new("RGB", (800, 600)), boxes, range(len(boxes)), captions), label)
    frames = painted(draw_boxes(Image.new("RGB", (800, 600)), boxes, range(len(boxes)), [""] * len(boxes)), label)
    return (drawn & ~frames).sum()


WHOLE = ground([[300, 300, 500, 500]])


@pytest.mark.parametrize("box", [[0, 0, 800, 600], [-5, -5, 60, 4], [780, 590, 805, 610]])
def test_captions_stay_in_the_picture(box):
    assert ground([box]) > 0.8 * WHOLE


@pytest.mark.parametrize("label", range(3))
def test_captions_of_boxes_at_one_place_do_not_cover_each_other(label):
    boxes = [[200, 200, 400, 400], [202, 202, 402, 402], [198, 201, 399, 401]]
    assert ground(boxes, label) > 0.8 * WHOLE


def test_names_that_are_not_ascii_are_drawn_without_a_font_of_the_system(monkeypatch):
    open_font = ImageFont.truetype

    def absent(font, *arguments, **options):
        if isinstance(font, str):  # the name of a file, and not Pillow's own font
            raise OSError("cannot open resource")
        return open_font(font, *arguments, **options)

    monkeypatch.setattr(ImageFont, "truetype", absent)

    def drawn(caption):
        return draw_boxes(Image.new("RGB", (800, 600)), [[300, 300, 500, 500]], [0], [caption]).tobytes()

    assert drawn("Vögel 0.50") == drawn("Vogel 0.50")
    assert drawn("鸟 0.50") == drawn("? 0.50")


def test_small_pictures_are_enlarged():
    drawn = draw_boxes(Image.new("RGB", (40, 30)), [[10, 5, 20, 15]], [1], ["ball"])
    assert drawn.size == (640, 480)
    assert painted(drawn, 1)[80, 160:320].all()


def test_dashes_tell_boxes_apart_without_colours():
    black = Image.new("RGB", (800, 600))
    drawn = painted(draw_boxes(black, [[100, 200, 300, 400]], [1], [""], dashes=[10]), 1)
    assert 0.4 < drawn[200, 100:300].mean() < 0.6
    assert 0.4 < drawn[200:400, 299].mean() < 0.6
    assert drawn[200, 100:110].all()
    assert not drawn[203:397, 103:297].any()


def test_dashes_can_be_seen_on_a_bright_ground():
    white = Image.new("RGB", (800, 600), "white")
    line = np.array(draw_boxes(white, [[100, 200, 300, 400]], [1], [""], dashes=[10]))[200, 100:300]
    assert (line.max(-1) < 50).mean() > 0.4  # the gaps


def test_pictures_are_enlarged_to_the_side_that_is_asked_for():
    small = Image.new("RGB", (40, 30))
    assert draw_boxes(small, [], [], [], least_side=80).size == (80, 60)
