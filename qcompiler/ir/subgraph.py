"""The part of a graph between some values and some others."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.errors import UsageError
from qcompiler.ir.dataflow import constant_of, inputs_with_captures


@dataclass(frozen=True, slots=True)
class Subgraph:
    """Nodes that compute some values from others.

    Attributes:
        nodes: In graph order.
        inputs: Values it is given: those it was cut at, then the graph inputs that its nodes
            read as well, such as an attention mask.
        outputs: Values it is asked for.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def subgraph_between(
    model: ir.Model, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> Subgraph:
    """Return the nodes of the main graph that compute `outputs` from `inputs`.

    Args:
        model: The model.
        inputs: Names of values to cut at, in the order wanted; None for the graph's inputs.
        outputs: Names of the values to compute; None for the graph's outputs.

    Raises:
        UsageError: No value of the main graph has such a name, an input is a constant, or no
            output depends on an input that was named.
    """
    graph = model.graph
    known = _values_by_name(graph)
    starts = list(graph.inputs) if inputs is None else [_find(known, name) for name in inputs]
    ends = list(graph.outputs) if outputs is None else [_find(known, name) for name in outputs]
    for value in starts:
        if constant_of(value) is not None:
            message = f"{value.name} is a constant, not a value to cut the graph at"
            raise UsageError(message, hint="give it as a weight instead")
    needed, read = _upstream(ends, set(starts))
    if inputs is not None and (unread := [value.name for value in starts if value not in read]):
        message = f"no output asked for depends on {', '.join(map(str, unread))}"
        raise UsageError(message, where=", ".join(str(value.name) for value in ends))
    others = [value for value in graph.inputs if value in read and value not in starts]
    nodes = tuple(node for node in graph if node in needed)
    return Subgraph(nodes, (*starts, *others), tuple(dict.fromkeys(ends)))


def _values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    return {value.name: value for value in values if value.name}


def _find(known: dict[str, ir.Value], name: str) -> ir.Value:
    if name not in known:
        message = "no value of the main graph has this name"
        raise UsageError(message, where=name)
    return known[name]


def _upstream(
    ends: Sequence[ir.Value], starts: set[ir.Value]
) -> tuple[set[ir.Node], set[ir.Value]]:
    """Return the nodes behind some values up to where the graph is cut, and what they read."""
    nodes: set[ir.Node] = set()
    read = set(ends)
    pending = [value for value in ends if value not in starts]
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer in nodes:
            continue
        nodes.add(producer)
        for value in inputs_with_captures(producer):
            if value not in read:
                read.add(value)
                if value not in starts:
                    pending.append(value)
    return nodes, read
