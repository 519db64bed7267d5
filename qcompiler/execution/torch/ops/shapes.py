"""Ops that give elements other places, and padding (ONNX operators, `Operators.md`)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.moving import moves_elements

TABLE = OpTable()


@TABLE.op("Reshape", all_types=True)
@moves_elements()
def reshape_by_attribute(call: Call, x: Tensor) -> Tensor:
    """Return x in another shape; 0 keeps a size and -1 takes what is left."""
    return x.reshape(_sizes_kept(x, call.integers("shape")))


@TABLE.op("Reshape", since=5, host=(1,), all_types=True)
@moves_elements()
def reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Return x in another shape; -1 takes what is left, 0 keeps a size unless `allowzero`."""
    sizes = shape.tolist()
    if 0 in sizes and not call.integer("allowzero", 0):
        sizes = _sizes_kept(x, sizes)
    return x.reshape(sizes)


def _sizes_kept(x: Tensor, sizes: Sequence[int]) -> list[int]:
    return [size or x.shape[axis] for axis, size in enumerate(sizes)]


@TABLE.op("Transpose", all_types=True)
@moves_elements()
def transpose(call: Call, x: Tensor) -> Tensor:
    """Return x with its axes in another order, reversed unless `perm` tells one."""
    return x.permute(call.integers("perm", ()) or list(range(x.dim())[::-1]))


@TABLE.op("Squeeze", all_types=True)
@moves_elements()
def squeeze_by_attribute(call: Call, x: Tensor) -> Tensor:
    """Return x without axes of one element."""
    return _squeezed(call, x, call.integers("axes") if call.has("axes") else None)


@TABLE.op("Squeeze", since=13, host=(1,), all_types=True)
@moves_elements()
def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Return x without axes of one element: those that are named, else all there are."""
    return _squeezed(call, x, None if axes is None else axes.tolist())


def _squeezed(call: Call, x: Tensor, axes: Sequence[int] | None) -> Tensor:
    if axes is None:
        return x.squeeze()
    for axis in axes:
        if x.shape[axis] != 1:  # PyTorch would leave the axis as it is
            reason = f"axis {axis} has {x.shape[axis]} elements, not one"
            raise call.refuse(reason)
    return x.squeeze(tuple(axes))


@TABLE.op("Unsqueeze", all_types=True)
@moves_elements()
def unsqueeze_by_attribute(call: Call, x: Tensor) -> Tensor:
    """Return x with new axes of one element."""
    return _unsqueezed(x, call.integers("axes"))


@TABLE.op("Unsqueeze", since=13, host=(1,), all_types=True)
@moves_elements()
def unsqueeze(_call: Call, x: Tensor, axes: Tensor) -> Tensor:
    """Return x with new axes of one element, where the result is to have them."""
    return _unsqueezed(x, axes.tolist() if axes.dim() else [int(axes.item())])


def _unsqueezed(x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@TABLE.op("Flatten", all_types=True)
@moves_elements()
def flatten(call: Call, x: Tensor) -> Tensor:
    """Return x as a matrix: axes before `axis` in rows, the others in columns."""
    axis = call.integer("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@TABLE.op("Expand", since=8, host=(1,), all_types=True)
@moves_elements()
def expand(_call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Return x broadcast against a shape; where that says 1, the size of x stays."""
    sizes = shape.tolist()
    first = len(sizes) - x.dim()
    if first < 0:
        sizes, first = [1] * -first + sizes, 0
    kept = enumerate(x.shape, first)
    sizes[first:] = [size if sizes[axis] == 1 else sizes[axis] for axis, size in kept]
    return x.expand(sizes)


@TABLE.op("Concat", all_types=True)
@moves_elements()
def concat(call: Call, *inputs: Tensor) -> Tensor:
    """Return tensors joined along an axis."""
    return torch.cat(inputs, call.integer("axis", 1 if call.version < 4 else None))


