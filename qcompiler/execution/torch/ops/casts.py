"""Conversions between element types: Cast, CastLike, BitCast (ONNX operators, `Operators.md`)."""

from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import STORAGE, Array, onnx_type, to_numpy, to_torch
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.small_floats import (
    SMALL_FLOATS,
    as_computable,
    to_e8m0,
    to_small_float,
)

TABLE = OpTable()
_NARROW: Final = frozenset(
    {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2}
)
_FLOAT4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of FLOAT4E2M1 in the order of their codes."""


@TABLE.op("Cast", all_types=True)
def cast_old(call: Call, x: Tensor | Array) -> Tensor | Array:
    """Return x in the type that an attribute names by text."""
    return _cast(call, x, ir.DataType[call.text("to").upper()])


@TABLE.op("Cast", since=6, all_types=True)
def cast(call: Call, x: Tensor | Array) -> Tensor | Array:
    """Return x in another type."""
    return _cast(call, x, call.element_type("to"))


@TABLE.op("CastLike", since=15, all_types=True)
def cast_like(call: Call, x: Tensor | Array, like: Tensor | Array) -> Tensor | Array:
    """Return x in the type of another tensor."""
    declared = call.input_type(1) or call.output_type()
    known = onnx_type(like.dtype) if isinstance(like, Tensor) else ir.DataType.STRING
    return _cast(call, x, declared or known)


@TABLE.op("BitCast", since=26, all_types=True)
def bit_cast(call: Call, x: Tensor) -> Tensor:
    """Return x's bits read as another type of the same width."""
    target = call.element_type("to")
    source = call.input_type(0) or onnx_type(x.dtype)
    if ir.DataType.STRING in (source, target) or source.bitwidth != target.bitwidth:
        reason = f"{source.name} and {target.name} are not of the same width"
        raise call.refuse(reason)
    _require_storage(call, target)
    if target.bitwidth < 8:
        return _narrow_from_bits(_narrow_bits(x, source), target)
    # The program may keep floats in another type than the model's, whose bits these are.
    return call.elements.convert(x.to(STORAGE[source]).view(STORAGE[target]), target)


def _cast(call: Call, x: Tensor | Array, target: ir.DataType) -> Tensor | Array:
    if not isinstance(x, Tensor):
        return _from_text(call, x, target)
    if target is ir.DataType.STRING:
        return _to_text(x)
    _require_storage(call, target)
    stored = call.elements.of(target)
    saturate = bool(call.integer("saturate", 1))
    if target in SMALL_FLOATS:
        return to_small_float(x, target, stored, saturate=saturate)
    if target is ir.DataType.FLOAT8E8M0:
        return to_e8m0(x, _round_mode(call), saturate=saturate)
    if x.is_floating_point() and x.itemsize == 1:
        x = x.to(torch.float32)
    if _are_live_codes(call, x, target):
        return x
    if target in _NARROW:
        return _wrapped(x.to(torch.int64), target)
    return x.to(stored) if stored is STORAGE[target] else _converted(call, x, target)


def _converted(call: Call, x: Tensor, target: ir.DataType) -> Tensor:
    """Return x in a type narrower than the model's: finite floats stay finite."""
    if x.is_floating_point():
        return call.elements.convert(x, target)
    return x.to(call.elements.of(target))


def _require_storage(call: Call, target: ir.DataType) -> None:
    if target not in STORAGE:
        reason = f"PyTorch has no place for {target.name}"
        raise call.refuse(reason)


def _round_mode(call: Call) -> str:
    mode = call.text("round_mode", "up")
    if mode not in ("up", "down", "nearest"):
        reason = f"round_mode is {mode!r}, not up, down or nearest"
        raise call.refuse(reason)
    return mode


def _are_live_codes(call: Call, x: Tensor, target: ir.DataType) -> bool:
    """Whether x holds integers as floats, for their gradient, and the target holds them all."""
    source = call.input_type(0)
    if source is None or not (source.is_integer() and target.is_integer()):
        return False
    if not x.is_floating_point() or not x.requires_grad:
        return False
    if source.is_signed() and not target.is_signed():
        return False
    return target.bitwidth >= source.bitwidth + (target.is_signed() and not source.is_signed())


def _wrapped(x: Tensor, target: ir.DataType) -> Tensor:
    """Return the low bits of int64 values, read as a type below 8 bits."""
    low = x & ((1 << target.bitwidth) - 1)
    if target.is_signed():
        low = torch.where(low >> (target.bitwidth - 1) > 0, low - (1 << target.bitwidth), low)
    return low.to(STORAGE[target])


def _narrow_bits(x: Tensor, source: ir.DataType) -> Tensor:
    """Return the bits of elements below 8 bits, as int64."""
    if source is not ir.DataType.FLOAT4E2M1:
        return x.to(torch.int64) & ((1 << source.bitwidth) - 1)
    magnitudes = x.new_tensor(_FLOAT4)
    code = torch.searchsorted(magnitudes, as_computable(x).abs())
    return code + 8 * x.signbit()


def _narrow_from_bits(bits: Tensor, target: ir.DataType) -> Tensor:
    if target is not ir.DataType.FLOAT4E2M1:
        return _wrapped(bits, target)
    values = torch.tensor([*_FLOAT4, *(-each for each in _FLOAT4)], device=bits.device)
    return values[bits]


def _to_text(x: Tensor) -> Array:
    # NumPy writes its own types only.
    known = as_computable(x) if x.is_floating_point() else x
    texts: Array = to_numpy(known).astype(np.str_).astype(object)
    return texts


def _from_text(call: Call, x: Array, target: ir.DataType) -> Tensor | Array:
    """Return what strings say, by way of float64 or int64."""
    if target is ir.DataType.STRING:
        return x
    try:
        numbers: Array = x.astype(np.float64 if target.is_floating_point() else np.int64)
    except ValueError as error:
        raise call.refuse(str(error)) from error
    return _cast(call, to_torch(numbers).to(call.device), target)
