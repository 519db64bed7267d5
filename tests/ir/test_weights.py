"""Reading and writing parts of tensors."""

import errno
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import InternalError, ModelError, UsageError
from qcompiler.ir.weights import (
    WeightStore,
    constant_bytes,
    nbytes_of,
    read_all,
    read_slice,
    reinterpret,
)
from qcompiler.quant.qtype import INT3, INT8, UINT2
from tests.support.graphs import build

Array = npt.NDArray[Any]

_TYPES: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
    ir.DataType.DOUBLE: np.float64,
    ir.DataType.INT8: np.int8,
    ir.DataType.UINT16: np.uint16,
    ir.DataType.INT64: np.int64,
}


def _values(shape: tuple[int, ...], dtype: ir.DataType) -> Array:
    values = np.random.default_rng(1).integers(0, 100, shape)
    result: Array = values.astype(_TYPES[dtype])
    return result


def _external(
    folder: Path, values: Array, dtype: ir.DataType, offset: int = 0
) -> ir.ExternalTensor:
    (folder / "w.bin").write_bytes(bytes(offset) + values.tobytes())
    shape = ir.Shape(values.shape)
    return ir.ExternalTensor(
        "w.bin", offset, values.nbytes, dtype, shape=shape, name="w", base_dir=folder
    )


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_files_and_of_memory_agree(dtype: ir.DataType, axis: int, tmp_path: Path) -> None:
    values = _values((6, 5, 4), dtype)
    index = (slice(None),) * axis + (slice(1, 3),)
    for tensor in (_external(tmp_path, values, dtype, 24), ir.tensor(values, dtype=dtype)):
        assert read_all(tensor).dtype == values.dtype
        np.testing.assert_array_equal(read_all(tensor), values)
        np.testing.assert_array_equal(read_slice(tensor, axis, 1, 3), values[index])


@pytest.mark.parametrize("columns", [(0, 3000), (100, 101), (17, 2900), (5, 5)])
def test_long_short_and_empty_rows(columns: tuple[int, int], tmp_path: Path) -> None:
    """Rows of 12,000 bytes by themselves, short ones in bands of about 87 rows."""
    values = _values((500, 3000), ir.DataType.FLOAT)
    tensor = _external(tmp_path, values, ir.DataType.FLOAT)
    np.testing.assert_array_equal(read_slice(tensor, 1, *columns), values[:, slice(*columns)])


def test_reading_a_file_maps_nothing(tmp_path: Path) -> None:
    values = _values((64, 64), ir.DataType.FLOAT)
    tensor = _external(tmp_path, values, ir.DataType.FLOAT)
    read_slice(tensor, 1, 3, 5)
    read_all(tensor)
    assert tensor.raw is None


@pytest.mark.parametrize("bounds", [(2, 0, 1), (0, -1, 2), (0, 2, 1), (1, 0, 6)])
def test_a_slice_outside_is_a_defect(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(InternalError, match="outside shape"):
        read_slice(ir.tensor(_values((6, 5), ir.DataType.FLOAT)), *bounds)


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    tensor = _external(tmp_path, _values((8, 8), ir.DataType.FLOAT), ir.DataType.FLOAT)
    os.truncate(tmp_path / "w.bin", 100)
    with pytest.raises(ModelError, match=r"'w' cannot be read.*156 bytes early"):
        read_all(tensor)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="No such file"):
        read_slice(tensor, 0, 0, 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((3, 5), ir.DataType.FLOAT, 60),
        ((3, 5), ir.DataType.INT4, 8),
        ((3, 5), ir.DataType.UINT2, 4),
        ((), ir.DataType.INT4, 1),
        ((0, 7), ir.DataType.INT8, 0),
    ],
)
def test_bytes_of_a_shape(shape: tuple[int, ...], dtype: ir.DataType, expected: int) -> None:
    assert nbytes_of(shape, dtype) == expected


