"""Moving elements that PyTorch has no kernels for: as others of the same width, or as indices.

An op that only moves elements gives the same answer whatever the bits mean. Unsigned integers of
16 bits and more and 8-bit floats travel as signed integers, strings as indices into a list.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import Array, Value
from qcompiler.execution.torch.op_table import OpFunction

_STAND_INS: Final = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e4m3fnuz: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.float8_e5m2fnuz: torch.int8,
    torch.float8_e8m0fnu: torch.int8,
}
_INT64_MIN: Final = -(1 << 63)


def moves_elements(data: int = 0) -> Callable[[OpFunction], OpFunction]:
    """Make a function that moves elements of ordinary types take those of every type.

    All results of the function have to be of the type of input `data`, and what it fills with
    unless told otherwise has to be zero (the empty string).
    """

    def extend(function: OpFunction) -> OpFunction:
        @wraps(function)
        def move(call: Call, *inputs: Value) -> Any:
            moved = inputs[data]
            if isinstance(moved, np.ndarray):
                return _move_texts(function, call, inputs)
            if isinstance(moved, Tensor) and moved.dtype in _STAND_INS:
                return _move_bits(function, call, inputs, moved.dtype)
            return function(call, *inputs)

        return move

    return extend


def _move_bits(
    function: OpFunction, call: Call, inputs: Sequence[Value], dtype: torch.dtype
) -> Any:
    alike = [
        each.view(_STAND_INS[dtype]) if isinstance(each, Tensor) and each.dtype == dtype else each
        for each in inputs
    ]
    return _each(function(call, *alike), lambda result: result.view(dtype))


def _move_texts(function: OpFunction, call: Call, inputs: Sequence[Value]) -> Any:
    texts = [each for each in inputs if isinstance(each, np.ndarray)]
    pool = np.concatenate([np.array([""], dtype=object), *(each.reshape(-1) for each in texts)])
    start, indices = 1, list[Value]()
    for each in inputs:
        if isinstance(each, np.ndarray):
            stop = start + each.size
            indices.append(torch.arange(start, stop).reshape(each.shape))
            start = stop
        else:
            indices.append(each.cpu() if isinstance(each, Tensor) else each)
    return _each(function(call, *indices), lambda result: np.asarray(pool[result.numpy()], object))


def _each(result: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(result, Tensor):
        return change(result)
    return type(result)(change(each) for each in result)


def take(values: Tensor | Array, indices: Tensor, axis: int) -> Value:
    """Return `values` at a list of indices along one axis, for elements of any type."""
    if isinstance(values, np.ndarray):
        return np.take(values, indices.cpu().numpy(), axis)
    if values.dtype in _STAND_INS:
        bits = values.view(_STAND_INS[values.dtype])
        return bits.index_select(axis, indices).view(values.dtype)
    return values.index_select(axis, indices)


def comparable(values: Tensor | Array) -> Tensor:
    """Return values of a type that PyTorch can order, in the same order and equal where equal."""
    if isinstance(values, np.ndarray):
        _, ranks = np.unique(values.astype(str), return_inverse=True)
        return torch.from_numpy(ranks.reshape(values.shape))
    if values.dtype in (torch.uint16, torch.uint32):
        return values.to(torch.int64)
    if values.dtype == torch.uint64:
        return values.view(torch.int64) ^ _INT64_MIN
    return values.float() if values.dtype in _STAND_INS else values


def restored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `comparable` for a tensor of this type."""
    if dtype == torch.uint64:
        return (values ^ _INT64_MIN).view(dtype)
    return values.to(dtype)
