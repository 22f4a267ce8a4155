"""Images of any folder, without labels."""

import logging

import pytest
from PIL import Image

from kdtoolkit import KDError
from kdtoolkit.data import Augmentation, batches, open_images


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("b.png", "deep/er/a.jpg", "deep/c.JPEG", ".hidden/d.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80 + i, 60), (10 * i, 0, 0)).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_all_images_below_a_folder_are_read_without_labels(folder):
    images = open_images(folder)
    assert len(images) == 3
    items = [images[i] for i in range(3)]
    assert [image.shape[-1] for image, _ in items] == [80, 82, 81]  # b, deep/c, deep/er/a
    assert all(len(sample["boxes"]) == 0 for _, sample in items)
    assert images.class_names == ()
    assert len(images.subset(2, seed=0)) == 2
    found = next(batches(images, batch_size=3, steps=1, seed=0, augment=Augmentation(mosaic=1.0)))
    assert [len(target["boxes"]) for target in found.targets] == [0, 0, 0]


def test_images_are_scaled_down_and_kept_as_those_of_data_sets(folder, tmp_path):
    images = open_images(folder, max_size=40, cache=tmp_path / "kept")
    kept = images.in_memory()
    assert all(max(kept[i][0].shape) == 40 for i in range(3))
    assert kept.fingerprint() == open_images(folder, max_size=40).fingerprint() != open_images(folder).fingerprint()


def test_a_broken_image_is_told_or_skipped(folder, caplog):
    (folder / "deep/broken.png").write_bytes(b"no picture")
    with pytest.raises(KDError, match=r"1 fault:\n  image deep/broken.png: the file cannot be decoded"):
        open_images(folder)
    with caplog.at_level(logging.WARNING):
        assert len(open_images(folder, on_bad="skip")) == 3
    assert "deep/broken.png" in caplog.text


@pytest.mark.parametrize(("name", "says"), [("none", "there is no file or folder"), ("deep/er", "has no images")])
def test_a_folder_without_images_is_an_error(folder, name, says):
    (folder / "deep/er/a.jpg").unlink()
    with pytest.raises(KDError, match=says):
        open_images(folder / name)