@pytest.mark.parametrize("spill_bytes", [1, 1 << 20])
@pytest.mark.parametrize("dtype", _TYPES)
def test_put_keeps_values(dtype: ir.DataType, spill_bytes: int, tmp_path: Path) -> None:
    values = _values((7, 9), dtype)
    with WeightStore(tmp_path, spill_bytes) as store:
        tensor = store.put("w", values, dtype)
        assert isinstance(tensor, ir.ExternalTensor) == (spill_bytes == 1)
        assert (tensor.name, tensor.dtype, list(tensor.shape)) == ("w", dtype, [7, 9])
        np.testing.assert_array_equal(read_all(tensor), values)
        np.testing.assert_array_equal(tensor.numpy(), values)


@pytest.mark.parametrize("spill_bytes", [1, 1 << 20])
def test_codes_are_packed_as_onnx_ir_unpacks_them(spill_bytes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases: list[tuple[Any, ir.DataType, Array]] = [
        (ir.DataType.INT4, ir.DataType.INT4, rng.integers(-8, 8, (5, 7)).astype(np.int8)),
        (ir.DataType.UINT4, ir.DataType.UINT4, rng.integers(0, 16, (5, 7)).astype(np.uint8)),
        (INT3, ir.DataType.INT4, rng.integers(-4, 4, (5, 7)).astype(np.int8)),
        (ir.DataType.INT2, ir.DataType.INT2, rng.integers(-2, 2, (5, 7)).astype(np.int8)),
        (UINT2, ir.DataType.UINT2, rng.integers(0, 4, (5, 7)).astype(np.uint8)),
        (INT8, ir.DataType.INT8, rng.integers(-128, 128, (5, 7)).astype(np.int8)),
    ]
    with WeightStore(tmp_path, spill_bytes) as store:
        for given_type, stored, codes in cases:
            tensor = store.put("q", codes, given_type)
            assert tensor.dtype == stored
            assert tensor.nbytes == nbytes_of(codes.shape, stored)
            np.testing.assert_array_equal(tensor.numpy().astype(np.int16), codes)
            np.testing.assert_array_equal(read_slice(tensor, 1, 2, 5), tensor.numpy()[:, 2:5])


@pytest.mark.parametrize("spill_bytes", [1, 1 << 20])
def test_scalars_and_empty_tensors(spill_bytes: int, tmp_path: Path) -> None:
    with WeightStore(tmp_path, spill_bytes) as store:
        scalar = store.put("s", np.array(3.5, np.float32), ir.DataType.FLOAT)
        assert read_all(scalar) == np.float32(3.5)
        assert scalar.shape.numpy() == ()
        code = store.put("z", np.array(-3, np.int8), ir.DataType.INT4)
        assert int(code.numpy()) == -3
        empty = store.put("e", np.zeros((0, 4), np.float32), ir.DataType.FLOAT)
        assert read_all(empty).shape == (0, 4)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    axis_choice=st.integers(0, 2),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    spill_bytes=st.sampled_from([1, 1 << 20]),
)
def test_slices_in_any_order_make_the_whole(
    shape: list[int],
    axis_choice: int,
    cuts: list[int],
    spill_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    axis = axis_choice % len(shape)
    edges = sorted({0, shape[axis], *(cut for cut in cuts if cut < shape[axis])})
    values = _values(tuple(shape), ir.DataType.FLOAT16)
    with WeightStore(tmp_path_factory.mktemp("store"), spill_bytes) as store:
        writer = store.open_tensor("w", ir.DataType.FLOAT16, shape)
        for start, stop in reversed(list(itertools.pairwise(edges))):
            writer.write_slice(axis, start, values.take(range(start, stop), axis))
        np.testing.assert_array_equal(read_all(writer.finish()), values)


@pytest.mark.parametrize("axis", [0, 1])
def test_packed_slices_along_both_axes(axis: int, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 8)).astype(np.int8)
    with WeightStore(tmp_path, 1) as store:
        writer = store.open_tensor("w", ir.DataType.INT4, codes.shape)
        for start in (0, 2, 4):
            stop = codes.shape[axis] if start == 4 else start + 2
            writer.write_slice(axis, start, codes.take(range(start, stop), axis))
        np.testing.assert_array_equal(writer.finish().numpy().astype(np.int8), codes)


