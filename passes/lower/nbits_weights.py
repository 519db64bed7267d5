"""The packed weight of a MatMulNBits as codes, scales and zero points of a DequantizeLinear."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import constant_of, int_attribute
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.quant.packing import unpack

_CODES, _SCALES, _ZEROS, _ORDER = 1, 2, 3, 4
_WIDTHS: Final = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


@dataclass(frozen=True, slots=True)
class UnpackedWeight:
    """What stands for the weight `[N, K]`, blocks along axis 1.

    Attributes:
        codes: `[N, K]`: unsigned, or int8 less the zero points where scales were not positive.
        scale: Positive, `[N, ceil(K / block_size)]`.
        zero_point: Of the codes' type, in the shape of the scale.
        block_size: Elements per block.
    """

    codes: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol
    block_size: int


def nbits_refusal(node: ir.Node) -> str:
    """Return why a MatMulNBits cannot be unpacked, "" if it can."""
    if int_attribute(node, "bits", 4) not in _WIDTHS:
        return f"it has {int_attribute(node, 'bits', 4)} bits, which no ONNX type has"
    if len(node.inputs) > _ORDER and node.inputs[_ORDER] is not None:
        return "its input channels are reordered (g_idx)"
    zeros = node.inputs[_ZEROS] if len(node.inputs) > _ZEROS else None
    if zeros is not None and zeros.dtype != ir.DataType.UINT8:
        return "its zero points are floats, which no code stands for"
    constants = [node.inputs[_CODES], node.inputs[_SCALES], *([zeros] if zeros else [])]
    if any(constant_of(value) is None for value in constants):
        return "its weight is computed at run time"
    return ""


def unpacked_weight(node: ir.Node, store: WeightStore, name: str) -> UnpackedWeight:
    """Return the weight of a MatMulNBits that was not refused.

    Args:
        node: The op.
        store: Where the codes go.
        name: Of the codes.
    """
    rows, columns = int_attribute(node, "N", 0), int_attribute(node, "K", 0)
    block, bits = int_attribute(node, "block_size", 0), int_attribute(node, "bits", 4)
    blocks = -(-columns // block)
    packed = _constant(node, _CODES).reshape(rows, -1)
    codes = _unpacked(packed, bits)[:, :columns]
    scale = _constant(node, _SCALES).reshape(rows, blocks)
    zeros = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
    if len(node.inputs) > _ZEROS and node.inputs[_ZEROS] is not None:
        zeros = _unpacked(_constant(node, _ZEROS).reshape(rows, -1), bits)[:, :blocks]
    if np.all(scale.astype(np.float32) > 0):
        return _stored(store, name, block, codes, scale, zeros, _WIDTHS[bits])
    # ONNX Runtime's symmetric quantizer makes negative scales, and blocks of zeros have none.
    sign = np.repeat(np.sign(scale.astype(np.float32)).astype(np.int16), block, axis=1)
    offset = np.repeat(zeros.astype(np.int16), block, axis=1)
    signed = (codes - offset[:, :columns]) * sign[:, :columns]
    positive = np.where(scale == 0, np.ones_like(scale), np.abs(scale))
    none = np.zeros(zeros.shape, np.int8)
    return _stored(store, name, block, signed.astype(np.int8), positive, none, ir.DataType.INT8)


def _stored(
    store: WeightStore,
    name: str,
    block_size: int,
    codes: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    zero_point: npt.NDArray[Any],
    dtype: ir.DataType,
) -> UnpackedWeight:
    return UnpackedWeight(
        store.put(name, np.ascontiguousarray(codes), dtype),
        store.put(f"{name}.scale", scale, ir.DataType.from_numpy(scale.dtype)),
        store.put(f"{name}.zero_point", np.ascontiguousarray(zero_point), dtype),
        block_size,
    )


def _constant(node: ir.Node, index: int) -> npt.NDArray[Any]:
    tensor = constant_of(node.inputs[index])
    assert tensor is not None  # or the node would have been refused
    return read_all(tensor)


def _unpacked(packed: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Return the codes of rows of bytes, the padding of each row behind them."""
    rows, width = packed.shape
    count = width * 8 // bits
    codes = unpack(np.ascontiguousarray(packed).reshape(-1), bits, (rows, count), signed=False)
    return codes.astype(np.uint8, copy=False)
