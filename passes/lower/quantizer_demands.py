"""What a runtime demands of quantizers, checked on nodes: the meaning of `targets.rows.Demand`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import constant_of, int_attribute, is_op
from qcompiler.ir.weights import read_all
from qcompiler.targets.rows import Demand

_LAST_AXES: Final = 2


def broken_demand(node: ir.Node, demands: tuple[Demand, ...]) -> str:
    """Return what is wrong with a QuantizeLinear or DequantizeLinear, "" if nothing is."""
    return next((fault for demand in demands if (fault := _CHECKS[demand](node))), "")


def _zero_points(node: ir.Node) -> str:
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:
        return ""
    tensor = constant_of(zero_point)
    if tensor is None:
        return "its zero point is computed, and only 0 is legal"
    if np.any(read_all(tensor).astype(np.float32) != 0):
        return "its zero point is not 0"
    return ""


def _signed(node: ir.Node) -> str:
    if not is_op(node, "QuantizeLinear"):
        return ""
    stated = int_attribute(node, "output_dtype", 0)
    if stated:
        dtype: ir.DataType | None = ir.DataType(stated)
    else:
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        dtype = ir.DataType.UINT8 if zero_point is None else zero_point.dtype
    if dtype is not None and dtype.name.startswith("UINT"):
        return f"its codes are {dtype.name}, which would silently be read as signed"
    return ""


def _whole_blocks(node: ir.Node) -> str:
    block = int_attribute(node, "block_size", 0)
    axis = _block_axis(node)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if not block or axis is None or shape is None:
        return ""
    extent = shape[axis]
    if isinstance(extent, int) and extent % block and extent > block:
        return f"blocks of {block} do not divide the {extent} elements of axis {axis}"
    return ""


def _block_axes(node: ir.Node) -> str:
    axis = _block_axis(node)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if axis is None or shape is None or axis >= len(shape) - _LAST_AXES:
        return ""
    return f"its blocks lie along axis {axis} of {len(shape)}, and only the last two may have them"


def _left_blocks(node: ir.Node) -> str:
    codes = node.inputs[0]
    if codes is None or codes.dtype != ir.DataType.INT4 or not int_attribute(node, "block_size", 0):
        return ""
    for use in node.outputs[0].uses():
        if is_op(use.node, "MatMul", "Gemm") and use.idx == 0:
            return "its blocks of int4 are the first operand of a product, where builders crash"
    return ""


def _block_axis(node: ir.Node) -> int | None:
    """Return the axis of blocks, counted from 0; None where there are none or it is not known."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if not int_attribute(node, "block_size", 0) or shape is None:
        return None
    return int_attribute(node, "axis", 1) % len(shape)


_CHECKS: Final[Mapping[Demand, Callable[[ir.Node], str]]] = MappingProxyType(
    {
        Demand.ZERO_POINTS_ARE_ZERO: _zero_points,
        Demand.SIGNED: _signed,
        Demand.WHOLE_BLOCKS: _whole_blocks,
        Demand.BLOCKS_ON_LAST_AXES: _block_axes,
        Demand.INT4_BLOCKS_ON_THE_RIGHT: _left_blocks,
    }
)
