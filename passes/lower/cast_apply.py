"""Gives the terms of a graph their types: values, constants, attributes, and the Casts between."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import all_graphs, all_nodes, is_op, node_name
from qcompiler.ir.editing import (
    add_initializer,
    bypass,
    drop_unused_initializers,
    fresh_name,
    remove_node,
    value_names,
)
from qcompiler.ir.float_types import data_type_of, is_scale
from qcompiler.ir.provenance import CREATED_BY
from qcompiler.ir.substitution import new_node
from qcompiler.passes.lower.cast_constants import ConstantCaster
from qcompiler.passes.lower.cast_graph import FLOAT32_TERM, Read, TypedGraph

_FLOAT: Final = ir.DataType.FLOAT
_TYPE_ATTRIBUTES: Final = {"Cast": "to", "DequantizeLinear": "output_dtype"}


@dataclass(frozen=True, slots=True)
class InsertedCast:
    """A Cast that was put into the graph.

    Attributes:
        source: Name of the value that it casts.
        output: Name of the value that it makes.
        to: Its type.
        readers: Names of the nodes that read it; an output of the model counts under its name.
        takes_name: Whether its output is an output of the model, and has the name that the value
            had before.
    """

    source: str
    output: str
    to: ir.DataType
    readers: tuple[str, ...]
    takes_name: bool


@dataclass(frozen=True, slots=True)
class Applied:
    """What giving types to a graph did to it.

    Attributes:
        casts: The Casts that were added, in graph order.
        removed: Names of Casts of the source model that the types made needless.
    """

    casts: tuple[InsertedCast, ...]
    removed: tuple[str, ...]


def apply_types(
    graph: TypedGraph,
    float32: Collection[int],
    masks: Mapping[str, float],
    caster: ConstantCaster,
    created_by: str,
) -> Applied:
    """Rewrite the model of a `TypedGraph` in place.

    Args:
        graph: The terms.
        float32: The terms that stay float32.
        masks: Names of constants to clip, with the largest magnitude.
        caster: Rounds constants.
        created_by: Name of the pass.

    Raises:
        ModelError: External data cannot be read.
        UsageError: The disk is full.
    """
    rewriter = _Rewriter(graph, set(float32), caster, created_by)
    for value in graph.constants:
        limit = masks.get(value.name or "")
        if limit is not None and value.const_value is not None:
            value.const_value = caster.clipped(value.const_value, limit)
    for value, reads in graph.constants.items():
        rewriter.cast_constant(value, reads)
    for node, term in graph.term_of.items():
        if term not in rewriter.float32:
            rewriter.set_attributes(node)
    for value, term in graph.producer.items():
        if term not in rewriter.float32:
            value.type = ir.TensorType(data_type_of(graph.compute))
    for value in list(graph.producer):
        rewriter.cast_value(value)
    return Applied(tuple(rewriter.casts), tuple(_remove_needless(graph.model, created_by)))


class _Rewriter:
    """Puts types and Casts into one graph.

    Attributes:
        casts: The Casts that were added.
        float32: The terms that stay float32.
    """

    def __init__(
        self, graph: TypedGraph, float32: set[int], caster: ConstantCaster, created_by: str
    ) -> None:
        self.casts: list[InsertedCast] = []
        self.float32 = float32 | {FLOAT32_TERM}
        self._graph = graph
        self._low = data_type_of(graph.compute)
        self._caster = caster
        self._created_by = created_by
        self._taken = value_names(graph.model)
        self._taken |= {node.name for node in all_nodes(graph.model) if node.name}
        self._graph_of = {
            value: owner
            for owner in all_graphs(graph.model)
            for value in (*owner.inputs, *owner.initializers.values())
        }

    def cast_constant(self, value: ir.Value, reads: Sequence[Read]) -> None:
        """Round a constant where it is read in 16 bits; in place if it is nowhere else."""
        low = [read for read in reads if read.term not in self.float32]
        if not low:
            return
        tensor = value.const_value
        assert tensor is not None
        rounded = self._caster.rounded(tensor)
        # A reader that takes any type, such as Shape, does not count among the reads.
        if len(low) == len(reads):
            value.const_value = rounded
            value.type = ir.TensorType(self._low)
            return
        name = fresh_name(f"{value.name}.{self._graph.compute}", self._taken)
        twin = add_initializer(self._graph_of[value], name, rounded)
        for read in low:
            _redirect(read, twin)
        drop_unused_initializers([value])
        if any(isinstance(r.owner, ir.Node) and is_scale(r.owner, r.index) for r in low):
            # Codes made by one scale and read by another would be off by a constant factor.
            value.const_value = self._caster.coarse(tensor)

    def set_attributes(self, node: ir.Node) -> None:
        """Say the 16-bit type where a node names the type it makes."""
        attribute = _TYPE_ATTRIBUTES.get(node.op_type)
        if attribute is not None and attribute in node.attributes:
            if node.attributes[attribute].as_int() == _FLOAT:
                node.attributes[attribute] = ir.AttrInt64(attribute, int(self._low))
        elif is_op(node, "ConstantOfShape"):
            old = node.attributes.get("value")
            tensor = ir.tensor([0.0], _FLOAT) if old is None else old.as_tensor()
            node.attributes["value"] = ir.AttrTensor("value", self._caster.rounded(tensor))

    def cast_value(self, value: ir.Value) -> None:
        """Add the Cast that some readers of a value need, if any do."""
        is_low = self._graph.producer[value] not in self.float32
        other = [
            read
            for read in self._graph.reads.get(value, ())
            if (read.term not in self.float32) != is_low
        ]
        if not other:
            return
        to = _FLOAT if is_low else self._low
        outputs = [read for read in other if read.owner is self._graph.model.graph]
        name = self._cast_name(value, outputs, to)
        cast = new_node(
            self._created_by, "Cast", [value], name, attributes={"to": int(to)}, dtype=to
        )
        cast.name = fresh_name(f"{name}.cast", self._taken) if outputs else name
        made = cast.outputs[0]
        made.shape = value.shape
        for read in other:
            _redirect(read, made)
        self._insert(cast, value)
        readers = dict.fromkeys(_reader_name(read, name) for read in other)
        self.casts.append(
            InsertedCast(value.name or "", name, to, tuple(readers), takes_name=bool(outputs))
        )

    def _cast_name(self, value: ir.Value, outputs: Sequence[Read], to: ir.DataType) -> str:
        """Return the name of a Cast's output: an output of the model keeps its own."""
        suffix = "float32" if to == _FLOAT else str(self._graph.compute)
        if not outputs:
            return fresh_name(f"{value.name}.{suffix}", self._taken)
        kept = value.name or ""
        value.name = fresh_name(f"{kept}.{self._graph.compute}", self._taken)
        return kept

    def _insert(self, cast: ir.Node, value: ir.Value) -> None:
        producer = value.producer()
        if producer is not None:
            assert producer.graph is not None
            producer.graph.insert_after(producer, cast)
            return
        graph = self._graph_of[value]
        first = next(iter(graph), None)
        if first is None:
            graph.append(cast)
        else:
            graph.insert_before(first, cast)


