"""Image files in a folder, without any annotations."""

from __future__ import annotations

from pathlib import Path

from kdtoolkit.data.records import ENDINGS, telling_what_is_unreadable
from kdtoolkit.errors import KDError
from kdtoolkit.files import walk_visible


@telling_what_is_unreadable()
def image_files(path: Path, without: Path | None = None) -> list[Path]:
    """The image files in a folder and its subfolders, in the order of their paths; or the one file that `path` is.

    Links to folders are followed. Files and folders whose names begin with a dot are left out, and the subfolder
    `without`. Raises KDError if there is no image.
    """
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise KDError(f"{path} is no image by its name; images end in {', '.join(ENDINGS)}")
        return [path]
    if not path.is_dir():
        raise KDError(f"there is no file or folder {path}; name an image, or a folder of images")
    left_out = None if without is None else without.resolve()
    found = list(walk_visible(path, lambda below: below.resolve() != left_out))
    images = sorted(file for file in found if file.suffix.lower() in ENDINGS)
    if not images:
        held = f"it holds {len(found)} files of different kinds" if found else "it is empty"
        raise KDError(f"{path} has no images: {held}. Images end in {', '.join(ENDINGS)}")
    return images
