"""Reading and writing weights without holding a model in memory.

External data is read with `pread`, never through a memory map: the pages of a map stay in the
resident set until the kernel wants them back, and a memory budget would be broken by them.
"""

import contextlib
import errno
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import InternalError, ModelError, UsageError
from qcompiler.ir.dataflow import all_graphs
from qcompiler.quant.packing import pack
from qcompiler.quant.qtype import QType

Array = npt.NDArray[Any]

_SPILL_BYTES = 1 << 20
_ALIGNMENT = 4096
_BAND_BYTES = 1 << 20
_SHORT_PIECE_BYTES = 4096
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def nbytes_of(shape: Sequence[int], dtype: ir.DataType) -> int:
    """Return the bytes a tensor takes in a file; 4- and 2-bit elements are packed densely."""
    return math.ceil(math.prod(shape) * dtype.bitwidth / 8)


def constant_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers, bodies included; a shared one counts once."""
    tensors = [
        value.const_value for graph in all_graphs(model) for value in graph.initializers.values()
    ]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def read_all(tensor: ir.TensorProtocol) -> Array:
    """Return a whole tensor as an array of its shape.

    Elements of 4 or 2 bits come back unpacked, one `ml_dtypes` element each.

    Raises:
        ModelError: External data cannot be read, or is shorter than it was when it was loaded.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tensor.shape.numpy()
    if tensor.dtype.bitwidth >= 8:
        flat = _read_external(tensor, outer=1, stride=tensor.nbytes, start=0, size=tensor.nbytes)
        return flat.view(_file_dtype(tensor.dtype)).reshape(shape)
    packed = _read_external(tensor, outer=1, stride=tensor.nbytes, start=0, size=tensor.nbytes)
    return ir.PackedTensor(packed, tensor.dtype, shape=shape).numpy()


def read_slice(
    tensor: ir.TensorProtocol,
    axis: int,
    start: int,
    stop: int,
    buffer: npt.NDArray[np.uint8] | None = None,
) -> Array:
    """Return `tensor[..., start:stop, ...]` along one axis.

    A tensor in memory gives a view; of external data, exactly the bytes needed are read
    (for short rows, bands of whole rows of about 1 MiB).

    Args:
        tensor: The tensor; element types below 8 bits are read whole and sliced.
        axis: The axis, not negative.
        start: First index, `0 <= start <= stop`.
        stop: One past the last index, at most the axis's size.
        buffer: Where external data goes if it fits, to be used again for the next slice: fresh
            memory costs more than the reading does.

    Raises:
        InternalError: The slice lies outside the tensor.
        ModelError: External data cannot be read.
    """
    shape = tensor.shape.numpy()
    if not (0 <= axis < len(shape) and 0 <= start <= stop <= shape[axis]):
        message = f"slice {start}:{stop} of axis {axis} is outside shape {list(shape)}"
        raise InternalError(message, where=tensor.name)
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        index = (slice(None),) * axis + (slice(start, stop),)
        return read_all(tensor)[index]
    dtype = _file_dtype(tensor.dtype)
    inner = math.prod(shape[axis + 1 :]) * dtype.itemsize
    data = _read_external(
        tensor,
        outer=math.prod(shape[:axis]),
        stride=shape[axis] * inner,
        start=start * inner,
        size=(stop - start) * inner,
        buffer=buffer,
    )
    return data.view(dtype).reshape(*shape[:axis], stop - start, *shape[axis + 1 :])


