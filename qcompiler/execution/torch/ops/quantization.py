"""Quantization with straight-through gradients (ONNX operators, `Operators.md`).

Forward, every function computes ONNX's own rounding (half to even) and saturation. Backward, the
rounding counts as the identity, and saturation stops the gradient to the value but not to the
scale: composed, `DequantizeLinear(QuantizeLinear(x, s), s)` has the gradients of LSQ (Esser et al.
2020): to x, 1 inside the range and 0 outside; to s, `round(v) - v` inside, where `v = x / s`, and
`qmin - z` or `qmax - z` outside. A value that rounds into the range is inside it.

Integers cannot carry gradients in PyTorch. Where one is wanted, codes are kept as floats of
integral value; everything that merely moves codes about works on either.
"""

from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import onnx_type
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.small_floats import SMALL_FLOATS, to_small_float

TABLE = OpTable()
_INTEGERS: Final = {
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-(1 << 15), (1 << 15) - 1),
    ir.DataType.UINT16: (0, (1 << 16) - 1),
    ir.DataType.INT32: (-(1 << 31), (1 << 31) - 1),
}


class _RoundHalfEven(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(_context: Any, *gradients: Any) -> Any:
        return gradients[0]


def round_half_even(values: Tensor) -> Tensor:
    """Return values rounded half to even; the gradient passes straight through."""
    if torch.is_grad_enabled() and values.requires_grad:
        rounded: Tensor = _RoundHalfEven.apply(values)  # type: ignore[no-untyped-call]
        return rounded
    return values.round()


@TABLE.op("QuantizeLinear", since=10, all_types=True)
def quantize_linear(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Return `saturate(round(x / scale) + zero)`, per tensor, axis or block."""
    target = _code_type(call, zero)
    precision = call.integer("precision", 0)
    scale = _computable(scale)
    dtype = call.elements.of(ir.DataType(precision)) if precision else scale.dtype
    grid = _Grid(call, x, scale)
    ratio = grid.split(x).to(dtype) / grid.spread(scale).to(dtype)
    if target not in _INTEGERS:
        shifted = ratio if zero is None else ratio + grid.spread(zero.to(ratio.dtype))
        return grid.join(_to_small_float(call, shifted, target))
    codes = round_half_even(ratio)
    if zero is not None or target.bitwidth > 8:
        # float16 holds integers up to 2048 only.
        codes = codes.to(torch.promote_types(codes.dtype, _exact_for(target)))
    if zero is not None:
        codes = codes + grid.spread(zero.to(codes.dtype))
    codes = grid.join(codes.clamp(*_INTEGERS[target]))
    return codes if _wants_gradient(codes) else codes.to(call.elements.of(target))


@TABLE.op("DequantizeLinear", since=10, all_types=True)
def dequantize_linear(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Return `(x - zero) * scale`, per tensor, axis or block, in the scale's type."""
    wanted = call.integer("output_dtype", 0)
    scale = _computable(scale)
    dtype = call.elements.of(ir.DataType(wanted)) if wanted else scale.dtype
    grid = _Grid(call, x, scale)
    codes = grid.split(x)
    exact = torch.promote_types(scale.dtype, torch.float32 if codes.itemsize > 1 else scale.dtype)
    if zero is None:
        steps = codes.to(exact)
    elif codes.is_floating_point():
        steps = codes.to(exact) - grid.spread(zero.to(exact))
    else:
        wide = torch.int64 if codes.itemsize > 2 else torch.int32
        steps = (codes.to(wide) - grid.spread(zero.to(wide))).to(exact)
    return grid.join((steps * grid.spread(scale)).to(dtype))


@TABLE.op("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes, the scale and the zero point of a range that covers x and zero.

    The gradient treats the zero point as a constant.
    """
    low = x.amin().clamp(max=0) if x.numel() else x.new_zeros(())
    high = x.amax().clamp(min=0) if x.numel() else x.new_zeros(())
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).detach().clamp(0, 255).round()
    codes = (round_half_even(x / scale) + zero).clamp(0, 255)
    unsigned = call.elements.of(ir.DataType.UINT8)
    result = codes if _wants_gradient(codes) else codes.to(unsigned)
    return result, scale, zero.to(unsigned)


class _Grid:
    """How the scales of one node lie over its tensor."""

    def __init__(self, call: Call, x: Tensor, scale: Tensor) -> None:
        """Look at shapes.

        Args:
            call: The node.
            x: Values or codes.
            scale: One element; one per index of `axis`; or one per block of `block_size`.
        """
        self._rank = x.dim()
        self._is_tensor = scale.dim() == 0 or (scale.numel() == 1 and scale.dim() <= 1)
        self._axis = call.integer("axis", 1) % x.dim() if x.dim() else 0
        self._block = call.integer("block_size", 0)
        self._length = x.shape[self._axis] if x.dim() else 1
        # Whole blocks get an axis of their own; a broken last one takes repeated scales.
        self._divides = bool(self._block) and self._length % self._block == 0

    def split(self, x: Tensor) -> Tensor:
        """Return x with its blocks on an axis of their own, if it has whole blocks."""
        return torch.unflatten(x, self._axis, (-1, self._block)) if self._divides else x

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        return x.flatten(self._axis, self._axis + 1) if self._divides else x

    def spread(self, parameter: Tensor) -> Tensor:
        """Return scales or zero points so that they broadcast against what `split` returns."""
        if self._is_tensor:
            return parameter.reshape(())
        if self._divides:
            return parameter.unsqueeze(self._axis + 1)
        if self._block:
            repeated = parameter.repeat_interleave(self._block, self._axis)
            return repeated.narrow(self._axis, 0, self._length)
        shape = [1] * self._rank
        shape[self._axis] = -1
        return parameter.reshape(shape)


def _code_type(call: Call, zero: Tensor | None) -> ir.DataType:
    """Return the ONNX type of the codes: the zero point's, else the attribute's, else UINT8."""
    if (declared := call.input_type(2)) is not None:
        return declared
    if call.integer("output_dtype", 0):
        return call.element_type("output_dtype")
    return ir.DataType.UINT8 if zero is None else onnx_type(zero.dtype)


def _computable(scale: Tensor) -> Tensor:
    """Return a scale that PyTorch can compute with: powers of two in 8 bits become float32."""
    return scale if scale.itemsize > 1 else scale.to(torch.float32)


def _exact_for(target: ir.DataType) -> torch.dtype:
    return torch.float64 if target is ir.DataType.INT32 else torch.float32


def _to_small_float(call: Call, values: Tensor, target: ir.DataType) -> Tensor:
    if target not in SMALL_FLOATS:
        reason = f"no conversion to {target.name}"
        raise call.refuse(reason)
    saturate = bool(call.integer("saturate", 1))
    return to_small_float(values, target, call.elements.of(target), saturate=saturate)


def _wants_gradient(codes: Tensor) -> bool:
    return torch.is_grad_enabled() and codes.requires_grad