def test_a_last_row_may_end_inside_a_byte(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 4, (5, 3)).astype(np.uint8)
    with WeightStore(tmp_path, 1) as store:
        writer = store.open_tensor("w", ir.DataType.UINT2, codes.shape)
        writer.write_slice(0, 0, codes[:4])
        writer.write_slice(0, 4, codes[4:])
        np.testing.assert_array_equal(writer.finish().numpy().astype(np.uint8), codes)


def test_a_slice_that_shares_a_byte_is_a_defect(tmp_path: Path) -> None:
    with WeightStore(tmp_path) as store:
        writer = store.open_tensor("w", ir.DataType.INT4, (4, 6))
        with pytest.raises(InternalError, match="start and end on a byte"):
            writer.write_slice(1, 0, np.zeros((4, 3), np.int8))
        with pytest.raises(InternalError, match="is no slice of"):
            writer.write_slice(0, 3, np.zeros((2, 6), np.int8))
        with pytest.raises(InternalError, match="24 elements too few"):
            writer.finish()


def _fill_and_fail(folder: Path) -> None:
    with WeightStore(folder, 100) as store:
        store.put("small", np.zeros(10, np.float32), ir.DataType.FLOAT)
        assert list(folder.iterdir()) == []
        store.put("large", np.zeros(100, np.float32), ir.DataType.FLOAT)
        assert len(list(folder.iterdir())) == 1
        message = "stop"
        raise RuntimeError(message)


def test_the_scratch_file_comes_late_and_goes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        _fill_and_fail(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_threads_share_one_file(tmp_path: Path) -> None:
    tensors: dict[int, ir.TensorProtocol] = {}
    with WeightStore(tmp_path, 1) as store:

        def put(index: int) -> None:
            values = np.full((100, index + 1), index, np.float32)
            tensors[index] = store.put(f"w{index}", values, ir.DataType.FLOAT)

        threads = [threading.Thread(target=put, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(tmp_path.iterdir())) == 1
        for index, tensor in tensors.items():
            assert (read_all(tensor) == index).all()


def test_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with WeightStore(tmp_path, 1) as store, pytest.raises(UsageError, match="no room") as caught:
        store.put("w", np.zeros(8, np.float32), ir.DataType.FLOAT)
    assert caught.value.where == str(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "no", 1) as store, pytest.raises(UsageError, match="No such file"):
        store.put("w", np.zeros(8, np.float32), ir.DataType.FLOAT)


@pytest.mark.parametrize("outside", [False, True])
def test_bytes_read_as_another_type_and_shape(outside: bool, tmp_path: Path) -> None:
    values = _values((4, 6), ir.DataType.FLOAT)
    tensor: ir.TensorProtocol = ir.tensor(values)
    if outside:
        tensor = _external(tmp_path, values, ir.DataType.FLOAT)
    found = reinterpret(tensor, ir.DataType.UINT16, (6, 8), "other")
    assert (found.name, found.dtype, found.nbytes) == ("other", ir.DataType.UINT16, 96)
    assert isinstance(found, ir.ExternalTensor) == outside
    np.testing.assert_array_equal(read_all(found), values.view(np.uint16).reshape(6, 8))


def test_constants_of_bodies_are_counted_too() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If(c) <
            then_branch = t () => (float[2] p) { p = Mul(x, w) },
            else_branch = e () => (float[2] q) { q = Add(x, w) }
        >
    }"""
    model = build(text, {"w": np.zeros(2, np.float32), "t/u": np.zeros(3, np.float16)})
    assert constant_bytes(model) == 2 * 4 + 3 * 2
