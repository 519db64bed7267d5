"""Files of a folder, in an order that people expect."""

from pathlib import Path

import pytest

from qcompiler.calibration.folder_files import list_files, natural_key
from qcompiler.errors import UsageError


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    _touch(tmp_path, "s10.npz", "s2.npz", "s1.npz", "a.npz", "S3.NPZ", "other.txt", ".hidden.npz")
    names = [p.name for p in list_files(tmp_path, {".npz"})]
    assert names == ["S3.NPZ", "a.npz", "s1.npz", "s2.npz", "s10.npz"]


def test_names_of_equal_numbers_have_one_order() -> None:
    assert sorted(["1", "01", "001"], key=natural_key) == ["001", "01", "1"]
    assert sorted(["1", "001", "01"], key=natural_key) == ["001", "01", "1"]


def test_folders_inside_are_read_when_asked(tmp_path: Path) -> None:
    _touch(tmp_path, "b/2.png", "b/10.png", "a/1.png", "0.png", ".git/x.png")
    assert [p.name for p in list_files(tmp_path, {".png"})] == ["0.png"]
    found = list_files(tmp_path, {".png"}, recursive=True)
    relative = [str(p.relative_to(tmp_path)) for p in found]
    assert relative == ["0.png", "a/1.png", "b/2.png", "b/10.png"]


def test_links_inside_are_followed_and_links_out_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    _touch(tmp_path, "secret.npz", "data/real.npz")
    (data / "inside.npz").symlink_to("real.npz")
    assert [p.name for p in list_files(data, {".npz"})] == ["inside.npz", "real.npz"]
    (data / "out.npz").symlink_to(tmp_path / "secret.npz")
    with pytest.raises(UsageError, match=r"out\.npz: is a link that leads out of the folder"):
        list_files(data, {".npz"})


def test_a_cycle_of_links_ends(tmp_path: Path) -> None:
    _touch(tmp_path, "a/1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert len(list_files(tmp_path, {".png"}, recursive=True)) == 1


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        list_files(tmp_path / "none", {".npz"})
