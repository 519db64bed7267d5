"""Blocks: stretches of a graph between values that everything passes through."""

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.dataflow import bodies_of, inputs_with_captures, is_op
from qcompiler.ir.quantizable import find_sites


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of the main graph between two cut values.

    A cut value is one through which every path from an earlier quantizable op to a later one
    passes. Values with no quantizable op upstream (attention masks, rotary tables, position
    ids) do not count: they may cross a cut.

    Attributes:
        index: Position in the chain, from 0.
        input: Name of the cut value it starts from; None at the graph's start.
        output: Name of the cut value it ends in; None for the last block.
        nodes: The nodes that compute weights' products or anything downstream of one.
        label: Module name from exporter metadata, or "".
    """

    index: int
    input: str | None
    output: str | None
    nodes: tuple[ir.Node, ...]
    label: str


def find_blocks(model: ir.Model, minimum_sites: int = 1) -> list[Block]:
    """Cut the main graph into the finest chain of blocks with at least `minimum_sites` each.

    Nodes inside bodies belong to the block of the node that holds them.
    """
    order = list(model.graph)
    owner = _outermost(model)
    site_nodes = {owner[site.node] for site in find_sites(model)[0] if site.node in owner}
    tainted = _downstream(order, site_nodes)
    cuts = _cut_positions(model, order, tainted)
    return _split(order, tainted, site_nodes, cuts, minimum_sites)


def _outermost(model: ir.Model) -> dict[ir.Node, ir.Node]:
    """Map every node to the node of the main graph that it is, or lies inside."""
    owner: dict[ir.Node, ir.Node] = {}
    for node in model.graph:
        owner[node] = node
        for body in bodies_of(node):
            owner.update(dict.fromkeys(body.all_nodes(), node))
    return owner


def _downstream(order: list[ir.Node], seeds: set[ir.Node]) -> set[ir.Node]:
    """Return the seeds and every node that depends on one."""
    tainted: set[ir.Node] = set()
    for node in order:
        if is_op(node, "Shape", "Size"):
            continue  # what a tensor's dims are says nothing of its contents
        producers = (value.producer() for value in inputs_with_captures(node))
        if node in seeds or any(producer in tainted for producer in producers):
            tainted.add(node)
    return tainted


def _cut_positions(
    model: ir.Model, order: list[ir.Node], tainted: set[ir.Node]
) -> list[tuple[int, ir.Value]]:
    """Return (position, value): after that node, `value` is the only tainted value alive."""
    position = {node: index for index, node in enumerate(order)}
    last_use: dict[ir.Value, int] = {}
    for index, node in enumerate(order):
        for value in inputs_with_captures(node):
            last_use[value] = index
    for value in model.graph.outputs:
        last_use[value] = len(order)
    cuts: list[tuple[int, ir.Value]] = []
    alive: dict[ir.Value, None] = {}
    for index, node in enumerate(order):
        for value in inputs_with_captures(node):
            if last_use.get(value) == index:
                alive.pop(value, None)
        if node in tainted:
            alive.update({value: None for value in node.outputs if last_use.get(value, -1) > index})
        if len(alive) == 1 and index + 1 < len(order):
            (value,) = alive
            producer = value.producer()
            if producer is not None and position[producer] == index:
                cuts.append((index, value))
    return cuts


def _split(
    order: list[ir.Node],
    tainted: set[ir.Node],
    site_nodes: set[ir.Node],
    cuts: list[tuple[int, ir.Value]],
    minimum_sites: int,
) -> list[Block]:
    blocks: list[Block] = []
    start, entry = 0, None
    remaining = [index for index, node in enumerate(order) if node in site_nodes]
    for position, value in cuts:
        inside = sum(1 for index in remaining if start <= index <= position)
        after = sum(1 for index in remaining if index > position)
        if inside < minimum_sites or after < minimum_sites:
            continue
        nodes = tuple(node for node in order[start : position + 1] if node in tainted)
        blocks.append(Block(len(blocks), entry, value.name, nodes, _label(nodes)))
        start, entry = position + 1, value.name
    nodes = tuple(node for node in order[start:] if node in tainted)
    if nodes:
        blocks.append(Block(len(blocks), entry, None, nodes, _label(nodes)))
    return blocks


def _label(nodes: tuple[ir.Node, ...]) -> str:
    """Return the longest module path that all nodes with exporter metadata share."""
    scopes = [_scope(node) for node in nodes if "pkg.torch.onnx.name_scopes" in node.metadata_props]
    if not scopes:
        return ""
    shared = scopes[0]
    for scope in scopes[1:]:
        length = 0
        while length < min(len(shared), len(scope)) and shared[length] == scope[length]:
            length += 1
        shared = shared[:length]
    return shared[-1] if shared else ""


def _scope(node: ir.Node) -> list[str]:
    text = node.metadata_props["pkg.torch.onnx.name_scopes"]
    return [part.strip(" '\"") for part in text.strip("[]").split(",") if part.strip(" '\"")]
