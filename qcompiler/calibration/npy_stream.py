"""Reading .npy data piece by piece: what is declared is checked before memory is taken for it."""

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

UNREADABLE: Final = (
    *(OSError, EOFError, TypeError, ValueError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, SyntaxError, OverflowError, MemoryError),
)
"""What NumPy and zipfile raise on files that are damaged or something else."""

_HEADER_FAULTS: Final = (SyntaxError, RecursionError, KeyError, AttributeError, MemoryError)
_KINDS = "biufcU"
_CHUNK = 16 << 20
_TOO_LARGE = "needs {} bytes in memory at once, more than the limit of {}"


@dataclass(frozen=True, slots=True)
class Header:
    """What a .npy stream declares of its array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the array's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], size: int) -> Header:
    """Read the header of a .npy stream and leave the stream at the first element.

    Args:
        stream: At the start of the .npy data.
        size: Bytes that the whole .npy data has.

    Raises:
        ValueError, EOFError: Not .npy data, Python objects (pickled), or of another length than
            its header declares.
    """
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        message = f"its .npy version {version[0]}.{version[1]} is for records, not plain arrays"
        raise ValueError(message)
    try:
        shape, fortran_order, dtype = readers[version](stream)
    except (tokenize.TokenError, *_HEADER_FAULTS) as error:  # NumPy parses it as Python text
        message = f"its header is damaged: {error}"
        raise ValueError(message) from error
    header = Header(dtype, tuple(shape), fortran_order)
    if dtype.hasobject:
        message = "it holds Python objects (pickled), which are never loaded"
        raise ValueError(message)
    if dtype.kind not in _KINDS:
        message = f"it holds elements of type {dtype}, which no model takes"
        raise ValueError(message)
    if any(n < 0 for n in shape) or stream.tell() + header.nbytes != size:
        message = f"its header declares {dtype} {list(shape)}, which is not what the file holds"
        raise ValueError(message)
    return header


def decode_npy(data: bytes) -> npt.NDArray[Any]:
    """Return the array of .npy data that is in memory.

    Raises:
        ValueError, EOFError: As `read_header`.
    """
    stream = io.BytesIO(data)
    header = read_header(stream, len(data))
    return _whole(stream, header)


@dataclass(frozen=True, slots=True)
class Cut:
    """How an array is divided into calls.

    Attributes:
        axis: The axis that the calls follow each other on; None gives every call the whole array.
        size: Elements of one call on this axis; the last call may have fewer.
        drop: Whether the axis, of size 1, is dropped: the array has it beside those of the input.
    """

    axis: int | None = None
    size: int = 1
    drop: bool = False

    def calls(self, shape: tuple[int, ...]) -> int | None:
        """Return the number of calls in an array of this shape; None is any number."""
        return None if self.axis is None else -(-shape[self.axis] // self.size)

    def piece(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the first call gets of an array of this shape."""
        if self.axis is None:
            return shape
        if self.drop:
            return shape[: self.axis] + shape[self.axis + 1 :]
        size = min(self.size, shape[self.axis])
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])


def peak_bytes(header: Header, cut: Cut) -> int:
    """Return the most memory that reading in these pieces takes at once."""
    if _streams(header, cut):
        return math.prod(cut.piece(header.shape)) * header.dtype.itemsize
    return header.nbytes


def require_size(nbytes: int, limit: int) -> None:
    """Refuse what is too large.

    Raises:
        ValueError: `nbytes` exceeds the limit.
    """
    if nbytes > limit:
        raise ValueError(_TOO_LARGE.format(nbytes, limit))


def read_pieces(stream: IO[bytes], header: Header, cut: Cut) -> Iterator[npt.NDArray[Any]]:
    """Yield what each call gets, in order; without an axis, the whole array again and again.

    Args:
        stream: At the first element (see `read_header`).
        header: What the stream declares.
        cut: How it is divided.

    Raises:
        ValueError, OSError, zipfile.BadZipFile, zlib.error: The data is damaged.
    """
    if cut.axis is None or not _streams(header, cut):
        yield from _slices(_whole(stream, header), cut)
        return
    left = header.shape[0]
    while left:
        shape = (min(cut.size, left), *header.shape[1:])
        left -= shape[0]
        piece = _read(stream, header.dtype, shape)
        yield piece[0] if cut.drop else piece


def _streams(header: Header, cut: Cut) -> bool:
    return cut.axis == 0 and (not header.fortran_order or len(header.shape) == 1)


def _whole(stream: IO[bytes], header: Header) -> npt.NDArray[Any]:
    if header.fortran_order:
        return np.ascontiguousarray(_read(stream, header.dtype, header.shape[::-1]).transpose())
    return _read(stream, header.dtype, header.shape)


def _slices(array: npt.NDArray[Any], cut: Cut) -> Iterator[npt.NDArray[Any]]:
    while cut.axis is None:
        yield array
    for start in range(0, array.shape[cut.axis], cut.size):
        kept = [slice(None)] * array.ndim
        kept[cut.axis] = slice(start, start + cut.size)
        piece = np.ascontiguousarray(array[tuple(kept)])
        yield piece.squeeze(cut.axis) if cut.drop else piece


def _read(stream: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Read elements in C order."""
    array = np.empty(shape, dtype)
    if not array.size or not dtype.itemsize:
        return array
    target = array.reshape(-1).view(np.uint8).data
    position = 0
    while position < len(target):
        data = stream.read(min(_CHUNK, len(target) - position))
        if not data:
            message = "it ends before its last element"
            raise ValueError(message)
        target[position : position + len(data)] = data
        position += len(data)
    return array
