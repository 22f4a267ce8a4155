import numpy as np
import pytest
from PIL import Image

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.data.tools.show import show
from tests.data import _coco


def test_boxes_are_drawn_where_they_are(tmp_path):
    doc = _coco.document()
    doc["images"][0]["file_name"] = doc["images"][0]["file_name"].replace("7", "<b>; 7")
    _coco.write(tmp_path, doc)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "images" / "<b>; 7.png")
    data = open_dataset(tmp_path, "train")
    written = show(data, tmp_path / "shown", count=16, seed=0)
    assert [path.name for path in written] == ["000000__b_7.jpg", "000001_9.jpg"]
    pixels = np.asarray(Image.open(written[0]).convert("L")).astype(int)
    assert pixels.shape == (480, 640)  # 16 times the image
    assert pixels[387, 64:192].min() > 80  # the lower side of the ball's box
    assert pixels[:, 360:].max() < 40
    assert len(show(data, tmp_path / "one", count=1, seed=3)) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    data = open_dataset(_coco.write(tmp_path), "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(KDError, match=r"cannot write pictures to .*file"):
        show(data, tmp_path / "file", count=1, seed=0)
