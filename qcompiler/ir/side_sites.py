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
        behind: Those of them that another node with weights lies between.
        floats: Whether a float input of the graph is among it.
    """

    sources: int = 0
    behind: int = 0
    floats: bool = False


def side_sites(order: Iterable[ir.Node], sizes: Mapping[ir.Node, int]) -> set[ir.Node]:
    """Return the nodes with weights that are tables beside the stream of data.

    Rotary tables, a table of relative distances: looked up, or multiplied, by integers alone, and
    read again beside what was made from them before, all along the graph. A lookup that some
    product depends on alone is data, such as an embedding of words. Of several that all products
    depend on, the largest one is data.

    Args:
        order: The nodes of the main graph, in topological order.
        sizes: Number of weights, by those of them that hold some, in themselves or in a body.
    """
    upstream: dict[ir.Node, _Upstream] = {}
    sources: list[ir.Node] = []
    needs: list[int] = []
    again = 0
    for node in order:
        read = _inputs(node, upstream)
        found = _joined(read)
        again |= _read_again(read, found.behind)
        if node in sizes and found.sources:
            needs.append(found.sources)
            found = _Upstream(found.sources, found.sources, found.floats)
        elif node in sizes:
            found = _Upstream(1 << len(sources), 0, found.floats)
            sources.append(node)
        upstream[node] = found
    bits = {node: 1 << at for at, node in enumerate(sources) if not upstream[node].floats}
    bits = {node: bit for node, bit in bits.items() if bit & again}
    aside: set[ir.Node] = set()
    left = (1 << len(sources)) - 1
    for node in sorted(bits, key=lambda each: sizes[each]):
        if needs and all(each & left & ~bits[node] for each in needs):
            left &= ~bits[node]
            aside.add(node)
    return aside


def _inputs(node: ir.Node, upstream: Mapping[ir.Node, _Upstream]) -> list[_Upstream]:
    """Return what lies upstream of every input of a node."""
    if is_op(node, "Shape", "Size"):
        return []  # what a tensor's dims are says nothing of its contents
    found = []
    for value in inputs_with_captures(node):
        producer = value.producer()
        if producer is not None and producer in upstream:
            found.append(upstream[producer])
        elif value.is_graph_input():
            floats = value.dtype is None or value.dtype.is_floating_point()
            found.append(_Upstream(floats=floats))
    return found


def _joined(inputs: Iterable[_Upstream]) -> _Upstream:
    sources, behind, floats = 0, 0, False
    for each in inputs:
        sources |= each.sources
        behind |= each.behind
        floats |= each.floats
    return _Upstream(sources, behind, floats)


def _read_again(inputs: Iterable[_Upstream], behind: int) -> int:
    """Return the sources that a node reads, unmixed, beside what a product made from them."""
    unmixed = 0
    for each in inputs:
        if each.sources.bit_count() == 1 and not each.behind:
            unmixed |= each.sources
    return unmixed & behind
