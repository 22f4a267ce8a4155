"""Parcels: the same content has the same digest, and is unpacked once."""

import io
import os
import stat
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from kdtoolkit.benchmark.parcels import Parcel, cache_folder, cell_folder, pictures_folder, teacher_cache_folder, unpack
from kdtoolkit.benchmark.store import StoreError
from kdtoolkit.errors import KDError


@pytest.fixture
def files(tmp_path):
    content = {"labels/a.txt": b"a", "images/b.bin": bytes(3000), "c": b""}
    found = {}
    for number, (name, data) in enumerate(content.items()):
        found[name] = tmp_path / f"file{number}"
        found[name].write_bytes(data)
    return found


def test_a_parcel_comes_out_as_it_went_in_whatever_the_size_of_its_pieces(files, tmp_path):
    parcel = Parcel.of(files)
    for size in (1, 1000, 10**6):
        pieces = list(parcel.pieces(size))
        assert all(len(piece) >= size for piece in pieces[:-1])
        folder = unpack(parcel.digest, pieces, tmp_path / str(size))
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == {name: path.read_bytes() for name, path in files.items()}
    assert len(list(parcel.pieces(1))) > len(list(parcel.pieces(10**6))) == 1


def test_the_digest_is_of_names_and_contents_alone(files, tmp_path):
    digest = Parcel.of(files).digest
    moved = tmp_path / "elsewhere"
    moved.write_bytes(files["c"].read_bytes())
    assert Parcel.of({**files, "c": moved}).digest == digest
    assert Parcel.of(dict(reversed(files.items()))).digest == digest
    assert Parcel.of({**files, "d": moved}).digest != digest
    moved.write_bytes(b"changed")
    assert Parcel.of({**files, "c": moved}).digest != digest


def test_a_parcel_is_unpacked_once_even_if_several_want_it_at_the_same_time(files, tmp_path):
    parcel, fetched = Parcel.of(files), []

    def pieces():
        fetched.append(1)
        yield from parcel.pieces()

    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(lambda _: unpack(parcel.digest, pieces(), tmp_path / "cache"), range(4)))
    assert len(folders) == len(fetched) == 1


def test_what_was_cut_off_while_it_was_unpacked_is_unpacked_anew(files, tmp_path):
    parcel = Parcel.of(files)

    def cut():
        yield next(parcel.pieces(1))
        raise LookupError

    with pytest.raises(LookupError):
        unpack(parcel.digest, cut(), tmp_path)
    folder = unpack(parcel.digest, parcel.pieces(), tmp_path)
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"a.txt", "b.bin", "c"}
    assert not list(tmp_path.rglob(".*.partial"))


def test_what_no_cell_has_used_for_a_month_is_deleted_when_a_new_parcel_comes(files, tmp_path):
    cache = tmp_path / "cache"
    old, kept = (Parcel.of({name: files["c"]}) for name in ("old", "kept"))
    for parcel in (old, kept):
        unpack(parcel.digest, parcel.pieces(), cache)
        (pictures_folder(cache, parcel.digest) / "decoded.rgb").write_bytes(b"x")
    for name in ("failed", "running"):
        (cell_folder(cache, name) / "seed0.log").write_text("log")
        (teacher_cache_folder(cache, name) / "ab").mkdir()
    for folder in cache.glob("[!.]*"):
        for each in (folder, *folder.glob("*")):
            os.utime(each, (time.time() - 31 * 86400,) * 2)
    assert unpack(kept.digest, iter(()), cache).is_dir()  # used again
    pictures_folder(cache, kept.digest)
    cell_folder(cache, "running")
    teacher_cache_folder(cache, "running")
    assert (cache / old.digest).is_dir()
    new = Parcel.of(files)
    unpack(new.digest, new.pieces(), cache)
    kinds = cache, cache / "pictures", cache / "cells", cache / "teacher_cache"
    found = {path.name for kind in kinds for path in kind.iterdir()}
    assert {name for name in found if not name.endswith(".lock")} == {
        *(kept.digest, new.digest, "pictures", "cells", "teacher_cache", "running")
    }
    assert (cache / kept.digest / "kept").exists()
    assert (cache / "cells" / "running" / "seed0.log").exists()


def test_a_piece_cannot_write_outside_of_its_folder(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("../../outside", b"")
    folder = unpack("digest", [archive.getvalue()], tmp_path / "cache" / "deep")
    assert not list(tmp_path.glob("outside"))
    assert [path.name for path in folder.rglob("outside")] == ["outside"]


def test_the_cache_is_a_folder_that_only_its_user_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", partial(int, 12345))
    with pytest.raises(KDError, match="belongs to a different user"):
        cache_folder()


def test_files_that_cannot_be_read_or_written_are_named(files, tmp_path):
    with pytest.raises(KDError, match=r"cannot read .*gone"):
        Parcel.of({**files, "gone": tmp_path / "gone"})
    (tmp_path / "no folder").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*no folder"):
        unpack("digest", [], tmp_path / "no folder")
