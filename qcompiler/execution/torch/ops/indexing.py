"""Ops that pick and replace elements by index (ONNX operators, `Operators.md`)."""

import math
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import Array
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.moving import comparable, moves_elements, restored, take

TABLE = OpTable()
_REDUCTIONS: Final = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
_REDUCTIONS_SINCE: Final = {"none": 1, "add": 16, "mul": 16, "max": 18, "min": 18}


@TABLE.op("Gather", all_types=True)
@moves_elements()
def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Return slices of x along an axis, in the shape of `indices`."""
    axis = call.integer("axis", 0) % x.dim()
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        # An embedding: its backward pass is faster than that of general indexing.
        return functional.embedding(_counted_from_start(indices, x.shape[0]), x)
    places: tuple[Any, ...] = (*[slice(None)] * axis, indices.to(torch.int64))
    return x[places]


@TABLE.op("GatherElements", since=11, all_types=True)
@moves_elements()
def gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Return elements of x, each from its own place on all axes but one."""
    axis = call.integer("axis", 0)
    return x.gather(axis, _counted_from_start(indices, x.shape[axis]))


@TABLE.op("GatherND", since=11, all_types=True)
@moves_elements()
def gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Return slices of x at tuples of indices, which are the last axis of `indices`."""
    batches = call.integer("batch_dims", 0)
    rank = indices.dim() - 1
    places = [
        torch.arange(x.shape[axis], device=x.device).reshape([-1, *[1] * (rank - 1 - axis)])
        for axis in range(batches)
    ]
    return x[(*places, *indices.to(torch.int64).unbind(-1))]


@TABLE.op("Scatter", since=9, all_types=True)
@TABLE.op("ScatterElements", since=11, all_types=True)
def scatter_elements(call: Call, x: Any, indices: Tensor, updates: Any) -> Any:
    """Return x with elements replaced, each at its own place on all axes but one."""
    if _reduction(call) == "none":
        return _replace_elements(call, x, indices, updates)
    axis = call.integer("axis", 0)
    places = _counted_from_start(indices, x.shape[axis])
    return _reduced(call, x, axis, places, updates)


@moves_elements()
def _replace_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = call.integer("axis", 0)
    x, updates = _alike(x, updates)
    return x.scatter(axis, _counted_from_start(indices, x.shape[axis]), updates)


@TABLE.op("ScatterND", since=11, all_types=True)
def scatter_nd(call: Call, x: Any, indices: Tensor, updates: Any) -> Any:
    """Return x with slices replaced at tuples of indices, the last axis of `indices`."""
    if _reduction(call) == "none":
        return _replace_slices(call, x, indices, updates)
    depth = indices.shape[-1]
    sizes, rest = x.shape[:depth], x.shape[depth:]
    places = torch.zeros_like(indices[..., 0], dtype=torch.int64)
    for size, part in zip(sizes, indices.unbind(-1), strict=True):
        places = places * size + _counted_from_start(part, size)
    rows = x.reshape(math.prod(sizes), math.prod(rest))
    added = updates.reshape(places.numel(), math.prod(rest))
    columns = places.reshape(-1, 1).expand(added.shape)
    return _reduced(call, rows, 0, columns, added).reshape(x.shape)


@moves_elements()
def _replace_slices(_call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    x, updates = _alike(x, updates)
    result: Tensor = x.index_put(indices.to(torch.int64).unbind(-1), updates)
    return result


def _reduced(call: Call, x: Tensor | Array, axis: int, places: Tensor, updates: Tensor) -> Tensor:
    """Return x with updates added, multiplied, or compared in along an axis."""
    if isinstance(x, np.ndarray):
        reason = "strings cannot be reduced"
        raise call.refuse(reason)
    ordered, new = _alike(comparable(x), comparable(updates))
    reduction = _REDUCTIONS[_reduction(call)]
    if x.dtype == torch.uint64 and reduction in ("sum", "prod"):
        # Sums and products wrap to the same bits with and without a sign.
        ordered, new = x.view(torch.int64), updates.view(torch.int64)
        return ordered.scatter_reduce(axis, places, new, reduction).view(torch.uint64)
    result = ordered.scatter_reduce(axis, places, new, reduction)
    return result if x.dtype == result.dtype or new.requires_grad else restored(result, x.dtype)


def _reduction(call: Call) -> str:
    reduction = call.text("reduction", "none")
    if call.version < _REDUCTIONS_SINCE.get(reduction, call.version + 1):
        reason = f"version {call.version} has no reduction {reduction}"
        raise call.refuse(reason)
    return reduction


def _alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors in one type: codes that carry gradients are floats."""
    if left.dtype == right.dtype:
        return left, right
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def _counted_from_start(indices: Tensor, length: int) -> Tensor:
    """Return int64 indices, negative ones counted from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + length, indices)


@TABLE.op("OneHot", since=9, host=(1,), all_types=True)
@moves_elements(data=2)
def one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """Return `values[1]` where an index is met on a new axis, and `values[0]` elsewhere."""
    classes = int(depth.item())
    rank = indices.dim() + 1
    axis = call.integer("axis", -1) % rank
    places = indices.to(torch.int64)
    if call.version >= 11:
        places = _counted_from_start(places, classes)
    steps = torch.arange(classes, device=places.device)
    is_met = places.unsqueeze(axis) == steps.reshape([-1, *[1] * (rank - 1 - axis)])
    off, on = values.unbind()
    return torch.where(is_met, on, off)


@TABLE.op("NonZero", since=9, all_types=True)
def non_zero(_call: Call, x: Any) -> Tensor:
    """Return the indices of all elements but zeros, [rank, count]."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x != "").nonzero().T
    places: Tensor = x.to(torch.bool).nonzero()  # which every type can be cast to
    return places.T


