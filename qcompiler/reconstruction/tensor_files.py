"""Float tensors by name, in files: what is gathered for every weight and read once or twice."""

import shutil
import tempfile
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompiler.ir.weights import disk_errors

Floats = npt.NDArray[np.float32]


class TensorFiles:
    """Keeps float32 tensors in a folder of their own, which goes when the context ends.

    Attributes:
        home: The folder that theirs lies in.
    """

    def __init__(self, folder: Path) -> None:
        """Start empty, in an existing folder."""
        self.home = folder
        self._folder: Path | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._shapes.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def put(self, name: str, values: Floats) -> None:
        """Keep a tensor, in place of an earlier one of that name.

        Raises:
            UsageError: The disk is full, or the folder cannot be written.
        """
        with disk_errors(self.home):
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix=".qcompile-scores-", dir=self.home))
            self._shapes[name] = values.shape
            self._places.setdefault(name, len(self._places))
            np.ascontiguousarray(values, np.float32).tofile(self._path(name))

    def add(self, name: str, values: Floats) -> None:
        """Add to a tensor, or keep it if there is none of that name."""
        self.put(name, values + self.get(name) if name in self else values)

    def get(self, name: str) -> Floats:
        """Return a tensor.

        Raises:
            KeyError: There is none of that name.
        """
        shape = self._shapes[name]
        return np.fromfile(self._path(name), np.float32).reshape(shape)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / str(self._places[name])
