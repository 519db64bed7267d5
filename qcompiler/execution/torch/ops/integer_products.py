"""Products of integer codes: QLinearMatMul and what ONNX Runtime's own ops share with it.

Codes may be floats of integral value, which carry gradients (`ops/quantization.py`). Sums of
products are taken in float64 on every device: exact up to 2**53, and far faster than what PyTorch
has for int32 matrices on a CPU (on CUDA it has nothing).
"""

from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import onnx_type
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.quantization import round_half_even

TABLE = OpTable()
_RANGES: Final = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255)}


@TABLE.op("QLinearMatMul", since=10)
def qlinear_matmul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """Return the codes of a product of codes, [..., M, K] x [..., K, N].

    A's scale and zero point are scalars or [M], B's scalars or [N], the result's scalars or [M].
    The sum is multiplied by one float32 factor, `a_scale * b_scale / y_scale`, and rounded half
    to even, as ONNX Runtime does.
    """
    exact = torch.promote_types(y_scale.dtype, torch.float32)
    scales = per_row(a_scale).to(exact) * per_column(b_scale).to(exact)
    steps = product_of_steps(a, per_row(a_zero), b, per_column(b_zero))
    values = steps.to(exact) * (scales / per_row(y_scale).to(exact))
    return rounded_codes(call, values, per_row(y_zero), code_type(call, 7, y_zero))


def per_row(parameter: Tensor) -> Tensor:
    """Return one parameter per row, [M], so that it broadcasts against [..., M, N]."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter.unsqueeze(-1) if parameter.dim() == 1 else parameter


def per_column(parameter: Tensor) -> Tensor:
    """Return a scalar as such; one parameter per column, [N] or [..., 1, N], broadcasts as is."""
    return parameter.reshape(()) if parameter.numel() == 1 else parameter


def product_of_steps(a: Tensor, a_zero: Tensor | None, b: Tensor, b_zero: Tensor | None) -> Tensor:
    """Return `(a - a_zero) @ (b - b_zero)` as float64, exact.

    Args:
        a: Codes, [..., M, K].
        a_zero: Zero points that broadcast against them; None for zero.
        b: Codes, [..., K, N].
        b_zero: Likewise.
    """
    return torch.matmul(steps_of(a, a_zero, torch.float64), steps_of(b, b_zero, torch.float64))


def steps_of(codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return codes less their zero point in a float type that holds them exactly."""
    return codes.to(dtype) if zero is None else codes.to(dtype) - zero.to(dtype)


def code_type(call: Call, position: int, codes: Tensor | None) -> ir.DataType:
    """Return the ONNX type of an input that holds codes.

    Raises:
        ModelError: Neither the model nor the tensor tells it, or it is not of 8 bits.
    """
    kind = call.input_type(position)
    if kind is None and codes is not None and not codes.is_floating_point():
        kind = onnx_type(codes.dtype)
    if kind not in _RANGES:
        reason = f"codes of type {kind.name if kind else 'unknown'} are not supported"
        raise call.refuse(reason)
    return kind


def rounded_codes(call: Call, values: Tensor, zero: Tensor | None, kind: ir.DataType) -> Tensor:
    """Return `saturate(round(values) + zero)`; floats where they carry a gradient.

    Args:
        call: The node.
        values: Real values in units of the scale.
        zero: Zero point; None for zero.
        kind: INT8 or UINT8.
    """
    codes = round_half_even(values)
    if zero is not None:
        codes = codes + zero.to(codes.dtype)
    codes = codes.clamp(*_RANGES[kind])
    if torch.is_grad_enabled() and codes.requires_grad:
        return codes
    return codes.to(call.elements.of(kind))
