"""Groups of channels that a graph can scale freely, and what must change when it does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.channels import elementwise, movement, weights
from qcompiler.ir.channels.classes import Ids
from qcompiler.ir.channels.reshaping import Extent
from qcompiler.ir.channels.tracer import Factor, OpKey, Place, Relation, Tracer, extents_of
from qcompiler.ir.channels.weights import data_axis, data_input
from qcompiler.ir.dataflow import int_attribute, is_op, node_label
from qcompiler.ir.quantizable import Site

RELATIONS: Final[Mapping[OpKey, Relation]] = {
    **elementwise.RELATIONS,
    **movement.RELATIONS,
    **weights.RELATIONS,
}
"""What every op that commutes with a scale asks of its other values."""

FIXED: Final = -1
"""The channel number of what is not scaled."""
_COPIED_BYTES: Final = 64 << 10
"""Constants up to this size are copied where something else reads them too."""


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """An op that multiplies scaled data by a weight.

    Attributes:
        site: The op and its weight.
        data: The value that is scaled.
        channels: int64 `[K]`: for each position along the weight's reduction axis, the channel
            of the group, or `FIXED`. K counts the channels of all groups of a convolution.
    """

    site: Site
    data: ir.Value
    channels: Ids


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Channels that can be divided by any positive numbers, since constants take these up.

    Attributes:
        count: How many channels; each has a number of its own.
        readers: The ops whose data is scaled, in graph order.
        factors: The constants that change, their ids replaced by channels of the group.
        values: For every value that is scaled, the channel of each position.
        reasons: Why some channels are fixed, empty where none is.
        inserted_at: Where the scale needs a Mul of its own: the value behind which it goes.
    """

    count: int
    readers: tuple[Reader, ...]
    factors: tuple[Factor, ...]
    values: Mapping[ir.Value, Ids]
    reasons: tuple[str, ...] = ()
    inserted_at: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Data whose channels cannot be scaled.

    Attributes:
        data: The value.
        readers: The ops that multiply it by weights.
        reason: Why not, as a sentence without a full stop.
    """

    data: ir.Value
    readers: tuple[Site, ...]
    reason: str


def find_groups(
    sites: Sequence[Site], all_sites: Sequence[Site]
) -> tuple[list[ChannelGroup], list[Refusal]]:
    """Return how the data of some sites can be scaled, and where it cannot.

    Args:
        sites: The sites whose data is wanted scaled.
        all_sites: Every site of the model: those take up scales too.

    Returns:
        Groups and refusals, both in the order of `sites`. A value is in one of them.
    """
    by_node: dict[ir.Node, list[Site]] = {}
    for site in all_sites:
        by_node.setdefault(site.node, []).append(site)
    groups: list[ChannelGroup] = []
    refusals: list[Refusal] = []
    done: set[ir.Value] = set()
    for data, readers in _by_data(sites).items():
        if data in done:
            continue
        axis = data_axis(readers[0])
        found = _trace(data, axis, by_node) if axis is not None else None
        if found is None:
            refusals.append(Refusal(data, tuple(readers), f"the shape of {data.name} is not known"))
        elif isinstance(found, str):
            refusals.append(Refusal(data, tuple(readers), found))
        else:
            groups.append(found)
            done.update(reader.data for reader in found.readers)
    return groups, refusals


def group_behind_mul(data: ir.Value, sites: Sequence[Site]) -> ChannelGroup | str:
    """Return the group of channels that a Mul in front of some sites alone would scale.

    Args:
        data: What they read.
        sites: The sites; others who read the value see it unscaled.

    Returns:
        The group, or why there is none.
    """
    shape, axis = extents_of(data), data_axis(sites[0])
    if shape is None or axis is None or len(shape) < abs(axis) or not _is_extent(shape[axis]):
        return f"the shape of {data.name} is not known"
    size = int(str(shape[axis]))
    by_node: dict[ir.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.node, []).append(site)
    tracer = Tracer(RELATIONS, by_node)
    extents = [1] * len(shape)
    extents[axis] = size
    ids = tracer.layouts[data] = tracer.classes.new(extents)
    for use in data.uses():
        if use.node in by_node and use.idx == data_input(by_node[use.node][0]):
            tracer.visit(Place(use.node, use.idx, is_output=False), ids)
    _respect_sharing(tracer)
    if np.all(tracer.classes.is_fixed(ids)):
        return tracer.classes.reasons(ids)[0]
    return replace(_group(tracer, tuple(tracer.classes.reasons(ids))), inserted_at=data)


def _by_data(sites: Sequence[Site]) -> dict[ir.Value, list[Site]]:
    found: dict[ir.Value, list[Site]] = {}
    for site in sites:
        position = data_input(site)
        value = None if position is None else site.node.inputs[position]
        if value is not None:
            found.setdefault(value, []).append(site)
    return found


def _trace(
    data: ir.Value, axis: int, sites: Mapping[ir.Node, Sequence[Site]]
) -> ChannelGroup | str | None:
    """Follow the channels of a value; return their group, or why there is none."""
    shape = extents_of(data)
    size = None if not shape or len(shape) < abs(axis) else shape[axis]
    if shape is None or not isinstance(size, int) or size == 0:
        return None
    tracer = Tracer(RELATIONS, sites)
    extents = [1] * len(shape)
    extents[axis] = size
    ids = tracer.classes.new(extents)
    tracer.give(data, ids)
    tracer.run()
    _respect_sharing(tracer)
    reasons = tracer.classes.reasons(ids)
    if np.all(tracer.classes.is_fixed(ids)):
        return reasons[0]
    group = _group(tracer, tuple(reasons))
    if group.count == 1 and size > 1:
        return f"all channels of {data.name} would have to have one scale"
    return group


def _is_extent(size: Extent) -> bool:
    return isinstance(size, int) and size > 0


def _respect_sharing(tracer: Tracer) -> None:
    """Where several ops read one weight, ask the same of it for all, or fix its channels."""
    by_weight: dict[tuple[ir.Value, int], list[Factor]] = {}
    for factor in tracer.factors.values():
        by_weight.setdefault((factor.value, factor.power), []).append(factor)
    for (value, _), factors in by_weight.items():
        covered = {(factor.node, factor.index) for factor in factors}
        others = [node for node, index in _leaf_uses(value) if (node, index) not in covered]
        if others and not all(_is_copied(factor, value) for factor in factors):
            reason = (
                f"its weight {value.name} is read by {node_label(others[0])} too, and a copy "
                f"would take {value.const_value.nbytes if value.const_value else 0:,} bytes more"
            )
            for factor in factors:
                tracer.fix(factor.ids, reason)
        elif _is_shown(value) or (others and value.is_graph_input()):
            tracer.fix(factors[0].ids, f"{value.name} is an output of the model")
        elif not all(_is_copied(factor, value) for factor in factors):
            for factor in factors[1:]:
                tracer.classes.unite(factors[0].ids, factor.ids)


def _is_shown(value: ir.Value) -> bool:
    """Whether a constant, or a Transpose of it, is an output of the model or of a body."""
    turned = [use.node.outputs[0] for use in value.uses() if is_op(use.node, "Transpose")]
    return value.is_graph_output() or any(_is_shown(output) for output in turned)


def _is_copied(factor: Factor, value: ir.Value) -> bool:
    """Whether an op gets a copy of a constant that others read as it is."""
    tensor = value.const_value
    direct = factor.node.inputs[factor.index] is value
    return direct and tensor is not None and tensor.nbytes <= _COPIED_BYTES


def _leaf_uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield who reads a value, Transposes looked through."""
    for use in value.uses():
        if is_op(use.node, "Transpose"):
            yield from _leaf_uses(use.node.outputs[0])
        else:
            yield use.node, use.idx


