"""Reductions along axes, positions of extremes, running totals (ONNX `Operators.md`)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
Reduction = Callable[[Tensor, list[int], bool], Tensor]
"""`f(x, axes, keepdims)`: x reduced along its axes, which are not negative; none is none."""


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    # PyTorch takes an empty list for all axes.
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not axes:
        return x
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    total = _sum(x, axes, keep)
    return torch.div(total, x.numel() // max(total.numel(), 1), rounding_mode="trunc")


def _max(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, lowest=True)
    return torch.amax(x, axes, keepdim=keep) if axes else x


def _min(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, lowest=False)
    return torch.amin(x, axes, keepdim=keep) if axes else x


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not axes:
        return x.abs()
    # Unlike the root of a sum of squares, this has a gradient at zero.
    norm: Tensor = torch.linalg.vector_norm(_as_float(x), 2, axes, keep)
    return norm.to(x.dtype)


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(_as_float(x), axes, keep).log().to(x.dtype)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(_as_float(x), axes, keepdim=keep).to(x.dtype) if axes else x


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x.square(), axes, keep)


def _as_float(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.float64)


def _of_nothing(x: Tensor, axes: list[int], keep: bool, *, lowest: bool) -> Tensor:
    """Return the extreme of each empty set of values: an infinity or the type's own bound."""
    if x.is_floating_point():
        bound: float = -torch.inf if lowest else torch.inf
    elif x.dtype is torch.bool:
        bound = not lowest
    else:
        bound = torch.iinfo(x.dtype).min if lowest else torch.iinfo(x.dtype).max
    shape = torch.sum(x, axes, keepdim=keep).shape if axes else x.shape
    return x.new_full(shape, bound)


def _run_with_attribute(function: Reduction, call: Call, x: Tensor) -> Tensor:
    """Reduce along the axes of an attribute; without it, along all."""
    axes = call.integers("axes", [])
    return _reduce(function, call, x, axes or list(range(x.dim())))


def _run_with_input(
    function: Reduction, call: Call, x: Tensor, axes: Tensor | None = None
) -> Tensor:
    """Reduce along the axes of an input; without any, along all or none as an attribute says."""
    chosen: list[int] = [] if axes is None else axes.tolist()
    if not chosen and not call.integer("noop_with_empty_axes", 0):
        chosen = list(range(x.dim()))
    return _reduce(function, call, x, chosen)


def _reduce(function: Reduction, call: Call, x: Tensor, axes: list[int]) -> Tensor:
    keep = bool(call.integer("keepdims", 1))
    return function(x, [axis % x.dim() for axis in axes] if x.dim() else [], keep)


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _max,
    "ReduceMean": _mean,
    "ReduceMin": _min,
    "ReduceProd": _prod,
    "ReduceSum": _sum,
    "ReduceSumSquare": _sum_square,
}
for _name, _function in _REDUCTIONS.items():
    TABLE.op(_name)(partial(_run_with_attribute, _function))
    _since = 13 if _name == "ReduceSum" else 18
    TABLE.op(_name, since=_since, host=(1,))(partial(_run_with_input, _function))


@TABLE.op("ArgMax")
def arg_max(call: Call, x: Tensor) -> Tensor:
    """Return where the largest element is, as int64; of several, the first or the last."""
    return _position(call, x, torch.argmax)


@TABLE.op("ArgMin")
def arg_min(call: Call, x: Tensor) -> Tensor:
    """Return where the smallest element is, as int64; of several, the first or the last."""
    return _position(call, x, torch.argmin)


def _position(call: Call, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    axis = call.integer("axis", 0)
    keep = bool(call.integer("keepdims", 1))
    if not call.integer("select_last_index", 0) or not x.dim():
        return function(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)


@TABLE.op("CumSum", since=11, host=(1,))
def cum_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Return running sums along an axis."""
    return _running(call, x, int(axis.item()), torch.cumsum, 0)


@TABLE.op("CumProd", since=26, host=(1,))
def cum_prod(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Return running products along an axis."""
    return _running(call, x, int(axis.item()), torch.cumprod, 1)


def _running(
    call: Call, x: Tensor, axis: int, function: Callable[..., Tensor], start: int
) -> Tensor:
    """Run along an axis, from either end, with or without the element itself."""
    backward = call.integer("reverse", 0)
    values = x.flip(axis) if backward else x
    if call.integer("exclusive", 0) and x.shape[axis]:
        first = torch.full_like(values.narrow(axis, 0, 1), start)
        values = torch.cat([first, values.narrow(axis, 0, x.shape[axis] - 1)], axis)
    result = function(values, axis, dtype=x.dtype)
    return result.flip(axis) if backward else result


@TABLE.op("Det", since=11)
def det(_call: Call, x: Tensor) -> Tensor:
    """Return determinants of square matrices, [..., M, M]."""
    # PyTorch factorizes no matrices of 16 bits.
    wide = x.to(torch.float32) if x.itemsize < 4 else x
    result: Tensor = torch.linalg.det(wide)
    return result.to(x.dtype)