def _redirect(read: Read, value: ir.Value) -> None:
    if isinstance(read.owner, ir.Node):
        read.owner.replace_input_with(read.index, value)
    else:
        read.owner.outputs[read.index] = value


def _reader_name(read: Read, output: str) -> str:
    return node_name(read.owner) if isinstance(read.owner, ir.Node) else output


def _remove_needless(model: ir.Model, created_by: str) -> list[str]:
    """Remove Casts to the type that a value has, and second Casts of one value to one type.

    Casts that this pass made stand right behind what they cast, so that every reader may use them;
    another Cast only serves those behind it in its own graph.
    """
    removed: list[str] = []
    made = {
        (node.inputs[0], node.attributes["to"].as_int()): node
        for node in all_nodes(model)
        if is_op(node, "Cast") and node.metadata_props.get(CREATED_BY) == created_by
    }
    first: dict[tuple[ir.Value, int, object], ir.Node] = {}
    for node in list(all_nodes(model)):
        source = node.inputs[0] if node.inputs else None
        if not is_op(node, "Cast") or source is None:
            continue
        to = node.attributes["to"].as_int()
        name = node_name(node)
        if source.dtype == to:
            if bypass(node) is None:
                removed.append(name)
            continue
        instead = made.get((source, to)) or first.setdefault((source, to, node.graph), node)
        if instead is not node and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(instead.outputs[0])
            remove_node(node)
            removed.append(name)
    return removed
