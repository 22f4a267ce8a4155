import pytest

from kdtoolkit import KDError
from kdtoolkit.data.image_files import image_files


def test_images_are_found_in_the_order_of_their_paths(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", "notes.txt", ".hidden.png", ".cache/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [str(file.relative_to(tmp_path)) for file in image_files(tmp_path)] == ["a.png", "b.JPG", "sub/c.webp"]
    assert [file.name for file in image_files(tmp_path, without=tmp_path / "sub")] == ["a.png", "b.JPG"]
    assert image_files(tmp_path / "a.png") == [tmp_path / "a.png"]


def test_images_of_linked_folders_are_found(tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "a.png").touch()
    (tmp_path / "photos").mkdir()
    for name in ("link", ".hidden"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "away")
    assert image_files(tmp_path / "photos") == [tmp_path / "photos" / "link" / "a.png"]
    with pytest.raises(KDError, match="has no images: it is empty"):
        image_files(tmp_path / "photos", without=tmp_path / "away")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("none", "there is no file or folder .*none; name an image"),
        ("empty", "has no images: it is empty"),
        ("texts", "has no images: it holds 1 files of different kinds. Images end in .avif"),
        ("texts/a.txt", "a.txt is no image by its name"),
    ],
)
def test_what_is_no_image_is_told(tmp_path, name, part):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    with pytest.raises(KDError, match=part):
        image_files(tmp_path / name)
