"""Putting new nodes in the place of one, with what is known about it."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qcompiler.ir.dataflow import MICROSOFT
from qcompiler.ir.editing import drop_unused_initializers, remove_node
from qcompiler.ir.provenance import CREATED_BY, ORIGIN_OP, SCHEME, annotate


def new_node(
    created_by: str,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    *,
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    domain: str = "",
    outputs: int = 1,
    dtype: ir.DataType | None = None,
) -> ir.Node:
    """Return a node that says which pass made it; its outputs are named after it.

    Args:
        created_by: Name of the pass.
        op_type: Operator name.
        inputs: What it reads.
        name: Name of the node; a single output has the same name.
        attributes: Its attributes.
        domain: Operator domain.
        outputs: How many outputs it has.
        dtype: Element type of a single output, where it is known.
    """
    node = ir.node(
        op_type,
        list(inputs),
        attributes=dict(attributes or {}),
        domain=domain,
        num_outputs=outputs,
        name=name,
    )
    for index, output in enumerate(node.outputs):
        output.name = name if outputs == 1 else f"{name}.{index}"
        if dtype is not None:
            output.type = ir.TensorType(dtype)
    annotate(node, created_by=created_by)
    return node


def substitute(old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` in the place of `old`; the last one computes its output.

    The last node takes over name, output (also as a graph output) and metadata; what `old` read
    and nobody else does is removed, back through DequantizeLinear and Transpose.
    """
    graph, last = old.graph, new[-1]
    assert graph is not None
    own = dict(last.metadata_props)
    last.metadata_props.update(old.metadata_props)
    last.metadata_props.update(own)
    if SCHEME in old.metadata_props:
        last.metadata_props.setdefault(ORIGIN_OP, old.op_type)
    read = list(old.inputs)
    name = old.name
    ir.convenience.replace_nodes_and_values(
        graph, old, [old], list(new), [old.outputs[0]], [last.outputs[0]]
    )
    last.name = name
    for value in read:
        remove_unread(value)


def remove_unread(value: ir.Value | None) -> None:
    """Remove a weight nobody reads any more, with the nodes that only made it."""
    if value is None or value.uses() or value.is_graph_output():
        return
    producer = value.producer()
    if producer is None:
        drop_unused_initializers([value])
        return
    if producer.op_type not in ("DequantizeLinear", "Transpose", "Cast", "Reshape"):
        return
    read = list(producer.inputs)
    remove_node(producer)
    for source in read:
        remove_unread(source)


def needs_microsoft_ops(model: ir.Model) -> None:
    """Declare the com.microsoft operator set."""
    model.opset_imports.setdefault(MICROSOFT, 1)


def add_to_result(node: ir.Node, addend: ir.Node, name: str, op_type: str = "Add") -> None:
    """Put a node behind another of one output, and the sum of both in the place of its result.

    The sum takes over the name, readers and metadata of the result, and its place among outputs.

    Args:
        node: The node.
        addend: What is added; made by a pass, and in no graph yet.
        name: What the result of `node` alone is called from now on.
        op_type: What adds them: "Add", or "Sum", which runtimes do not merge with a product.
    """
    graph, result = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    created_by = addend.metadata_props[CREATED_BY]
    added = new_node(
        created_by, op_type, [result, addend.outputs[0]], f"{name}.joined", dtype=result.dtype
    )
    joined = added.outputs[0]
    joined.shape = addend.outputs[0].shape = result.shape
    graph.insert_after(node, [addend, added])
    result.replace_all_uses_with(joined, replace_graph_outputs=True)
    added.replace_input_with(0, result)
    joined.metadata_props.update(result.metadata_props)
    result.metadata_props.clear()
    result.name, joined.name = name, result.name
