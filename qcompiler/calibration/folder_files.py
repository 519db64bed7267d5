"""The files of a folder, in an order that people expect."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from qcompiler.errors import UsageError


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key under which `2.png` comes before `10.png`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    numbered = tuple((1, int(p), "") if "0" <= p[0] <= "9" else (2, 0, p) for p in parts)
    return (*numbered, (0, 0, name))  # 01 and 1 differ, always in the same way


def list_files(folder: Path, suffixes: Collection[str], *, recursive: bool = False) -> list[Path]:
    """Return the files with these suffixes (`.npz`, any case), sorted by path, 2 before 10.

    Hidden files are left out. Links to files are followed inside of the folder only; links to
    folders are not followed.

    Raises:
        UsageError: The folder cannot be read, or a link leads out of it.
    """
    try:
        entries = list(_entries(folder, tuple(suffixes), recursive))
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise UsageError(message, where=str(folder), hint="check the path") from error
    for entry in entries:
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(folder.resolve()):
            message = "is a link that leads out of the folder"
            hint = "copy the file, or name the folder that it is in"
            raise UsageError(message, where=entry.path, hint=hint)
    # \0 is before all that names can hold: a folder's files stay together.
    paths = sorted((e.path for e in entries), key=lambda p: natural_key(p.replace(os.sep, "\0")))
    return [Path(path) for path in paths]


def has_files(folder: Path, suffixes: Collection[str], *, recursive: bool = False) -> bool:
    """Whether `list_files` would find any."""
    return next(_entries(folder, tuple(suffixes), recursive), None) is not None


def _entries(
    folder: Path, suffixes: tuple[str, ...], recursive: bool
) -> Iterator[os.DirEntry[str]]:
    waiting = [os.fspath(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(suffixes):
                    if entry.is_file():
                        yield entry
                elif recursive and entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
