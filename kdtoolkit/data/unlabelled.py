"""Images without labels, from any folder: a data set whose images have no boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kdtoolkit.data.image_files import image_files
from kdtoolkit.data.photos import MEMORY_BYTES, PhotoDataset
from kdtoolkit.data.records import Photo, Progress, Reading, agreed_size, naming


class UnlabelledImages(PhotoDataset):
    """Photos without labels and without classes, made by `open_images`, which explains the arguments."""

    def _has_no_box(self) -> bool:
        """Always False: no box is expected."""
        return False


def open_images(
    folder: str | Path,
    *,
    max_size: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    memory_bytes: int = MEMORY_BYTES,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> UnlabelledImages:
    """Open all images in a folder and its subfolders, without labels. They are read and checked as in `open_dataset`.

    Args:
        folder: any folder with images, or a single image file.
        max_size: images with a longer side are scaled down to it, antialiased. No image is enlarged.
        on_bad: `skip` leaves images that cannot be read out, and lists them in one warning.
        memory_bytes: `in_memory` keeps the decoded images in memory if they take at most this.
        cache: a folder. `in_memory` keeps the decoded images there instead, for all processes and later runs.
        progress: called with the number of images checked so far and the number of all images.

    Raises KDError that lists the first faults and their number, or says that there is no image.
    """
    folder = Path(folder)
    files = image_files(folder)
    root = folder if folder.is_dir() else folder.parent
    reading = Reading(folder, root, [])
    for done, path in enumerate(files, 1):
        name = path.relative_to(root).as_posix()
        title = f"image {name}"
        with reading.noting(path, "image"), naming(title):
            reading.photos.append(Photo(done, name, title, path, *agreed_size(path, None, ""), ()))
        if progress is not None:
            progress(done, len(files))
    return UnlabelledImages(reading, max_size=max_size, on_bad=on_bad, memory_bytes=memory_bytes, cache=cache)