@TABLE.op("Compress", since=9, all_types=True)
@moves_elements()
def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    """Return the slices along an axis, or elements of all x, for which a condition holds."""
    chosen = condition.nonzero().reshape(-1)
    if not call.has("axis"):
        return x.reshape(-1).index_select(0, chosen)
    return x.index_select(call.integer("axis"), chosen)


@TABLE.op("Unique", since=11, all_types=True)
def unique(call: Call, x: Tensor | Array) -> Any:
    """Return the distinct slices or elements, their first places, who has which, and counts."""
    axis = call.integer("axis") if call.has("axis") else None
    values = x.reshape(-1) if axis is None else x
    keys = comparable(values)
    place = axis or 0
    _, inverse, counts = torch.unique(
        keys, return_inverse=True, return_counts=True, dim=None if axis is None else axis
    )
    # PyTorch does not tell where each came first.
    steps = torch.arange(inverse.numel(), device=inverse.device)
    first = torch.zeros_like(counts).scatter_reduce(0, inverse, steps, "amin", include_self=False)
    if not call.integer("sorted", 1):
        order = first.argsort()
        first, counts = first[order], counts[order]
        inverse = order.argsort()[inverse]
    results = (take(values, first, place), first, inverse, counts)
    return results[: call.outputs]


@TABLE.op("TopK", all_types=True)
def top_k_by_attribute(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k largest elements along an axis, and their indices."""
    return _top_k(call, x, call.integer("k"))


@TABLE.op("TopK", since=10, host=(1,), all_types=True)
def top_k(call: Call, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k largest or smallest elements along an axis in order, and their indices."""
    return _top_k(call, x, int(k.item()))


def _top_k(call: Call, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    axis = call.integer("axis", -1)
    # `torch.topk` does not promise that of equal elements the first wins.
    ordered, indices = comparable(x).sort(
        dim=axis, descending=bool(call.integer("largest", 1)), stable=True
    )
    values = ordered.narrow(axis, 0, count)
    if values.dtype != x.dtype:
        values = restored(values, x.dtype)
    return values, indices.narrow(axis, 0, count)


@TABLE.op("TensorScatter", since=24, all_types=True)
@moves_elements()
def tensor_scatter(
    call: Call, cache: Tensor, update: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Return a cache with `update` written into it from a start per batch element on."""
    axis = call.integer("axis", -2) % cache.dim()
    mode = call.text("mode", "linear")
    if mode not in ("linear", "circular"):
        reason = f"there is no mode {mode}"
        raise call.refuse(reason)
    batch, length = update.shape[0], update.shape[axis]
    places = torch.arange(length, device=cache.device).expand(batch, length)
    if starts is not None:
        places = places + starts.unsqueeze(1)
    if mode == "circular":
        places = places % cache.shape[axis]
    shape = [1] * cache.dim()
    shape[0], shape[axis] = batch, length
    cache, update = _alike(cache, update)
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update)