@TABLE.op("Split", host=(1,), all_types=True)
@moves_elements()
def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return pieces along an axis, of the given sizes or of equal ones."""
    axis = call.integer("axis", 0)
    if sizes is not None:
        return tuple(torch.split(x, sizes.tolist(), axis))
    if call.has("split"):
        return tuple(torch.split(x, call.integers("split"), axis))
    return tuple(torch.split(x, _equal_sizes(call, x.shape[axis]), axis))


def _equal_sizes(call: Call, length: int) -> list[int]:
    """Return equal sizes; since version 18 the last may be smaller."""
    count = call.integer("num_outputs", call.outputs)
    size = -(-length // count)
    last = length - size * (count - 1)
    if last < 0 or (last != size and call.version < 18):
        reason = f"an axis of {length} cannot be split into {count} equal parts"
        raise call.refuse(reason)
    return [*[size] * (count - 1), last]


@TABLE.op("Slice", all_types=True)
@moves_elements()
def slice_by_attributes(call: Call, x: Tensor) -> Tensor:
    """Return a box out of x."""
    starts, ends = call.integers("starts"), call.integers("ends")
    axes = call.integers("axes", range(len(starts)))
    return _sliced(x, starts, ends, axes, [1] * len(starts))


@TABLE.op("Slice", since=10, host=(1, 2, 3, 4), all_types=True)
@moves_elements()
def slice_(
    _call: Call,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Return a box out of x, or every n-th element of one; negative steps go backwards."""
    begin = starts.tolist()
    places = list(range(len(begin))) if axes is None else axes.tolist()
    strides = [1] * len(begin) if steps is None else steps.tolist()
    return _sliced(x, begin, ends.tolist(), places, strides)


def _sliced(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int],
    steps: Sequence[int],
) -> Tensor:
    box, turned = [slice(None)] * x.dim(), []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = x.shape[axis]
        if step > 0:
            # PyTorch warns of the lowest integers, which mean "from the start".
            box[axis] = slice(max(start, -length), max(end, -length), step)
        else:
            # PyTorch has no negative steps: the same elements upwards, and then turned round.
            upwards = _indices_downwards(start, end, step, length)[::-1]
            box[axis] = slice(upwards.start, upwards.stop, -step) if upwards else slice(0)
            turned.append(axis)
    result = x[tuple(box)]
    return result.flip(turned) if turned else result


def _indices_downwards(start: int, end: int, step: int, length: int) -> range:
    """Return the indices of a slice; unlike Python, one that starts before 0 has element 0."""
    start += length if start < 0 else 0
    end += length if end < 0 else 0
    return range(max(0, min(start, length - 1)), max(-1, min(end, length - 1)), step)


@TABLE.op("Tile", host=(1, 2), all_types=True)
@moves_elements()
def tile_axis(_call: Call, x: Tensor, tiles: Tensor, axis: Tensor) -> Tensor:
    """Return x repeated along one axis."""
    repeats = [1] * x.dim()
    repeats[int(axis.item())] = int(tiles.item())
    return x.repeat(repeats)


@TABLE.op("Tile", since=6, host=(1,), all_types=True)
@moves_elements()
def tile(_call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    """Return x repeated along every axis."""
    return x.repeat(repeats.tolist())


@TABLE.op("DepthToSpace", all_types=True)
@moves_elements()
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """Return [N, C, H, W] as [N, C / b^2, H b, W b]."""
    block = call.integer("blocksize")
    batch, channels, height, width = x.shape
    depth = channels // (block * block)
    if _is_column_first(call):
        blocks = x.reshape(batch, depth, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    else:
        blocks = x.reshape(batch, block, block, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(batch, depth, height * block, width * block)


@TABLE.op("SpaceToDepth", all_types=True)
@moves_elements()
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """Return [N, C, H, W] as [N, C b^2, H / b, W / b]."""
    block = call.integer("blocksize")
    batch, channels, height, width = x.shape
    rows, columns = height // block, width // block
    blocks = x.reshape(batch, channels, rows, block, columns, block)
    order = (0, 1, 3, 5, 2, 4) if _is_column_first(call) else (0, 3, 5, 1, 2, 4)
    return blocks.permute(order).reshape(batch, channels * block * block, rows, columns)


def _is_column_first(call: Call) -> bool:
    mode = call.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        reason = f"there is no mode {mode}"
        raise call.refuse(reason)
    return mode == "CRD"


@TABLE.op("ReverseSequence", since=10, all_types=True)
@moves_elements()
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """Return x with the first `lengths[b]` steps of every batch element backwards."""
    time, batch = call.integer("time_axis", 0), call.integer("batch_axis", 1)
    sequences = x.movedim((batch, time), (0, 1))
    steps = torch.arange(sequences.shape[1], device=x.device)
    ends = lengths.unsqueeze(1).to(torch.int64)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    rows = torch.arange(sequences.shape[0], device=x.device).unsqueeze(1)
    return sequences[rows, places].movedim((0, 1), (batch, time))


@TABLE.op("Trilu", since=14, host=(1,), all_types=True)
@moves_elements()
def trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    """Return the upper or lower triangle of matrices [..., N, M], zero elsewhere."""
    size = max(x.shape[-2:])
    # Beyond the corners nothing changes, and PyTorch overflows.
    diagonal = 0 if k is None else max(-size, min(int(k.item()), size))
    triangle: Any = torch.triu if call.integer("upper", 1) else torch.tril
    result: Tensor = triangle(x, diagonal)
    return result
