"""Constants, ranges and shapes (ONNX operators, `Operators.md`)."""

import math
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import Value, onnx_type, texts_of, to_torch
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_SMALL: Final = 64
"""Integers of up to this many elements are shapes and indices: they stay on the CPU."""


@TABLE.op("Identity", all_types=True)
def identity(_call: Call, x: Value) -> Value:
    """Return the value itself, of whatever kind."""
    return x


@TABLE.op("Constant", all_types=True)
def constant(call: Call) -> Value:
    """Return what an attribute holds; a plain `value` tensor is a weight and never gets here."""
    name, attribute = next(iter(call.node.attributes.items()))
    if name.startswith("value_string"):
        texts = [attribute.value] if name == "value_string" else list(attribute.value)
        array = np.array(texts, dtype=object)
        return array.reshape(()) if name == "value_string" else array
    if name in ("value_int", "value_ints"):
        return torch.tensor(attribute.value, dtype=torch.int64)
    if name in ("value_float", "value_floats"):
        dtype = call.elements.of(ir.DataType.FLOAT)
        return torch.tensor(attribute.value, dtype=dtype, device=call.device)
    if name == "value":
        return _tensor(call, call.tensor("value"))
    reason = f"a constant given as {name} is not supported"
    raise call.refuse(reason)


@TABLE.op("ConstantOfShape", since=9, host=(0,), all_types=True)
def constant_of_shape(call: Call, shape: Tensor) -> Value:
    """Return a tensor of one value, float32 zero unless the attribute gives another."""
    sizes = shape.tolist()
    if not call.has("value"):
        dtype = call.elements.of(ir.DataType.FLOAT)
        return torch.zeros(sizes, dtype=dtype, device=call.device)
    given = _tensor(call, call.tensor("value"))
    if isinstance(given, np.ndarray):
        return np.full(sizes, given.reshape(-1)[0], dtype=object)
    assert isinstance(given, Tensor)
    place = _place(call, math.prod(sizes), given.dtype)
    return given.to(place).reshape(-1)[:1].reshape([1] * len(sizes)).expand(sizes)


@TABLE.op("Range", since=11, host=(0, 1, 2))
def range_(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Return `start + i * delta` for every i that stays short of `limit`.

    Types of 16 bits are computed in float32, as `stash_type` says.
    """
    if call.integer("stash_type", 1) != ir.DataType.FLOAT.value:
        reason = "a stash_type other than float32 is not supported"
        raise call.refuse(reason)
    count = _steps_between(start, limit, delta)
    place = _place(call, count, start.dtype)
    dtype = torch.float32 if start.is_floating_point() and start.itemsize < 4 else start.dtype
    first, step = (each.reshape(()).to(place, dtype) for each in (start, delta))
    return (first + torch.arange(count, dtype=dtype, device=place) * step).to(start.dtype)


def _steps_between(start: Tensor, limit: Tensor, delta: Tensor) -> int:
    first, last, step = start.item(), limit.item(), delta.item()
    if start.is_floating_point():
        return max(0, math.ceil((last - first) / step))
    # Floats would lose the low digits of large integers.
    return max(0, -int((first - last) // step))


@TABLE.op("EyeLike", since=9)
def eye_like(call: Call, x: Tensor) -> Tensor:
    """Return ones on a diagonal of zeros, in the shape of a matrix."""
    dtype = call.elements.of(call.element_type("dtype")) if call.has("dtype") else x.dtype
    ones = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    diagonal = call.integer("k", 0)
    return (ones.triu(diagonal) & ones.tril(diagonal)).to(dtype)


@TABLE.op("Shape", all_types=True)
def shape_of(call: Call, x: Any) -> Tensor:
    """Return the sizes of axes `start` up to `end`, as int64."""
    sizes = list(x.shape)
    # Slices of Python clamp out-of-range bounds and count from the end, as this op does.
    start = call.integer("start", 0)
    end = call.integer("end", len(sizes))
    return torch.tensor(sizes[start:end], dtype=torch.int64)


@TABLE.op("Size", all_types=True)
def size_of(_call: Call, x: Any) -> Tensor:
    """Return the number of elements, as an int64 scalar."""
    return torch.tensor(math.prod(x.shape), dtype=torch.int64)


def _tensor(call: Call, given: ir.TensorProtocol) -> Value:
    if given.dtype is ir.DataType.STRING:
        return texts_of(given)
    return call.elements.convert(to_torch(given.numpy()), given.dtype)


def _place(call: Call, count: int, dtype: torch.dtype) -> torch.device:
    """Return where a made tensor goes: what may be a shape or an index stays on the CPU."""
    is_index = onnx_type(dtype) in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    return torch.device("cpu") if is_index and count <= _SMALL else call.device
