"""Packing against the readers of onnx and onnx-ir, exact equality."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.quant.packing import pack, packed_size, unpack

TYPES = {
    ("int", 8): (np.dtype(np.int8), onnx.TensorProto.INT8),
    ("uint", 8): (np.dtype(np.uint8), onnx.TensorProto.UINT8),
    ("int", 4): (np.dtype(ml_dtypes.int4), onnx.TensorProto.INT4),
    ("uint", 4): (np.dtype(ml_dtypes.uint4), onnx.TensorProto.UINT4),
    ("int", 2): (np.dtype(ml_dtypes.int2), onnx.TensorProto.INT2),
    ("uint", 2): (np.dtype(ml_dtypes.uint2), onnx.TensorProto.UINT2),
}
ALL_TYPES = pytest.mark.parametrize(("kind", "bits"), TYPES)


def _codes(kind: str, bits: int, shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.int8]:
    low = -(1 << (bits - 1)) if kind == "int" else 0
    generator = np.random.default_rng(seed)
    wide = generator.integers(low, low + (1 << bits), shape)
    return wide.astype(np.int8 if kind == "int" else np.uint8)


@ALL_TYPES
@settings(max_examples=30, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(0, 9), max_size=3).map(tuple), seed=st.integers(0, 1000))
def test_packing_is_what_onnx_reads_and_unpacking_inverts_it(
    kind: str, bits: int, shape: tuple[int, ...], seed: int
) -> None:
    dtype, onnx_type = TYPES[kind, bits]
    codes = _codes(kind, bits, shape, seed)

    packed = pack(codes, bits)

    proto = onnx.TensorProto(data_type=onnx_type, dims=shape, raw_data=packed.tobytes())
    read = onnx.numpy_helper.to_array(proto)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read.astype(codes.dtype), codes)
    np.testing.assert_array_equal(unpack(packed, bits, shape, kind == "int"), codes)


@ALL_TYPES
def test_packing_equals_the_bytes_of_onnx_ir(kind: str, bits: int) -> None:
    codes = _codes(kind, bits, (7, 3))
    tensor = ir.Tensor(codes.astype(TYPES[kind, bits][0]))
    assert pack(codes, bits).tobytes() == tensor.tobytes()


@ALL_TYPES
def test_tensors_larger_than_one_chunk_survive(kind: str, bits: int) -> None:
    codes = _codes(kind, bits, (131, 2003))
    packed = pack(codes, bits)
    assert packed.size == packed_size(codes.size, bits)
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape, kind == "int"), codes)


def test_low_bits_come_first_and_padding_is_zero() -> None:
    assert pack(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(np.array([-1, 1, -8], np.int8), 4).tolist() == [0x1F, 0x08]
    assert pack(np.array([1, 2, 3, 0, 3], np.uint8), 2).tolist() == [0b00111001, 0b00000011]


def test_a_transposed_array_is_packed_in_row_major_order() -> None:
    codes = _codes("int", 4, (5, 6))
    np.testing.assert_array_equal(pack(codes.T, 4), pack(codes.T.copy(), 4))


@pytest.mark.parametrize("code", [-9, 8])
def test_a_code_that_does_not_fit_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="do not fit 4 signed bits"):
        pack(np.array([0, code], np.int8), 4)


def test_other_dtypes_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="not int8 or uint8"):
        pack(np.zeros(2, np.int32), 4)
    with pytest.raises(ValueError, match="8, 4 or 2 bits"):
        pack(np.zeros(2, np.int8), 3)


def test_a_packed_array_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"do not hold a tensor of shape \[3\] at 4 bits"):
        unpack(np.zeros(3, np.uint8), 4, (3,), signed=True)
