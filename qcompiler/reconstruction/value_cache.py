"""Values between blocks, one set per call, in memory or on disk."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from qcompiler.execution.torch.element_types import Array, Value
from qcompiler.ir.weights import disk_errors


@dataclass(frozen=True, slots=True)
class _Spilled:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size


class ValueCache:
    """Keeps tensors of the CPU; those beyond a limit go to files.

    The files lie in a folder of their own, which goes when the context ends.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Start empty.

        Args:
            folder: An existing folder for files.
            limit: Bytes of tensors to hold in memory.
        """
        self._home = folder
        self._limit = limit
        self._folder: Path | None = None
        self._held = 0
        self._values: dict[tuple[int, str], Value | _Spilled] = {}
        self._files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything."""
        self._values.clear()
        self._held = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors in memory."""
        return self._held

    def put(self, call: int, name: str, value: torch.Tensor | Array) -> None:
        """Keep a value of a call, in place of an earlier one of that name.

        Raises:
            UsageError: The disk is full, or the folder cannot be written.
        """
        self.drop(call, name)
        if not isinstance(value, torch.Tensor):
            self._values[call, name] = value  # strings, which only inputs are
            return
        tensor = value.detach().to("cpu").contiguous()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        if self._held + tensor.nbytes <= self._limit:
            self._held += tensor.nbytes
            self._values[call, name] = tensor
            return
        self._values[call, name] = self._spill(tensor)

    def get(self, call: int, name: str) -> torch.Tensor | Array:
        """Return a value; it must not be written to."""
        found = self._values[call, name]
        if isinstance(found, _Spilled):
            data = bytearray(found.path.read_bytes())
            if not data:
                return torch.empty(found.shape, dtype=found.dtype)
            return torch.frombuffer(data, dtype=found.dtype).reshape(found.shape)
        assert found is not None
        assert not isinstance(found, list)
        return found

    def drop(self, call: int, name: str) -> None:
        """Forget a value, if it is there."""
        found = self._values.pop((call, name), None)
        if isinstance(found, torch.Tensor):
            self._held -= found.nbytes
        elif isinstance(found, _Spilled):
            found.path.unlink(missing_ok=True)

    def _spill(self, tensor: torch.Tensor) -> _Spilled:
        with disk_errors(self._home):
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix=".qcompile-values-", dir=self._home))
            path = self._folder / str(self._files)
            self._files += 1
            flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
            path.write_bytes(flat.numpy().tobytes() if tensor.numel() else b"")
        return _Spilled(path, tensor.dtype, tensor.shape)