def reinterpret(
    tensor: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.TensorProtocol:
    """Return the same bytes as a tensor of another type, shape and name.

    External data stays where it is, unread.

    Args:
        tensor: The tensor.
        dtype: Element type of the result; of at least 8 bits for a tensor in memory.
        shape: Shape of the result, which takes as many bytes.
        name: Name of the result.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            nbytes_of(shape, dtype),
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
    values = np.frombuffer(tensor.tobytes(), dtype=_file_dtype(dtype)).reshape(tuple(shape))
    return ir.Tensor(values, dtype=dtype, name=name)


def _file_dtype(dtype: ir.DataType) -> np.dtype[Any]:
    """Return the element type as it lies in a file: ONNX data is little-endian."""
    return np.dtype(dtype.numpy()).newbyteorder("<")


def _read_external(
    tensor: ir.ExternalTensor,
    *,
    outer: int,
    stride: int,
    start: int,
    size: int,
    buffer: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Read `size` bytes from byte `start` of each of `outer` rows that lie `stride` apart."""
    if buffer is not None and buffer.size >= outer * size:
        result = buffer[: outer * size].reshape(outer, size)
    else:
        result = np.empty((outer, size), dtype=np.uint8)
    if result.size == 0:
        return result.reshape(-1)
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _read_rows(descriptor, result, (tensor.offset or 0) + start, stride)
        finally:
            os.close(descriptor)
    except (OSError, EOFError) as error:
        message = f"external data of {tensor.name!r} cannot be read: {error}"
        hint = "keep the model's data files unchanged while it is compiled"
        raise ModelError(message, where=tensor.path, hint=hint, reason="external-data") from error
    return result.reshape(-1)


def _read_rows(descriptor: int, rows: npt.NDArray[np.uint8], offset: int, stride: int) -> None:
    outer, size = rows.shape
    if outer == 1 or size == stride:
        _read_into(descriptor, rows.reshape(-1), offset)
        return
    if size >= _SHORT_PIECE_BYTES:
        for row in range(outer):
            _read_into(descriptor, rows[row], offset + row * stride)
        return
    # A system call per short piece costs more than the bytes between the pieces do.
    per_band = max(1, _BAND_BYTES // stride)
    band = np.empty(per_band * stride, dtype=np.uint8)
    for first in range(0, outer, per_band):
        count = min(per_band, outer - first)
        # The last row ends with its piece: what follows may lie beyond the file's end.
        needed = (count - 1) * stride + size
        _read_into(descriptor, band[:needed], offset + first * stride)
        for row in range(count):
            rows[first + row] = band[row * stride : row * stride + size]


def _read_into(descriptor: int, buffer: npt.NDArray[np.uint8], offset: int) -> None:
    view = memoryview(buffer.data)
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            message = f"the file ends {len(view)} bytes early"
            raise EOFError(message)
        view = view[count:]
        offset += count


class WeightStore:
    """Where tensors made by a pass live until the model is saved.

    Small tensors stay in memory; larger ones go to one scratch file and are referred to as
    external tensors of it, so that the store must outlive the saving of the model. The methods
    may be called from several threads. The scratch file appears with the first large tensor
    and is removed when the context ends, also when it ends in an exception.

    Attributes:
        directory: Folder of the scratch file; it exists, with room for the compressed weights.
        spill_bytes: Tensors of at least this many bytes go to disk.
    """

    def __init__(self, directory: Path, spill_bytes: int = _SPILL_BYTES) -> None:
        self.directory = directory
        self.spill_bytes = spill_bytes
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._path = Path()
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the scratch file; tensors that lie in it cannot be read any more."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
                self._path.unlink(missing_ok=True)
                self._end = 0

    def put(self, name: str, values: Array, dtype: QType | ir.DataType) -> ir.TensorProtocol:
        """Keep a tensor.

        Args:
            name: Name of the tensor.
            values: Its elements; codes of 4- and 2-bit types come one per int8 or uint8.
            dtype: Element type in the model; a QType stands for its storage type.

        Raises:
            UsageError: The disk is full, or the folder cannot be written.
        """
        element = data_type(dtype)
        writer = self.open_tensor(name, element, values.shape)
        if values.ndim == 0:
            values = values.reshape(1)
        writer.write_slice(0, 0, values)
        return writer.finish()

    def open_tensor(
        self, name: str, dtype: QType | ir.DataType, shape: Sequence[int]
    ) -> "TensorWriter":
        """Start a tensor that is written in slices.

        Raises:
            UsageError: The disk is full, or the folder cannot be written.
        """
        return TensorWriter(self, name, data_type(dtype), tuple(shape))

    def reserve(self, nbytes: int) -> int:
        """Set a range of the scratch file aside and return its offset."""
        with self._lock, disk_errors(self.directory):
            if self._descriptor is None:
                descriptor, path = tempfile.mkstemp(".weights", ".qcompile-", self.directory)
                self._descriptor, self._path = descriptor, Path(path)
            offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
            self._end = offset + nbytes
            return offset

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write bytes into a reserved range."""
        if self._descriptor is None:
            message = "the weight store is closed"
            raise InternalError(message, where=str(self.directory))
        with disk_errors(self.directory):
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                data = data[count:]
                offset += count

    def external(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int
    ) -> ir.ExternalTensor:
        """Return a tensor that lies in the scratch file."""
        return ir.ExternalTensor(
            self._path.name,
            offset,
            nbytes_of(shape, dtype),
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.directory.absolute(),
        )


class TensorWriter:
    """Writes one tensor of a `WeightStore`, slice by slice, in any order."""

    def __init__(
        self, store: WeightStore, name: str, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> None:
        self._store = store
        self._name = name
        self._dtype = dtype
        self._shape = shape
        self._nbytes = nbytes_of(shape, dtype)
        self._missing = math.prod(shape)
        self._offset: int | None = None
        self._buffer: npt.NDArray[np.uint8] | None = None
        if self._nbytes >= store.spill_bytes and self._nbytes > 0:
            self._offset = store.reserve(self._nbytes)
        else:
            self._buffer = np.zeros(self._nbytes, dtype=np.uint8)

    def write_slice(self, axis: int, start: int, values: Array) -> None:
        """Write `tensor[..., start : start + n, ...]`, where n is the size of `values` on `axis`.

        Slices must not overlap; each element is written once.

        Args:
            axis: The axis that slices are cut along.
            start: First index on it.
            values: The elements, of the tensor's shape but for `axis`; codes of 4- and 2-bit
                types come one per int8 or uint8, and each row of a slice starts and ends on a
                byte.

        Raises:
            InternalError: Shape or boundaries do not fit.
            UsageError: The disk is full.
        """
        shape = self._shape or (1,)
        count = values.shape[axis]
        if (
            values.shape != (*shape[:axis], count, *shape[axis + 1 :])
            or start + count > shape[axis]
        ):
            message = f"{list(values.shape)} at {start} of axis {axis} is no slice of {list(shape)}"
            raise InternalError(message, where=self._name)
        if values.size == 0:
            return
        bits = math.prod(shape[axis + 1 :]) * self._dtype.bitwidth
        outer = 1 if count == shape[axis] else math.prod(shape[:axis])
        self._check_bytes(start * bits, count * bits, shape[axis] * bits, outer)
        data = self._bytes_of(np.ascontiguousarray(values).reshape(-1))
        self._write_rows(data.reshape(outer, -1), start * bits // 8, shape[axis] * bits // 8)
        self._missing -= values.size

    def finish(self) -> ir.TensorProtocol:
        """Return the tensor.

        Raises:
            InternalError: Part of it was never written, or was written twice.
        """
        if self._missing:
            message = f"{self._missing} elements too few were written"
            raise InternalError(message, where=self._name)
        if self._offset is not None:
            return self._store.external(self._name, self._dtype, self._shape, self._offset)
        assert self._buffer is not None
        if self._dtype.bitwidth < 8:
            return ir.PackedTensor(self._buffer, self._dtype, shape=self._shape, name=self._name)
        values = self._buffer.view(_file_dtype(self._dtype)).reshape(self._shape)
        return ir.Tensor(values, dtype=self._dtype, name=self._name)

    def _check_bytes(self, start: int, size: int, stride: int, outer: int) -> None:
        """Refuse rows (start, size and distance in bits) that share a byte with their neighbour."""
        ends_tensor = outer == 1 and start + size >= stride
        if start % 8 or (size % 8 and not ends_tensor) or (outer > 1 and stride % 8):
            message = f"a slice of {self._dtype} must start and end on a byte in every row"
            raise InternalError(message, where=self._name)

    def _bytes_of(self, values: Array) -> npt.NDArray[np.uint8]:
        """Return flat values as they lie in a file."""
        if self._dtype.bitwidth < 8:
            return pack(values, self._dtype.bitwidth)
        dtype = _file_dtype(self._dtype)
        if values.dtype.itemsize != dtype.itemsize:
            message = f"values of type {values.dtype} cannot be stored as {self._dtype}"
            raise InternalError(message, where=self._name)
        data: npt.NDArray[np.uint8] = values.astype(dtype, copy=False).view(np.uint8)
        return data

    def _write_rows(self, rows: npt.NDArray[np.uint8], start: int, stride: int) -> None:
        size = rows.shape[1]
        if size == stride:
            rows = rows.reshape(1, -1)
            size = rows.shape[1]
        for row, data in enumerate(rows):
            first = row * stride + start
            if self._buffer is not None:
                self._buffer[first : first + size] = data
            else:
                assert self._offset is not None
                self._store.write_at(self._offset + first, data.data)


def data_type(dtype: QType | ir.DataType) -> ir.DataType:
    """Return the ONNX element type that stores codes of a QType, or the type itself."""
    return ir.DataType[dtype.onnx_name] if isinstance(dtype, QType) else dtype


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn faults of writing below `folder` into a UsageError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            message, hint = "no room left for the output", "free disk space or name another folder"
        else:
            message = f"cannot be written: {error.strerror or error}"
            hint = "name a folder you may write to"
        raise UsageError(message, where=str(folder), hint=hint) from error
