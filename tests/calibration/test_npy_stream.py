"""Reading .npy data piece by piece, and refusing what lies about its size."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.calibration.npy_stream import (
    UNREADABLE,
    Cut,
    decode_npy,
    peak_bytes,
    read_header,
    read_pieces,
    require_size,
)

A = np.arange(24, dtype=np.float32).reshape(6, 2, 2)


def _npy(array: npt.NDArray[Any], *, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


def _pieces(array: npt.NDArray[Any], cut: Cut) -> list[npt.NDArray[Any]]:
    data = _npy(array)
    stream = io.BytesIO(data)
    return list(read_pieces(stream, read_header(stream, len(data)), cut))


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize(
    "array",
    [A, np.asfortranarray(A), A[:, 0], A[:0], np.float64(3), np.array(["a", "long"]), A > 3],
    ids=["C", "Fortran", "strided", "empty", "scalar", "text", "bool"],
)
def test_arrays_come_back(array: Any, version: tuple[int, int]) -> None:
    found = decode_npy(_npy(np.asanyarray(array), version=version))
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.asanyarray(array).dtype


@given(
    rows=st.integers(1, 7),
    size=st.integers(1, 8),
    axis=st.integers(0, 2),
    fortran=st.booleans(),
)
def test_pieces_put_together_are_the_array(rows: int, size: int, axis: int, fortran: bool) -> None:
    shape = [2, 3, 2]
    shape[axis] = rows
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    cut = Cut(axis, size)
    found = _pieces(np.asfortranarray(array) if fortran else array, cut)
    assert len(found) == cut.calls(array.shape)
    assert found[0].shape == cut.piece(array.shape)
    np.testing.assert_array_equal(np.concatenate(found, axis), array)


def test_a_dropped_axis_is_gone() -> None:
    cut = Cut(0, 1, drop=True)
    assert cut.piece(A.shape) == (2, 2)
    for array in (A, np.asfortranarray(A)):
        found = _pieces(array, cut)
        assert len(found) == 6
        np.testing.assert_array_equal(found[5], A[5])


def test_a_piece_is_read_only_when_it_is_asked_for() -> None:
    data = _npy(A)
    stream = io.BytesIO(data)
    header = read_header(stream, len(data))
    start = stream.tell()
    pieces = read_pieces(stream, header, Cut(0, 2))
    next(pieces)
    assert stream.tell() == start + A[:2].nbytes


def test_memory_is_that_of_a_piece_where_pieces_lie_together() -> None:
    for array, cut, expected in (
        (A, Cut(0, 2), A[:2].nbytes),
        (A, Cut(), A.nbytes),
        (A, Cut(1, 1), A.nbytes),
        (np.asfortranarray(A), Cut(0, 2), A.nbytes),
    ):
        data = _npy(array)
        assert peak_bytes(read_header(io.BytesIO(data), len(data)), cut) == expected


def _lying_header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117)
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text + b"\n" + bytes(16)


@pytest.mark.parametrize(
    "shape", ["(1000000000000,)", "(2,)", "(-4,)", "(-2, -2)", f"({1 << 70},)"]
)
def test_what_a_header_declares_must_be_there(shape: str) -> None:
    with pytest.raises(ValueError, match="which is not what the file holds"):
        decode_npy(_lying_header(shape))
    assert decode_npy(_lying_header("(4,)")).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("damage", [b"\xb0", b"(", b"'", b"\x00"])
def test_a_header_that_is_no_python_text_is_refused(damage: bytes) -> None:
    data = bytearray(_lying_header("(4,)"))
    data[40:41] = damage
    with pytest.raises(UNREADABLE):
        decode_npy(bytes(data))


def test_pickled_objects_are_refused() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        decode_npy(stream.getvalue())


@pytest.mark.parametrize("dtype", ["V2", "S3", "M8[s]", [("a", "f4")]])
def test_elements_that_no_model_takes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="which no model takes"):
        decode_npy(_npy(np.zeros(2, dtype)))


@pytest.mark.parametrize("data", [b"", b"no", b"\x93NUMPY\x09\x00", _npy(A)[:-1], _npy(A) + b"x"])
def test_damaged_data_raises_what_callers_expect(data: bytes) -> None:
    with pytest.raises(UNREADABLE):
        decode_npy(data)


def test_data_that_ends_early_is_refused() -> None:
    data = _npy(A)
    stream = io.BytesIO(data[:-1])
    header = read_header(stream, len(data))
    with pytest.raises(ValueError, match="ends before its last element"):
        list(read_pieces(stream, header, Cut(0, 1)))


def test_the_limit_is_named() -> None:
    require_size(10, 10)
    with pytest.raises(ValueError, match=r"needs 11 bytes in memory at once, more than .* 10"):
        require_size(11, 10)