def _group(tracer: Tracer, reasons: tuple[str, ...]) -> ChannelGroup:
    """Number the sets of channels that are free, and drop what has none."""
    numbers: dict[int, int] = {}

    def numbered(ids: Ids) -> Ids:
        roots = tracer.classes.roots(ids)
        fixed = tracer.classes.is_fixed(ids)
        flat = [
            FIXED if held else numbers.setdefault(int(root), len(numbers))
            for root, held in zip(roots.ravel(), fixed.ravel(), strict=True)
        ]
        return np.array(flat, np.int64).reshape(ids.shape)

    values = {value: numbered(ids) for value, ids in tracer.layouts.items()}
    factors = [
        Factor(f.node, f.index, f.value, numbered(f.ids), f.power) for f in tracer.factors.values()
    ]
    scaled = tuple(f for f in factors if np.any(f.ids != FIXED))
    return ChannelGroup(len(numbers), tuple(_readers(tracer, values)), scaled, values, reasons)


def _readers(tracer: Tracer, values: Mapping[ir.Value, Ids]) -> Iterator[Reader]:
    for sites in tracer.sites.values():
        for site in sites:
            position, axis = data_input(site), data_axis(site)
            value = None if position is None else site.node.inputs[position]
            if value not in values or axis is None or value is None:
                continue
            ids = values[value]
            others = [index for index in range(ids.ndim) if index != axis % ids.ndim]
            vector = ids.transpose([*others, axis % ids.ndim]).reshape(-1, ids.shape[axis])[0]
            if np.any(vector != FIXED):
                group = int_attribute(site.node, "group", 1) if site.row.op_type == "Conv" else 1
                wide = np.broadcast_to(vector, (site.reduction * group,))
                yield Reader(site, value, np.array(wide))
