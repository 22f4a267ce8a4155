"""Files that different processes use at the same time, and the files below a folder."""

from kdtoolkit.files import bytes_in, walk


def test_a_file_that_is_gone_by_now_or_half_written_takes_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "whole").write_bytes(b"12345")
    (tmp_path / "whole").write_bytes(b"123")
    (tmp_path / "a" / ".half.1.partial").write_bytes(b"12")
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nothing")  # it has a name, and no size can be read
    assert bytes_in(tmp_path) == 8


def test_links_to_folders_are_walked_once(tmp_path):
    for name in ("root/b/1", "root/b/c/2", "root/0", "away/deep/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "root" / "a").symlink_to("b")  # a folder that has a name of its own in the tree
    (tmp_path / "root" / "d").symlink_to(tmp_path / "away")
    (tmp_path / "root" / "e").symlink_to(tmp_path / "away" / "deep")  # found before by its own name
    (tmp_path / "root" / "b" / "up").symlink_to("..")
    (tmp_path / "away" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "itself").symlink_to("itself")
    found = [path.relative_to(tmp_path / "root").as_posix() for path in walk(tmp_path / "root")]
    assert found == ["0", "itself", "b/1", "b/c/2", "d/deep/3"]
    assert [path.name for path in walk(tmp_path / "root", lambda below: below.name == "b")] == ["0", "itself", "1"]
    assert list(walk(tmp_path / "none")) == []
