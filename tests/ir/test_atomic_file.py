"""A file appears complete or not at all."""

from pathlib import Path

import pytest

from qcompiler.ir.atomic_file import AtomicFile


def test_a_committed_file_replaces_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")
    with AtomicFile(target) as file:
        file.stream().write(b"new")
        assert file.stream() is file.stream()
        assert target.read_bytes() == b"old"
        file.commit()
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")
    with AtomicFile(target) as file:
        file.stream().write(b"half")
        assert len(list(tmp_path.iterdir())) == 2
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_is_left_by_an_exception(tmp_path: Path) -> None:
    def interrupted() -> None:
        with AtomicFile(tmp_path / "f") as file:
            file.stream().write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_unused_file_is_never_made(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "missing" / "f"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_stays(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.mkdir()
    with AtomicFile(target) as file:
        file.stream().write(b"new")
        with pytest.raises(IsADirectoryError):
            file.commit()
    assert list(tmp_path.iterdir()) == [target]
