"""Keeps arrays of many calls, in files where memory does not hold them."""

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.ir.weights import disk_errors

Array = npt.NDArray[Any]


class Shelf(AbstractContextManager["Shelf"]):
    """Arrays by name and call: in memory as long as they fit, the others in files.

    Args:
        folder: Where the folder of these files goes.
        room: Bytes that arrays may take in memory.
    """

    def __init__(self, folder: Path, room: int) -> None:
        self._room = room
        self._held: dict[tuple[str, int], Array] = {}
        self._files: dict[tuple[str, int], Path] = {}
        with disk_errors(folder):
            self._folder = tempfile.TemporaryDirectory(prefix=".qcompile-", dir=folder)

    def __exit__(self, *exception: object) -> None:
        self._held.clear()
        self._folder.cleanup()

    def put(self, name: str, call: int, values: Array) -> None:
        """Keep an array.

        Raises:
            UsageError: The disk is full.
        """
        if values.dtype.hasobject or values.nbytes <= self._room:
            self._room -= values.nbytes
            self._held[name, call] = values
            return
        path = Path(self._folder.name) / f"{len(self._files)}.npy"
        with disk_errors(path.parent):
            np.save(path, values, allow_pickle=False)
        self._files[name, call] = path

    def get(self, name: str, call: int) -> Array:
        """Return an array that was kept."""
        if (name, call) in self._held:
            return self._held[name, call]
        found: Array = np.load(self._files[name, call], allow_pickle=False)
        return found

    def drop(self, name: str, calls: int) -> None:
        """Forget the arrays of a name."""
        for call in range(calls):
            held = self._held.pop((name, call), None)
            if held is not None:
                self._room += held.nbytes
            elif (name, call) in self._files:
                # The name of the file stays taken.
                self._files[name, call].unlink(missing_ok=True)
