"""Products and look-ups with quantized weights (ONNX Runtime, `ContribOperators.md`).

Where ONNX Runtime's kernels leave a choice (`accuracy_level`), products are taken in the type of
the float input, on dequantized weights.
"""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.integer_products import (
    code_type,
    per_column,
    product_of_steps,
    rounded_codes,
)
from qcompiler.execution.torch.ops.moving import take
from qcompiler.execution.torch.ops.quantization import (
    dequantize_linear,
    dynamic_quantize_linear,
    quantize_linear,
)

TABLE = OpTable("com.microsoft")
_BYTE: Final = 8
_PACKED: Final = (2, 4, 8)
"""Bits of a code that are packed into bytes, low bits first."""

# Without an axis, ONNX Runtime takes axis 1 for a list of scales, as the standard op does.
TABLE.op("QuantizeLinear", all_types=True)(quantize_linear)
TABLE.op("DequantizeLinear", all_types=True)(dequantize_linear)


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """Return the codes that the bytes of the last axis hold, low bits first, one a byte."""
    if bits == _BYTE:
        return codes
    mask = (1 << bits) - 1
    parts = [(codes >> shift) & mask for shift in range(0, _BYTE, bits)]
    return torch.stack(parts, -1).flatten(-2)


@TABLE.op("MatMulNBits")
def matmul_nbits(
    call: Call,
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return `a @ dequantized(B).T + bias`, [..., K] to [..., N].

    B holds N rows of blocks along K, [N, blocks, block_size * bits / 8] as bytes; an element is
    `(code - zero) * scale` of its block, or of the block that `g_idx` names for its column. Zero
    points are packed as the codes are, or of a's type; without them, the middle of the range.
    """
    if call.integer("weight_prepacked", 0):
        reason = "weight_prepacked: the layout is private to one GPU kernel"
        raise call.refuse(reason)
    rows = call.integer("N")
    if not codes.numel():
        zeroed = a.new_zeros(*a.shape[:-1], rows)
        return zeroed if bias is None else zeroed + bias
    weight = _matrix(call, codes, scales, zeros, groups).to(a.dtype)
    return functional.linear(a, weight, bias)


def _matrix(
    call: Call, packed: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor | None
) -> Tensor:
    """Return the dequantized matrix of a MatMulNBits, [N, K], in the scales' type."""
    rows, columns = call.integer("N"), call.integer("K")
    bits, block = _bits(call), call.integer("block_size")
    blocks = -(-columns // block)
    codes = unpacked(packed.reshape(rows, blocks, -1), bits).to(scales.dtype)
    scales = scales.reshape(rows, blocks, 1)
    if zeros is None:
        offsets: Tensor | int = 1 << (bits - 1)
    elif zeros.dtype == torch.uint8:
        offsets = unpacked(zeros.reshape(rows, -1), bits)[:, :blocks, None].to(scales.dtype)
    else:
        offsets = zeros.reshape(rows, blocks, 1)
    if groups is None:
        return ((codes - offsets) * scales).flatten(1)[:, :columns]
    places = groups.reshape(-1)[:columns].to(torch.int64)
    if isinstance(offsets, Tensor):
        offsets = offsets[:, places, 0]
    return (codes.flatten(1)[:, :columns] - offsets) * scales[:, places, 0]


def _bits(call: Call) -> int:
    bits = call.integer("bits", 4)
    if bits not in _PACKED:
        reason = f"codes of {bits} bits are not supported, only of 2, 4 and 8"
        raise call.refuse(reason)
    return bits


@TABLE.op("GatherBlockQuantized")
def gather_block_quantized(
    call: Call, data: Tensor, indices: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> Tensor:
    """Return dequantized slices of a tensor that is quantized in blocks along one axis.

    uint8 data are packed along the last axis, and their zero points with them; without zero
    points, uint8 data are centred, others have none. A slice out of range is zero.
    """
    kind = call.input_type(0)
    # Elements of UINT4 come one a byte; they are kept as uint8 too.
    in_bytes = data.dtype == torch.uint8 and kind is not ir.DataType.UINT4
    bits = _bits(call) if in_bytes else _BYTE
    rank = data.dim()
    axis = call.integer("gather_axis", 0) % rank
    blocked = call.integer("quantize_axis", 1) % rank
    is_packed = bits < _BYTE
    if is_packed and (axis == rank - 1 or blocked != rank - 1):
        reason = f"packed codes with gather_axis {axis} and quantize_axis {blocked} of {rank} axes"
        raise call.refuse(reason)
    size = data.shape[axis]
    inside = (indices >= -size) & (indices < size)
    places = torch.where(inside, indices % max(size, 1), 0).reshape(-1)
    rows = unpacked(_taken(data, places, axis), bits).to(scales.dtype)
    block = call.integer("block_size", 128) or data.shape[blocked]
    spread = _Blocks(block, blocked, rows.shape[blocked], places, axis)
    if zeros is not None:
        # The byte of a row's last zero points may be padded.
        offsets = unpacked(zeros, bits)[..., : scales.shape[-1]] if is_packed else zeros
        rows = rows - spread(offsets).to(rows.dtype)
    elif in_bytes:
        rows = rows - (1 << (bits - 1))
    keep = inside.reshape([-1 if each == axis else 1 for each in range(rank)])
    values = torch.where(keep, rows * spread(scales), 0)
    return torch.unflatten(values, axis, indices.shape) if indices.dim() else values.squeeze(axis)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How one parameter per block belongs to the slices that are gathered.

    Attributes:
        size: Elements of a block.
        axis: The axis that is quantized.
        length: Elements along it.
        places: Which slices are gathered.
        gathered: The axis that they are slices of.
    """

    size: int
    axis: int
    length: int
    places: Tensor
    gathered: int

    def __call__(self, parameter: Tensor) -> Tensor:
        """Return one parameter per element of the slices, or what broadcasts to that."""
        if self.axis == self.gathered:
            return _taken(parameter, self.places // self.size, self.axis)
        slices = _taken(parameter, self.places, self.gathered)
        return slices.repeat_interleave(self.size, self.axis).narrow(self.axis, 0, self.length)


def _taken(values: Tensor, places: Tensor, axis: int) -> Tensor:
    """Return slices along an axis; one of a single slice is shared by all."""
    if values.shape[axis] == 1:
        places = torch.zeros_like(places)
    slices = take(values, places, axis)
    assert isinstance(slices, Tensor)
    return slices


@TABLE.op("DynamicQuantizeMatMul")
def dynamic_quantize_matmul(
    call: Call,
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the product of a, quantized to uint8 by its own range, with codes."""
    codes, a_scale, a_zero = dynamic_quantize_linear(call, a)
    return _scaled_product(codes, a_scale, a_zero, b, b_scale, b_zero, bias)


@TABLE.op("MatMulIntegerToFloat")
def matmul_integer_to_float(
    call: Call,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the product of codes as real numbers; B's parameters may be per column."""
    for name, parameter in (("a_scale", a_scale), ("a_zero_point", a_zero)):
        # The schema allows one per column of A, which cannot be taken out of the sum.
        if parameter is not None and parameter.numel() != 1:
            reason = f"{name} has {parameter.numel()} elements, not one"
            raise call.refuse(reason)
    return _scaled_product(a, a_scale, a_zero, b, b_scale, b_zero, bias)


def _scaled_product(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    exact = torch.promote_types(b_scale.dtype, torch.float32)
    if a_zero is not None:
        a_zero = a_zero.reshape(())
    steps = product_of_steps(a, a_zero, b, None if b_zero is None else per_column(b_zero))
    factor = a_scale.reshape(()).to(exact) * per_column(b_scale).to(exact)
    result = steps.to(exact) * factor
    return (result if bias is None else result + bias).to(b_scale.dtype)


@TABLE.op("QGemm")
def qgemm(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
) -> Tensor:
    """Return `alpha * A' @ B' + C`, as codes if the result has a scale, else as real numbers.

    C counts in units of `alpha * a_scale * b_scale`.
    """
    a = a.T if call.integer("transA", 0) else a
    b = b.T if call.integer("transB", 0) else b
    steps = product_of_steps(a, a_zero.reshape(()), b, per_column(b_zero))
    if c is not None:
        steps = steps + c.to(steps.dtype)
    exact = torch.promote_types(b_scale.dtype, torch.float32)
    factor = a_scale.reshape(()).to(exact) * per_column(b_scale).to(exact)
    factor = factor * call.number("alpha", 1.0)
    if y_scale is None:
        return (steps.to(exact) * factor).to(b_scale.dtype)
    values = steps.to(exact) * (factor / y_scale.reshape(()).to(exact))
    return rounded_codes(call, values, y_zero, code_type(call, 8, y_zero))
