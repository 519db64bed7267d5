"""Small changes to a graph that every rewrite needs, bodies and graph outputs respected."""

import json
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from qcompiler.ir.dataflow import all_graphs, bodies_of
from qcompiler.ir.provenance import ORIGIN, origins_of


def is_used(value: ir.Value) -> bool:
    """Whether a node reads the value, or it is the output of a graph or body."""
    return bool(value.uses()) or value.is_graph_output()


def remove_node(node: ir.Node) -> None:
    """Take a node that nobody reads out of its graph, with all that its bodies read from outside.

    `Graph.remove` alone leaves the nodes inside the bodies as users of captured values.
    """
    for body in bodies_of(node):
        for inner in list(body.all_nodes()):
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)


def drop_unused_initializers(values: Sequence[ir.Value | None]) -> None:
    """Remove those of `values` that are initializers nobody reads; graph inputs stay."""
    for value in values:
        if value is None or not value.is_initializer() or value.is_graph_input():
            continue
        graph = value.graph
        if not is_used(value) and graph is not None:
            graph.initializers.pop(value.name or "")


def bypass(node: ir.Node) -> str | None:
    """Let everyone read a node's first input in place of its first output, and remove the node.

    The name of a graph output stays: the producer of the input takes it over where it can.

    Returns:
        None when done; otherwise why it cannot be done, as a sentence, with nothing changed.
    """
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    graph = node.graph
    assert graph is not None
    if not output.is_graph_output():
        output.replace_all_uses_with(source)
        remove_node(node)
        return None
    producer = source.producer()
    if producer is None or producer.graph is not graph:
        return (
            f"it hands {source.name}, which no node of the same graph computes, "
            f"to the graph output {output.name}"
        )
    if source.is_graph_output():
        return f"{source.name} and {output.name} are both graph outputs, and both names must stay"
    source.type = output.type or source.type
    source.shape = output.shape or source.shape
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    name = output.name
    remove_node(node)
    source.name = name
    return None


def constant_value(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Return a value that holds a tensor, ready to be registered as an initializer."""
    return ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor as a new initializer of a graph and return its value.

    Raises:
        ValueError: Another initializer of the graph has that name.
    """
    value = constant_value(name, tensor)
    graph.register_initializer(value)
    return value


def replace_by_constants(node: ir.Node, tensors: Sequence[ir.TensorProtocol | None]) -> None:
    """Put initializers of the same names in the place of a node's outputs, and remove the node.

    Where an output is a graph output, the initializer becomes it.

    Args:
        node: The node.
        tensors: One for each output; None only where nobody reads the output.
    """
    graph = node.graph
    assert graph is not None
    made: list[ir.Value] = []
    for output, tensor in zip(node.outputs, tensors, strict=True):
        if tensor is None:
            continue
        assert output.name
        value = constant_value(output.name, tensor)
        value.doc_string = output.doc_string
        value.metadata_props.update(output.metadata_props)
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        made.append(value)
    remove_node(node)
    for value in made:
        graph.register_initializer(value)


def record_origin(node: ir.Node, *names: str) -> None:
    """Add to the source nodes that a node stands for; its own first origin is itself."""
    merged = dict.fromkeys((*origins_of(node), *(name for name in names if name)))
    node.metadata_props[ORIGIN] = json.dumps(list(merged), ensure_ascii=False)


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values a graph itself defines: inputs, initializers, outputs of its nodes."""
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())
    for node in graph:
        yield from node.outputs


def value_names(model: ir.Model) -> set[str]:
    """Return the names of all values of a model, bodies included."""
    return {value.name for graph in all_graphs(model) for value in values_of(graph) if value.name}


def fresh_name(wanted: str, taken: set[str]) -> str:
    """Return `wanted`, with a number behind it where that name is taken, and take it."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def make_value_names_unique(model: ir.Model) -> list[tuple[ir.Value, str]]:
    """Give every value of a model a name of its own; bodies and main graph share one namespace.

    Inputs and outputs of the main graph always keep theirs; after them, the first value of a
    name in graph order does. Omitted optional outputs stay without a name.

    Returns:
        The renamed values with their former names ("" for none), in graph order.
    """
    main = model.graph
    fixed = dict.fromkeys([*main.inputs, *main.outputs])
    taken = value_names(model)
    seen = {value.name for value in fixed}
    renamed: list[tuple[ir.Value, str]] = []
    for graph in all_graphs(model):
        for value in list(values_of(graph)):
            if value in fixed or not (value.name or is_used(value)):
                continue
            if value.name and value.name not in seen:
                seen.add(value.name)
                continue
            former = value.name or ""
            value.name = fresh_name(former or _derived_name(value), taken)
            seen.add(value.name)
            renamed.append((value, former))
    return renamed


def _derived_name(value: ir.Value) -> str:
    producer = value.producer()
    if producer is None:
        return "value"
    return f"{producer.name or producer.op_type}_output_{value.index()}"
