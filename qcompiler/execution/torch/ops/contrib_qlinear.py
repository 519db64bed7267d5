"""Ops from codes to codes of ONNX Runtime (its `ContribOperators.md`).

All parameters are scalars. Gradients pass straight through the rounding, as in
`ops/quantization.py`. Three of ONNX Runtime's kernels add the zero point before they round, which
shows where a value lies half-way between two codes; this follows them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.integer_products import code_type, rounded_codes, steps_of
from qcompiler.execution.torch.ops.pooling import average_pool

TABLE = OpTable("com.microsoft")
_PER_INPUT = 3
"""A QLinearConcat has codes, scale and zero point for everything it concatenates."""


@TABLE.op("QLinearAdd")
def qlinear_add(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    c_scale: Tensor,
    c_zero: Tensor | None = None,
) -> Tensor:
    """Return the codes of a sum."""
    exact = _exact(c_scale)
    left, right = (each.to(exact) / c_scale.to(exact) for each in (a_scale, b_scale))
    # The order of the operations is that of ONNX Runtime's kernel.
    fixed = _number(c_zero, exact) - (
        left * _number(a_zero, exact) + right * _number(b_zero, exact)
    )
    values = a.to(exact) * left + (b.to(exact) * right + fixed)
    return rounded_codes(call, values, None, code_type(call, 0, a))


@TABLE.op("QLinearMul")
def qlinear_mul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    c_scale: Tensor,
    c_zero: Tensor | None = None,
) -> Tensor:
    """Return the codes of a product, element by element."""
    exact = _exact(c_scale)
    factor = a_scale.to(exact) * b_scale.to(exact) / c_scale.to(exact)
    values = steps_of(a, a_zero, exact) * steps_of(b, b_zero, exact) * factor
    return rounded_codes(call, values + _number(c_zero, exact), None, code_type(call, 0, a))


@TABLE.op("QLinearSigmoid")
def qlinear_sigmoid(call: Call, x: Tensor, x_scale: Tensor, *parameters: Tensor | None) -> Tensor:
    """Return the codes of `sigmoid(x)`."""
    return _elementwise(call, torch.sigmoid, x, x_scale, *parameters)


@TABLE.op("QLinearLeakyRelu")
def qlinear_leaky_relu(
    call: Call, x: Tensor, x_scale: Tensor, *parameters: Tensor | None
) -> Tensor:
    """Return the codes of x, or of `alpha * x` below zero."""
    alpha = call.number("alpha", 0.01)
    return _elementwise(
        call,
        lambda values: torch.where(values < 0, values * alpha, values),
        x,
        x_scale,
        *parameters,
    )


@TABLE.op("QLinearSoftmax")
def qlinear_softmax(call: Call, x: Tensor, x_scale: Tensor, *parameters: Tensor | None) -> Tensor:
    """Return the codes of a softmax; before opset 13 (an attribute), over all axes from one on."""
    axis = call.integer("axis", -1) % x.dim()
    along = call.integer("opset") >= 13

    def softmax(values: Tensor) -> Tensor:
        if along or axis == x.dim() - 1:
            return torch.softmax(values, axis)
        return torch.softmax(values.flatten(axis), -1).reshape(values.shape)

    return _elementwise(call, softmax, x, x_scale, *parameters)


def _elementwise(
    call: Call,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor | None,
    y_zero: Tensor | None = None,
) -> Tensor:
    """Return the codes of a function of the real values."""
    assert y_scale is not None  # the schemas ask for it
    values = function(_real(x, x_scale, x_zero)) / y_scale.to(_exact(y_scale))
    return rounded_codes(call, values, y_zero, code_type(call, 0, x))


@TABLE.op("QLinearConcat")
def qlinear_concat(call: Call, y_scale: Tensor, y_zero: Tensor, *inputs: Tensor) -> Tensor:
    """Return tensors of codes one after the other, in the codes of the result."""
    if len(inputs) % _PER_INPUT:
        reason = f"{len(inputs)} inputs are no triples of codes, scale and zero point"
        raise call.refuse(reason)
    triples = zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
    values = torch.cat([_real(*triple) for triple in triples], call.integer("axis"))
    return rounded_codes(
        call, values / y_scale.to(values.dtype), y_zero, code_type(call, 1, y_zero)
    )


@TABLE.op("QLinearAveragePool")
def qlinear_average_pool(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
) -> Tensor:
    """Return the codes of the mean of every window."""
    last = call.integer("channels_last", 0)
    real = _real(x, x_scale, x_zero)
    means = average_pool(call, real.movedim(-1, 1) if last else real)
    means = means.movedim(1, -1) if last else means
    values = means / y_scale.to(means.dtype) + _number(y_zero, means.dtype)
    return rounded_codes(call, values, None, code_type(call, 0, x))


@TABLE.op("QLinearGlobalAveragePool")
def qlinear_global_average_pool(
    call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor
) -> Tensor:
    """Return the codes of the mean of every channel."""
    first = 1 if call.integer("channels_last", 0) else 2
    axes = tuple(range(first, first + x.dim() - 2))
    count = math.prod(x.shape[axis] for axis in axes)
    # The sum is exact, and is multiplied by one factor.
    steps = steps_of(x, x_zero, torch.float64).sum(axes, keepdim=True)
    exact = _exact(y_scale)
    factor = x_scale.to(exact) / (y_scale.to(exact) * count)
    return rounded_codes(call, steps.to(exact) * factor, y_zero, code_type(call, 0, x))


def _real(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    exact = _exact(scale)
    return steps_of(codes, zero, exact) * scale.to(exact)


def _exact(scale: Tensor) -> torch.dtype:
    return torch.promote_types(scale.dtype, torch.float32)


def _number(zero: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    return 0.0 if zero is None else zero.to(dtype)
