"""Files that different processes use at the same time."""

from kdtoolkit.files import bytes_in


def test_a_file_that_is_gone_by_now_or_half_written_takes_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "whole").write_bytes(b"12345")
    (tmp_path / "whole").write_bytes(b"123")
    (tmp_path / "a" / ".half.1.partial").write_bytes(b"12")
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nothing")  # it has a name, and no size can be read
    assert bytes_in(tmp_path) == 8
