"""Whether a graph hangs together: definitions before uses, one producer a value, one owner."""

from collections.abc import Iterator

import onnx_ir as ir

from qcompiler.ir.dataflow import bodies_of, node_label
from qcompiler.rewriting.legality import Violation


def structural_faults(model: ir.Model) -> Iterator[Violation]:
    """Yield faults of use-def, topology and naming, bodies included.

    Values are compared by identity, so a node that reads a value of a deleted node is found
    even where a value of the same name exists.
    """
    yield from _check_graph(model.graph, frozenset(), {})


def _check_graph(
    graph: ir.Graph, outer: frozenset[ir.Value], names: dict[str, ir.Value]
) -> Iterator[Violation]:
    known: set[ir.Value] = set(outer)
    names = dict(names)
    for value in (*graph.inputs, *graph.initializers.values()):
        known.add(value)
        yield from _named_once(value, names)
    for node in graph:
        yield from _undefined_inputs(node, known)
        for body in bodies_of(node):
            yield from _check_graph(body, frozenset(known), names)
        for value in node.outputs:
            known.add(value)
            yield from _named_once(value, names)
    for value in graph.outputs:
        if value not in known:
            yield Violation("use-def", str(value.name), "a graph output that nothing computes")


def _undefined_inputs(node: ir.Node, known: set[ir.Value]) -> Iterator[Violation]:
    for index, value in enumerate(node.inputs):
        if value is not None and value not in known:
            fault = f"input {index} ({value.name}) is not defined before the node"
            yield Violation("use-def", node_label(node), fault)


def _named_once(value: ir.Value, names: dict[str, ir.Value]) -> Iterator[Violation]:
    name = value.name
    if not name:
        if value.uses():
            yield Violation("names", repr(value), "a used value without a name")
        return
    if names.setdefault(name, value) is not value:
        yield Violation("names", name, "two values of the same name are visible at once")
