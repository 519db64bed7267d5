"""Arithmetic, comparison and logic, element by element (ONNX operators, `Operators.md`)."""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Final

import numpy as np
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import Array
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.moving import moves_elements

TABLE = OpTable()
Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor], Tensor]

_UNARY: Final[Mapping[str, Unary]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "BitwiseNot": torch.bitwise_not,
}


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return `a / b`; integers are divided towards zero."""
    if a.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """Return `base ** exponent` in the base's type."""
    if not base.is_floating_point():
        # Fractions, and integers beyond float32's 24 bits, on the way; cut at the end.
        return torch.pow(base.double(), exponent.double()).trunc().to(base.dtype)
    if _is_number(exponent) and exponent.dim() <= base.dim():
        # PyTorch has kernels of their own for squares, roots and such.
        result = torch.pow(base, exponent.item())
    else:
        result = torch.pow(base, exponent)
    return result.to(base.dtype)


_BINARY: Final[Mapping[str, Binary]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": divide,
    "Pow": power,
    "Greater": torch.gt,
    "Less": torch.lt,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}
"""Ops that broadcast as NumPy does from opset 7 on."""


def equal(a: Tensor | Array, b: Tensor | Array) -> Tensor:
    """Return where tensors, or arrays of strings, are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.eq(a, b)
    return torch.from_numpy(np.asarray(a == b, dtype=np.bool_))


def _run_unary(function: Unary, _call: Call, x: Tensor) -> Tensor:
    return function(x)


def _run_binary(function: Binary, _call: Call, a: Tensor, b: Tensor) -> Tensor:
    return function(a, b)


def _run_aligned(function: Binary, call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Run an op as before opset 7: `axis` says where b's axes lie among a's."""
    if not call.integer("broadcast", 0):
        if a.shape != b.shape:
            reason = f"shapes {list(a.shape)} and {list(b.shape)} differ without broadcast=1"
            raise call.refuse(reason)
    elif b.numel() == 1:
        b = b.reshape(())
    elif call.has("axis"):
        after = a.dim() - call.integer("axis") % a.dim() - b.dim()
        b = b.reshape([*b.shape, *[1] * after])
    return function(a, b)


for _name, _unary in _UNARY.items():
    TABLE.op(_name)(partial(_run_unary, _unary))
for _name, _binary in _BINARY.items():
    TABLE.op(_name)(partial(_run_aligned, _binary))
    TABLE.op(_name, since=7)(partial(_run_binary, _binary))
TABLE.op("Equal", all_types=True)(partial(_run_aligned, equal))
TABLE.op("Equal", since=7, all_types=True)(partial(_run_binary, equal))
TABLE.op("GreaterOrEqual", since=12)(partial(_run_binary, torch.ge))
TABLE.op("LessOrEqual", since=12)(partial(_run_binary, torch.le))
for _name, _binary in {
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}.items():
    # Bits are bits: unsigned integers, for which CUDA has no kernels, count as signed ones.
    _on_bits = moves_elements()(partial(_run_binary, _binary))
    TABLE.op(_name, since=18, all_types=True)(_on_bits)


@TABLE.op("Mod", since=10)
def mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Return the remainder with the sign of b, or with that of a if `fmod` is 1."""
    if call.integer("fmod", 0):
        return torch.fmod(a, b)
    rest = torch.remainder(a, b)
    if not rest.is_floating_point():
        return rest
    return torch.where(rest == 0, torch.copysign(rest.detach(), b.detach()), rest)


@TABLE.op("BitShift", since=11)
def bit_shift(call: Call, x: Tensor, by: Tensor) -> Tensor:
    """Return x shifted; by its width or more, nothing but copies of the sign is left."""
    direction = call.text("direction")
    if direction not in ("LEFT", "RIGHT"):
        reason = f"direction is {direction!r}, not LEFT or RIGHT"
        raise call.refuse(reason)
    shift = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    return shift(x, by)


@TABLE.op("Max")
def maximum(_call: Call, *tensors: Tensor) -> Tensor:
    """Return the largest of each element; NaN wins."""
    return reduce(torch.maximum, tensors)


@TABLE.op("Min")
def minimum(_call: Call, *tensors: Tensor) -> Tensor:
    """Return the smallest of each element; NaN wins."""
    return reduce(torch.minimum, tensors)


@TABLE.op("Sum")
def sum_of(_call: Call, *tensors: Tensor) -> Tensor:
    """Return the sum of tensors."""
    return reduce(torch.add, tensors)


@TABLE.op("Mean")
def mean_of(_call: Call, *tensors: Tensor) -> Tensor:
    """Return the mean of tensors."""
    return reduce(torch.add, tensors) / len(tensors)


@TABLE.op("Clip")
def clip_by_attributes(call: Call, x: Tensor) -> Tensor:
    """Return x limited by attributes."""
    low = call.number("min") if call.has("min") else None
    high = call.number("max") if call.has("max") else None
    return _clip(x, low, high)


@TABLE.op("Clip", since=11)
def clip(_call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Return x limited by inputs; where they cross, the upper one."""
    if all(each is None or _is_number(each) for each in (low, high)):
        # Several times as fast as bounds in tensors.
        return _clip(x, *(None if each is None else each.item() for each in (low, high)))
    return torch.clamp(x, *(None if each is None else each.reshape(()) for each in (low, high)))


@TABLE.op("Where", since=9, all_types=True)
def where(_call: Call, condition: Tensor, a: Tensor | Array, b: Tensor | Array) -> Tensor | Array:
    """Return elements of a where the condition holds, of b elsewhere."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.where(condition, a, b)
    chosen: Array = np.where(condition.cpu().numpy(), a, b)
    return chosen


@TABLE.op("IsNaN", since=9)
def is_nan(_call: Call, x: Tensor) -> Tensor:
    """Return where x is not a number."""
    return torch.isnan(x)


@TABLE.op("IsInf", since=10)
def is_inf(call: Call, x: Tensor) -> Tensor:
    """Return where x is infinite, in the directions that are asked for."""
    if x.itemsize == 1:
        x = x.to(torch.float32)
    up, down = call.integer("detect_positive", 1), call.integer("detect_negative", 1)
    if up and down:
        return torch.isinf(x)
    if not up and not down:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if up else torch.isneginf(x)


def _is_number(x: Tensor) -> bool:
    """Whether x is one number that is at hand and that no gradient is wanted for."""
    return x.numel() == 1 and x.device.type == "cpu" and not x.requires_grad


def _clip(x: Tensor, low: float | None, high: float | None) -> Tensor:
    if x.is_floating_point():
        # PyTorch takes no bounds that the type cannot hold; these limit nothing.
        largest = torch.finfo(x.dtype).max
        low = None if low is None or low < -largest else low
        high = None if high is None or high > largest else high
    return x if low is None and high is None else torch.clamp(x, low, high)
