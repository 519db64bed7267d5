"""Folders that one process at a time holds; the system lets go of them when it is killed."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path


def lock_folder(folder: Path) -> int | None:
    """Return a descriptor that holds the folder until it is closed; None where another has it.

    Raises:
        OSError: There is no such folder, or it may not be read.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def make_scratch_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder of this process, and return it with the descriptor that holds it.

    Folders of that prefix that no process holds are removed: their makers were killed.

    Raises:
        OSError: The parent cannot be written.
    """
    for left in parent.glob(f"{prefix}*"):
        _remove_unheld(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = lock_folder(folder)
        except FileNotFoundError:
            continue
        # Between making and locking, another process may have taken it for an abandoned one.
        if descriptor is not None and folder.is_dir():
            return folder, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _remove_unheld(folder: Path) -> None:
    try:
        descriptor = lock_folder(folder)
    except OSError:
        return
    if descriptor is None:
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
