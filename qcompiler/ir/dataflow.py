"""Questions about who produces and who consumes a value, through every nested body."""

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

ONNX_DOMAINS: Final = ("", "ai.onnx")
"""The two names of the standard operator set."""
MICROSOFT: Final = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
RANDOM_OPS: Final = (
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
    *("Multinomial", "Bernoulli", "Dropout"),
)
"""Standard ops whose results may differ from run to run."""


def standard_domain(domain: str) -> str:
    """Return a domain, the standard one always as ""."""
    return "" if domain in ONNX_DOMAINS else domain


def standard_opset(owner: ir.Model | ir.Graph | ir.Function) -> int:
    """Return the version of the standard opset that is imported, under either name; 0 if none."""
    return max(owner.opset_imports.get(domain, 0) for domain in ONNX_DOMAINS)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph, then every If/Loop/Scan body below it, outer before inner."""
    yield model.graph
    yield from model.graph.subgraphs()


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of the main graph and of every body, each right before its bodies."""
    yield from model.graph.all_nodes()


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these standard ONNX ops."""
    return node is not None and node.domain in ONNX_DOMAINS and node.op_type in op_types


def node_name(node: ir.Node) -> str:
    """Return how a node is looked up, and what new names derive from: `fc1`.

    Rewrites and skips carry it; a node without a name is called after op type and first output.
    """
    if node.name:
        return node.name
    outputs = [value.name for value in node.outputs if value.name]
    return f"{node.op_type}_{outputs[0]}" if outputs else node.op_type


def node_label(node: ir.Node) -> str:
    """Return how a sentence for people calls a node, never parsed or matched: `fc1 (Gemm)`."""
    if node.name:
        return f"{node.name} ({node.op_type})"
    outputs = [value.name for value in node.outputs if value.name]
    return f"unnamed {node.op_type} that computes {outputs[0]}" if outputs else node.op_type


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor behind a value that cannot change between runs, else None.

    Initializers and outputs of Constant nodes are constant; an initializer that is also a graph
    input can be overridden by the caller, so it is not.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    if is_op(producer, "Constant") and producer is not None:
        attribute = producer.attributes.get("value")
        return attribute.as_tensor() if attribute is not None else None
    return None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute, or its default when the node does not carry it."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """Return a list-of-integers attribute, or None when the node does not carry it."""
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs a node holds as attributes: branches of If, bodies of Loop and Scan."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads a value, once; None if it is an output of the graph too."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Return the values that the bodies of a node read from outside them, in order, once each."""
    found: dict[ir.Value, None] = {}
    for body in bodies_of(node):
        found.update(dict.fromkeys(_captured(body)))
    return list(found)


def _captured(body: ir.Graph) -> Iterator[ir.Value]:
    inside: set[ir.Value] = {*body.inputs, *body.initializers.values()}
    for node in body.all_nodes():
        inside.update(node.outputs)
        for nested in bodies_of(node):
            inside.update(nested.inputs)
            inside.update(nested.initializers.values())
    for node in body.all_nodes():
        yield from (value for value in node.inputs if value is not None and value not in inside)
    yield from (value for value in body.outputs if value not in inside)


def inputs_with_captures(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads: its inputs, and what its bodies read from outside."""
    direct = [value for value in node.inputs if value is not None]
    return direct + captured_values(node)
