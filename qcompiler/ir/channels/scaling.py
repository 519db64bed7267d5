"""Dividing the channels of a group by numbers, which constants of the graph take up."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.channels.classes import Ids
from qcompiler.ir.channels.groups import FIXED, ChannelGroup
from qcompiler.ir.channels.tracer import Factor, extents_of
from qcompiler.ir.channels.weights import data_axis, data_input
from qcompiler.ir.editing import add_initializer, fresh_name
from qcompiler.ir.linear_ops import NotFoldableError, cast_finite
from qcompiler.ir.substitution import new_node
from qcompiler.ir.weights import WeightStore, read_all

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
_CHUNK_BYTES: Final = 8 << 20


def per_position(channels: Ids, scales: F64) -> F64:
    """Return the scale at each position, 1 where a channel is fixed."""
    return np.append(scales, 1.0)[np.where(channels == FIXED, len(scales), channels)]


def scale_group(
    group: ChannelGroup, scales: F64, store: WeightStore, taken: set[str], created_by: str
) -> list[ir.Node]:
    """Divide the channels of a group by `scales`; what the model computes stays the same.

    Args:
        group: The group.
        scales: float64 `[count]`, positive.
        store: Where new weights go.
        taken: Names of the model's values; new ones are added.
        created_by: What a Mul that is put in is said to be made by.

    Returns:
        The ops that read a constant that changed, in order, and a Mul where one was put in.

    Raises:
        NotFoldableError: A constant would leave the range of its type; nothing was changed.
    """
    demands = _demands(group.factors)
    made = [_scaled(value, factors, scales) for value, factors, _ in demands]
    for (value, _, uses), values in zip(demands, made, strict=True):
        _write(value, uses, values, store, taken)
    nodes = dict.fromkeys(factor.node for factor in group.factors)
    if group.inserted_at is not None:
        nodes[_insert_mul(group, scales, store, taken, created_by)] = None
    return list(nodes)


def constant_now(node: ir.Node, index: int, found: ir.Value) -> ir.Value:
    """Return the constant at an input of a node, which may have got a copy since it was found."""
    value = node.inputs[index]
    return value if value is not None and value.is_initializer() else found


_Use = tuple[ir.Node, int]
_Demand = tuple[ir.Value, list[Factor], list[_Use]]


def _demands(factors: Sequence[Factor]) -> list[_Demand]:
    """Return what is asked of each constant, and by whom; one constant may be asked for several."""
    by_use: dict[tuple[ir.Value, ir.Node, int], list[Factor]] = {}
    for factor in factors:
        value = constant_now(factor.node, factor.index, factor.value)
        by_use.setdefault((value, factor.node, factor.index), []).append(factor)
    found: dict[tuple[ir.Value, object], _Demand] = {}
    for (value, node, index), asked in by_use.items():
        signature = tuple((f.power, f.ids.shape, f.ids.tobytes()) for f in asked)
        found.setdefault((value, signature), (value, asked, []))[2].append((node, index))
    return list(found.values())


def _scaled(value: ir.Value, factors: Sequence[Factor], scales: F64) -> Array:
    """Return a constant times all the factors that its readers ask for."""
    tensor = value.const_value
    assert tensor is not None
    whole: F64 = np.ones(())
    for factor in factors:
        whole = whole * per_position(factor.ids, scales) ** factor.power
    values = np.atleast_1d(read_all(tensor))
    final = np.broadcast_shapes(tuple(tensor.shape.numpy()), whole.shape)
    shape = np.broadcast_shapes(values.shape, whole.shape)
    values, whole = np.broadcast_to(values, shape), whole.reshape(_padded(whole.shape, len(shape)))
    result = np.empty(shape, tensor.dtype.numpy())
    rows = max(1, _CHUNK_BYTES // max(1, values[:1].size * 8))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        factor_part = whole if whole.shape[0] == 1 else whole[part]
        result[part] = cast_finite(values[part].astype(np.float64) * factor_part, result.dtype)
    _check_not_lost(values, result, value)
    return result.reshape(final)


def _padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape


def _check_not_lost(before: Array, after: Array, value: ir.Value) -> None:
    """Refuse where a constant vanishes that was not 0.

    Raises:
        NotFoldableError: So it is.
    """
    if np.count_nonzero(after) < np.count_nonzero(before):
        message = f"elements of {value.name} would be too small for {after.dtype}"
        raise NotFoldableError(message)


def _write(
    value: ir.Value, uses: Sequence[_Use], values: Array, store: WeightStore, taken: set[str]
) -> None:
    """Put the new constant in place, under a new name where others read the old one."""
    tensor = value.const_value
    assert tensor is not None
    direct = all(node.inputs[index] is value for node, index in uses)
    readers = {(use.node, use.idx) for use in value.uses()}
    if not (direct and readers - set(uses)):
        value.const_value = store.put(value.name or "", values, tensor.dtype)
        value.shape = ir.Shape(values.shape)
        return
    graph = value.graph
    assert graph is not None
    name = fresh_name(f"{value.name}.scaled", taken)
    copy = add_initializer(graph, name, store.put(name, values, tensor.dtype))
    for node, index in uses:
        node.replace_input_with(index, copy)


def _insert_mul(
    group: ChannelGroup, scales: F64, store: WeightStore, taken: set[str], created_by: str
) -> ir.Node:
    """Put a Mul by the reciprocal scales between a value and the group's readers."""
    data, first = group.inserted_at, group.readers[0].site
    assert data is not None
    graph, rank, axis = first.node.graph, len(extents_of(data) or ()), data_axis(first)
    assert isinstance(graph, ir.Graph)
    assert axis is not None
    assert data.dtype is not None
    factors = 1.0 / per_position(group.readers[0].channels, scales)
    shape = [1] * rank
    shape[axis] = len(factors)
    name = fresh_name(f"{data.name}.equalized", taken)
    values = cast_finite(factors.reshape(shape), data.dtype.numpy())
    stem = fresh_name(f"{name}.factor", taken)
    constant = add_initializer(graph, stem, store.put(stem, values, data.dtype))
    node = new_node(created_by, "Mul", [data, constant], name, dtype=data.dtype)
    node.outputs[0].shape = data.shape
    graph.insert_before(_first(graph, [reader.site.node for reader in group.readers]), node)
    for reader in group.readers:
        position = data_input(reader.site)
        assert position is not None
        reader.site.node.replace_input_with(position, node.outputs[0])
    return node


def _first(graph: ir.Graph, nodes: list[ir.Node]) -> ir.Node:
    wanted = set(nodes)
    return next(node for node in graph if node in wanted)
