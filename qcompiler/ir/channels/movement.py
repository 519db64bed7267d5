"""Scaled channels through ops that move, pool and combine positions."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.channels.classes import Ids
from qcompiler.ir.channels.reshaping import Extent, reshaped
from qcompiler.ir.channels.tracer import (
    CannotScaleError,
    OpKey,
    Place,
    Relation,
    Tracer,
    extents_of,
)
from qcompiler.ir.channels.weights import lookup
from qcompiler.ir.dataflow import constant_of, int_attribute, ints_attribute
from qcompiler.ir.weights import read_all


def _check_data(place: Place) -> None:
    if not place.is_output and place.index != 0:
        message = "the scaled value is a parameter of the op"
        raise CannotScaleError(message)


def _check_inputs(node: ir.Node) -> None:
    if len(node.inputs) < 2:
        message = "its parameters are attributes of an old operator set"
        raise CannotScaleError(message)


def _transpose(tracer: Tracer, place: Place, ids: Ids) -> None:
    perm = ints_attribute(place.node, "perm") or tuple(reversed(range(ids.ndim)))
    if place.is_output:
        tracer.give(place.node.inputs[0], np.transpose(ids, np.argsort(perm)))
    else:
        tracer.give(place.node.outputs[0], np.transpose(ids, perm))


def _reshape(tracer: Tracer, place: Place, ids: Ids) -> None:
    """Reshape, Flatten, Squeeze and Unsqueeze, by the shapes on both sides."""
    _check_data(place)
    values = place.node.inputs[0], place.node.outputs[0]
    source, target = reversed(values) if place.is_output else values
    shapes = extents_of(source), extents_of(target)
    found = None
    if shapes[0] is not None and shapes[1] is not None:
        found = reshaped(ids, shapes[0], shapes[1])
    if found is None:
        message = "its shapes do not tell where the channels go"
        raise CannotScaleError(message)
    tracer.give(target, found)


def _expand(tracer: Tracer, place: Place, ids: Ids) -> None:
    _check_data(place)
    tracer.give(place.node.inputs[0] if place.is_output else place.node.outputs[0], ids)


def _pool(tracer: Tracer, place: Place, ids: Ids) -> None:
    """Each channel of images alone: pools, resizing."""
    _check_data(place)
    extras = [value for value in place.node.outputs[1:] if value.name]
    if extras or place.index:
        message = "it returns positions as well"
        raise CannotScaleError(message)
    ids = tracer.confined(ids, [1])
    tracer.give(place.node.inputs[0] if place.is_output else place.node.outputs[0], ids)


def _resize(tracer: Tracer, place: Place, ids: Ids) -> None:
    mode = place.node.attributes.get("coordinate_transformation_mode")
    if mode is not None and mode.as_string() == "tf_crop_and_resize":
        message = "it fills what lies outside with a number"
        raise CannotScaleError(message)
    _pool(tracer, place, ids)


def _reduce(tracer: Tracer, place: Place, ids: Ids) -> None:
    """A mean, sum or extreme over axes along which no channels lie."""
    _check_data(place)
    node = place.node
    source = extents_of(node.inputs[0])
    if source is None:
        message = "the shape of what it reads is not known"
        raise CannotScaleError(message)
    axes = _axes(node, 1, len(source))
    kept = int_attribute(node, "keepdims", 1)
    if not place.is_output:
        if any(ids.shape[axis] > 1 for axis in axes):
            message = "it reduces over the channels"
            raise CannotScaleError(message)
        found = ids if kept else ids.reshape([n for a, n in enumerate(ids.shape) if a not in axes])
        tracer.give(node.outputs[0], found)
        return
    if not kept:
        ids = np.expand_dims(ids, tuple(axes))
    tracer.give(node.inputs[0], ids)


def _axes(node: ir.Node, index: int, rank: int) -> list[int]:
    """Return the axes that a reduction works over, as an input or an attribute.

    Raises:
        CannotScaleError: They are computed.
    """
    given = ints_attribute(node, "axes")
    if given is None and len(node.inputs) > index and node.inputs[index] is not None:
        given = tuple(int(axis) for axis in _constant(node, index))
    if not given:
        if int_attribute(node, "noop_with_empty_axes", 0):
            return []
        return list(range(rank))
    return sorted(axis % rank for axis in given)


def _constant(node: ir.Node, index: int) -> list[int]:
    return [int(number) for number in read_all(_tensor(node, index)).reshape(-1)]


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    tensor = constant_of(node.inputs[index])
    if tensor is None:
        message = "its parameters are computed at run time"
        raise CannotScaleError(message)
    return tensor


def _pad(tracer: Tracer, place: Place, ids: Ids) -> None:
    _check_data(place)
    node = place.node
    _check_inputs(node)
    mode = node.attributes.get("mode")
    filled = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    computed = len(node.inputs) > 2 and node.inputs[2] is not None and filled is None
    constant = mode is None or mode.as_string() == "constant"
    if constant and (computed or (filled is not None and np.any(read_all(filled) != 0))):
        message = "it pads with a number that is not 0"
        raise CannotScaleError(message)
    ids = _uniform_where_padded(tracer, node, ids)
    tracer.give(node.inputs[0] if place.is_output else node.outputs[0], ids)


def _uniform_where_padded(tracer: Tracer, node: ir.Node, ids: Ids) -> Ids:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = [axis % ids.ndim for axis in _constant(node, 3)]
    else:
        axes = list(range(ids.ndim))
    tensor = constant_of(node.inputs[1])
    pads = None if tensor is None else _constant(node, 1)
    padded = [
        axis
        for place, axis in enumerate(axes)
        if pads is None or pads[place] or pads[place + len(axes)]
    ]
    return tracer.confined(ids, [axis for axis in range(ids.ndim) if axis not in padded])


def _concat(tracer: Tracer, place: Place, ids: Ids) -> None:
    node = place.node
    axis = int_attribute(node, "axis", 0) % ids.ndim
    part = None if place.is_output else place.index
    whole, pieces = _pieces(tracer, ids, axis, node.inputs, part)
    tracer.give(node.outputs[0], whole)
    for index, piece in enumerate(pieces):
        tracer.give_operand(node, index, piece)


def _split(tracer: Tracer, place: Place, ids: Ids) -> None:
    _check_data(place)
    node = place.node
    axis = int_attribute(node, "axis", 0) % ids.ndim
    part = place.index if place.is_output else None
    whole, pieces = _pieces(tracer, ids, axis, node.outputs, part)
    tracer.give(node.inputs[0], whole)
    for value, piece in zip(node.outputs, pieces, strict=True):
        tracer.give(value, piece)


def _pieces(
    tracer: Tracer, ids: Ids, axis: int, values: Sequence[ir.Value | None], part: int | None
) -> tuple[Ids, list[Ids]]:
    """Return the ids of a value that lies in pieces along an axis, and those of the pieces.

    Args:
        tracer: Makes channels for the pieces that nothing is known of.
        ids: Of the whole, or of one piece.
        axis: The axis.
        values: The pieces.
        part: Which piece `ids` belong to, None for the whole.

    Raises:
        CannotScaleError: Channels lie along the axis, and the extent of a piece is not fixed.
    """
    if ids.shape[axis] == 1:
        return ids, [ids] * len(values)  # pieces are positions: the same channels in each
    sizes = [_extent(value, axis) for value in values]
    if part is not None:
        made = [tracer.classes.new(_with(ids.shape, axis, size)) for size in sizes]
        made[part] = ids
        return np.concatenate(made, axis), made
    starts = np.cumsum([0, *sizes])
    return ids, [
        ids.take(range(start, start + size), axis)
        for start, size in zip(starts, sizes, strict=False)
    ]


def _slice(tracer: Tracer, place: Place, ids: Ids) -> None:
    _check_data(place)
    node = place.node
    _check_inputs(node)
    source, target = node.inputs[0], node.outputs[0]
    shape = extents_of(source)
    if shape is None:
        message = "the shape of what it reads is not known"
        raise CannotScaleError(message)
    index = _slices(node, ids, shape)
    if not place.is_output:
        tracer.give(target, ids[index])
        return
    sliced = [part != slice(None) for part in index]
    extents = [_extent(source, a) if cut else ids.shape[a] for a, cut in enumerate(sliced)]
    whole = tracer.classes.new(extents)
    whole[index] = ids
    tracer.give(source, whole)


def _slices(node: ir.Node, ids: Ids, shape: Sequence[Extent]) -> tuple[slice, ...]:
    """Return what a Slice takes along the axes with channels; elsewhere all of it."""
    rank = len(shape)
    index = [slice(None)] * rank
    if all(extent == 1 for extent in ids.shape):
        return tuple(index)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = [axis % rank for axis in _constant(node, 3)]
    else:
        axes = list(range(_extent(node.inputs[1], 0)))
    for place, axis in enumerate(axes):
        if ids.shape[axis] == 1:
            continue
        start, stop = _constant(node, 1)[place], _constant(node, 2)[place]
        step = _constant(node, 4)[place] if len(node.inputs) > 4 and node.inputs[4] else 1
        size = shape[axis]
        # Backwards, a stop before the first element lies beyond -size, where Python would wrap.
        whole = step < 0 and isinstance(size, int) and stop < -size
        index[axis] = slice(start, None if whole else stop, step)
    return tuple(index)


def _gather(tracer: Tracer, place: Place, ids: Ids) -> None:
    """A table of weights, or positions taken from a value along one axis."""
    if lookup(tracer, place, ids):
        return
    _check_data(place)
    node = place.node
    shapes = extents_of(node.inputs[0]), extents_of(node.inputs[1])
    if shapes[0] is None or shapes[1] is None:
        message = "the shape of what it reads is not known"
        raise CannotScaleError(message)
    axis = int_attribute(node, "axis", 0) % len(shapes[0])
    width = len(shapes[1])
    if place.is_output:
        if any(extent > 1 for extent in ids.shape[axis : axis + width]):
            message = "it picks single channels"
            raise CannotScaleError(message)
        lead, tail = ids.shape[:axis], ids.shape[axis + width :]
        tracer.give(node.inputs[0], ids.reshape([*lead, 1, *tail]))
        return
    found, middle = ids, [1] * width
    if ids.shape[axis] > 1:
        indices = read_all(_tensor(node, 1))
        found, middle = ids.take(indices.reshape(-1), axis), list(indices.shape)
    tracer.give(
        node.outputs[0], found.reshape([*ids.shape[:axis], *middle, *ids.shape[axis + 1 :]])
    )


def _extent(value: ir.Value | None, axis: int) -> int:
    size = _size(value, axis)
    if not isinstance(size, int):
        message = f"axis {axis} of {'' if value is None else value.name} has no fixed extent"
        raise CannotScaleError(message)
    return size


def _size(value: ir.Value | None, axis: int) -> object:
    shape = extents_of(value)
    return None if shape is None else shape[axis]


def _with(shape: Sequence[int], axis: int, size: int) -> list[int]:
    return [size if index == axis else extent for index, extent in enumerate(shape)]


_POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")

RELATIONS: dict[OpKey, Relation] = {
    ("", "Transpose"): _transpose,
    **{("", op): _reshape for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")},
    ("", "Expand"): _expand,
    **{("", op): _pool for op in _POOLS},
    ("", "Resize"): _resize,
    ("", "Upsample"): _resize,
    **{("", op): _reduce for op in _REDUCTIONS},
    ("", "Pad"): _pad,
    ("", "Concat"): _concat,
    ("", "Split"): _split,
    ("", "Slice"): _slice,
    ("", "Gather"): _gather,
}
