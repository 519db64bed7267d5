"""Products and lookups beside the stream of data: tables of positions, of relative distances."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.dataflow import inputs_with_captures, is_op


@dataclass(frozen=True, slots=True)
class _Upstream:
    """What a node's results depend on.

    Attributes:
        sources: The nodes with weights that depend on no other such node, as bits.
        floats: Whether a float input of the graph is among it.
    """

    sources: int = 0
    floats: bool = False


def side_sites(order: Iterable[ir.Node], sizes: Mapping[ir.Node, int]) -> set[ir.Node]:
    """Return the nodes with weights that every other one can be reached without.

    Rotary tables, a table of relative distances, an embedding of positions: looked up, or
    multiplied, by integers alone, and read all along the graph. A lookup that some product depends
    on alone is data: an embedding of words. Of several that all products depend on, the largest
    one is data.

    Args:
        order: The nodes of the main graph, in topological order.
        sizes: Number of weights, by those of them that hold some, in themselves or in a body.
    """
    upstream: dict[ir.Node, _Upstream] = {}
    sources: list[ir.Node] = []
    needs: list[int] = []
    for node in order:
        found = _joined(node, upstream)
        if node in sizes and found.sources:
            needs.append(found.sources)
        elif node in sizes:
            found = _Upstream(1 << len(sources), found.floats)
            sources.append(node)
        upstream[node] = found
    bits = {node: 1 << at for at, node in enumerate(sources) if not upstream[node].floats}
    aside: set[ir.Node] = set()
    left = (1 << len(sources)) - 1
    for node in sorted(bits, key=lambda each: sizes[each]):
        if needs and all(each & left & ~bits[node] for each in needs):
            left &= ~bits[node]
            aside.add(node)
    return aside


def _joined(node: ir.Node, upstream: Mapping[ir.Node, _Upstream]) -> _Upstream:
    if is_op(node, "Shape", "Size"):
        return _Upstream()  # what a tensor's dims are says nothing of its contents
    sources, floats = 0, False
    for value in inputs_with_captures(node):
        producer = value.producer()
        if producer is not None and producer in upstream:
            sources |= upstream[producer].sources
            floats |= upstream[producer].floats
        elif value.is_graph_input():
            floats |= value.dtype is None or value.dtype.is_floating_point()
    return _Upstream(sources, floats)
