"""Codes as bytes: the same weight in the kernels' form."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.byte_codes import (
    coded_matrix,
    shared_bytes,
    tensor_of,
    transposed_block,
    transposed_bytes,
)
from qcompiler.ir.weights import WeightStore
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from qcompiler.quant.packing import unpack
from tests.support.coded import CodedWeight, coded_weight, opset_for
from tests.support.graphs import build

Array = np.ndarray[Any, np.dtype[Any]]


def dequantize(weight: CodedWeight, bits: int = 8) -> ir.Node:
    text = f"g () => (float[n, m] y) {{ {weight.dequantize('y', node='dq')} }}"
    return build(text, weight.weights, opset=opset_for(bits)).graph.node("dq")


def decoded(codes: ir.Value, scale: ir.Value, points: ir.Value | None, bits: int) -> Array:
    """Compute what the kernels compute, in float64, padding included."""
    raw, factors = tensor_of(codes).numpy(), tensor_of(scale).numpy().astype(np.float64)
    rows, blocks = factors.shape
    columns = raw.shape[1] * 8 // bits
    values = unpack(raw.reshape(-1), bits, (rows, columns), False).astype(np.float64)
    offsets = np.full((rows, blocks), float(1 << (bits - 1)))
    if points is not None:
        packed = tensor_of(points).numpy()
        shape = (rows, packed.shape[1] * 8 // bits)
        offsets = unpack(packed.reshape(-1), bits, shape, False)[:, :blocks].astype(np.float64)
    size = -(-columns // blocks)
    result: Array = (values - np.repeat(offsets, size, 1)[:, :columns]) * np.repeat(
        factors, size, 1
    )[:, :columns]
    return result


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 32)])
def test_shared_bytes_hold_the_same_weight(
    bits: int, signed: bool, zero_point: bool, granularity: Granularity, tmp_path: Path
) -> None:
    weight = coded_weight((5, 96), granularity, bits=bits, signed=signed, zero_point=zero_point)
    matrix = coded_matrix(dequantize(weight, bits))
    assert matrix is not None
    made = shared_bytes(matrix, WeightStore(tmp_path))
    assert tensor_of(made.codes).shape == (5, 96 * bits // 8)
    np.testing.assert_allclose(
        decoded(made.codes, made.scale, made.zero_point, bits), weight.values(), rtol=1e-12
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("granularity", [PerAxis(1), PerBlock(0, 32)])
@pytest.mark.parametrize("reduction", [64, 70])
def test_transposed_bytes_hold_the_transposed_weight(
    bits: int, signed: bool, granularity: Granularity, reduction: int, tmp_path: Path
) -> None:
    weight = coded_weight((reduction, 7), granularity, bits=bits, signed=signed)
    matrix = coded_matrix(dequantize(weight, bits))
    assert matrix is not None
    made = transposed_bytes(matrix, 32, WeightStore(tmp_path))
    found = decoded(made.codes, made.scale, made.zero_point, bits)
    np.testing.assert_allclose(found[:, :reduction], weight.values().T, rtol=1e-12)


@pytest.mark.parametrize(
    ("reduction", "bits", "signed", "block"),
    [
        (257, 8, True, 32),  # 324 bytes a row; blocks of 16 take 340, of 256 520
        (1024, 8, True, 256),
        (100, 8, True, 128),
        (17, 8, True, 32),  # 36 bytes; blocks of 16 take 40
        (257, 4, False, 64),  # 183 bytes; blocks of 32 take 185, of 128 206
    ],
)
def test_block_of_a_channel_with_the_least_bytes(
    reduction: int, bits: int, signed: bool, block: int, tmp_path: Path
) -> None:
    weight = coded_weight((reduction, 4), PerAxis(1), bits=bits, signed=signed)
    matrix = coded_matrix(dequantize(weight, bits))
    assert matrix is not None
    assert transposed_block(matrix, 256) == block
    sizes = {}
    for size in (16, 32, 64, 128, 256):
        made = transposed_bytes(matrix, size, WeightStore(tmp_path))
        values = [made.codes, made.scale, *([made.zero_point] if made.zero_point else [])]
        sizes[size] = sum(tensor_of(value).nbytes for value in values)
    assert sizes[block] == min(sizes.values())


def test_are_made_once(tmp_path: Path) -> None:
    weight = coded_weight((4, 32), PerBlock(1, 16), bits=4, signed=True)
    matrix = coded_matrix(dequantize(weight))
    assert matrix is not None
    assert not matrix.in_bytes
    store = WeightStore(tmp_path)
    assert shared_bytes(matrix, store) == shared_bytes(matrix, store)
    assert matrix.in_bytes


def test_refuses_rows_that_share_a_byte(tmp_path: Path) -> None:
    matrix = coded_matrix(dequantize(coded_weight((4, 31), PerAxis(0), bits=4, signed=True)))
    assert matrix is not None
    with pytest.raises(ValueError, match="whole bytes"):
        shared_bytes(matrix, WeightStore(tmp_path))


def test_what_is_no_coded_matrix() -> None:
    assert coded_matrix(None) is None
    assert coded_matrix(dequantize(coded_weight((4, 8), PerTensor(), bits=8, signed=True))) is None
    three = coded_weight((4, 8, 2), PerAxis(0), bits=8, signed=True)
    assert coded_matrix(dequantize(three)) is None
    model = build("g (int8[4, 8] w, float s) => (float[4, 8] y) { y = DequantizeLinear(w, s) }")
    assert coded_matrix(model.graph[0]) is None


def test_axes_and_row_blocks() -> None:
    channels = coded_matrix(dequantize(coded_weight((9, 40), PerAxis(0), bits=8, signed=True)))
    blocks = coded_matrix(dequantize(coded_weight((64, 5), PerBlock(0, 16), bits=4, signed=False)))
    assert channels is not None
    assert blocks is not None
    assert (channels.axis, channels.block_size, channels.row_block) == (1, None, 64)
    assert (blocks.axis, blocks.block_size, blocks.reduction) == (0, 16, 64)
    assert (blocks.bits, blocks.signed, len(blocks.operands)) == (4, False, 3)
