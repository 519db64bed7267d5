"""Blocks: stretches of a graph between values that everything passes through."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from qcompiler.ir.dataflow import bodies_of, inputs_with_captures, is_op
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.side_sites import side_sites


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of the main graph between two cut values.

    A cut value is one through which every path from an earlier quantizable op to a later one
    passes. Values with no quantizable op upstream (attention masks, position ids) do not count,
    nor tables of positions (`side_sites`): they may cross a cut.

    Attributes:
        index: Position in the chain, from 0.
        input: Name of the cut value it starts from; None at the graph's start.
        output: Name of the cut value it ends in; None for the last block.
        nodes: The nodes that compute weights' products, tables of positions too, or anything
            downstream of the other ones.
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
    kinds = _weight_shapes(model)
    aside = side_sites(order, _sizes(kinds))
    site_nodes = kinds.keys() - aside
    tainted = _downstream(order, site_nodes)
    cuts = _cut_positions(model, order, tainted)
    return _split(order, tainted | aside, site_nodes, cuts, minimum_sites)


def _outermost(model: ir.Model) -> dict[ir.Node, ir.Node]:
    """Map every node to the node of the main graph that it is, or lies inside."""
    owner: dict[ir.Node, ir.Node] = {}
    for node in model.graph:
        owner[node] = node
        for body in bodies_of(node):
            owner.update(dict.fromkeys(body.all_nodes(), node))
    return owner


def _downstream(order: list[ir.Node], seeds: Set[ir.Node]) -> set[ir.Node]:
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
    tainted: Set[ir.Node],
    site_nodes: Set[ir.Node],
    cuts: list[tuple[int, ir.Value]],
    minimum_sites: int,
) -> list[Block]:
    blocks: list[Block] = []
    start, entry, used = 0, None, 0
    at_sites = [index for index, node in enumerate(order) if node in site_nodes]
    before: dict[int, list[tuple[int, ir.Value]]] = {}
    for cut in cuts:
        before.setdefault(bisect_right(at_sites, cut[0]), []).append(cut)
    for count, same in before.items():
        if count - used < minimum_sites or len(at_sites) - count < minimum_sites:
            continue
        position, value = _best_cut(same, order[at_sites[count - 1]])
        nodes = tuple(node for node in order[start : position + 1] if node in tainted)
        blocks.append(Block(len(blocks), entry, value.name, nodes, _label(nodes)))
        start, entry, used = position + 1, value.name, count
    nodes = tuple(node for node in order[start:] if node in tainted)
    if nodes:
        blocks.append(Block(len(blocks), entry, None, nodes, _label(nodes)))
    return blocks


def _best_cut(cuts: list[tuple[int, ir.Value]], site: ir.Node) -> tuple[int, ir.Value]:
    """Return the last of the cuts between two sites that still belongs to the first one's module.

    So an activation function or a normalization goes with the layer before it, unless the
    exporter says that it is part of something else.
    """
    home = _scope(site)

    def shared(cut: tuple[int, ir.Value]) -> int:
        producer = cut[1].producer()
        scope = [] if producer is None else _scope(producer)
        return len(_common([home, scope]))

    most = max(map(shared, cuts))
    return [cut for cut in cuts if shared(cut) == most][-1]


def _label(nodes: tuple[ir.Node, ...]) -> str:
    """Return the longest module path that all nodes with exporter metadata share."""
    shared = _common([scope for node in nodes if (scope := _scope(node))])
    return shared[-1] if shared else ""


def _common(scopes: list[list[str]]) -> list[str]:
    """Return what all lists of names begin with."""
    if not scopes:
        return []
    first, last = min(scopes), max(scopes)
    length = 0
    while length < len(first) and first[length] == last[length]:
        length += 1
    return first[:length]


def _scope(node: ir.Node) -> list[str]:
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    return [part.strip(" '\"") for part in text.strip("[]").split(",") if part.strip(" '\"")]


def place_in_layer(node: ir.Node) -> str:
    """Return what a node is in its layer, as the exporter's module names say: "mlp.up_proj".

    That is the path behind the last number in it; without module names it is the op type.
    """
    modules = [name for name in _scope(node) if "." in name]
    if not modules:
        return node.op_type
    parts = modules[-1].split(".")
    numbered = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[-1] + 1 :] if numbered else parts[-1:]) or node.op_type


def find_layers(model: ir.Model) -> list[Block]:
    """Cut the main graph into its repeated layers, and what comes before, between and after them.

    Transformer layers are two or more blocks of `find_blocks` each: attention and feed-forward.
    Blocks repeat when their weights have the same shapes in the same order; the longest such
    stretch is joined, period by period. Where nothing repeats, these are the blocks themselves.
    """
    blocks = find_blocks(model)
    weights = _weight_shapes(model)
    for node in side_sites(model.graph, _sizes(weights)):
        del weights[node]  # tables beside the stream have no part in what repeats
    kinds = [_kind(block, weights) for block in blocks]
    start, period, count = _repetition(kinds)
    groups = [[block] for block in blocks[:start]]
    groups += [
        blocks[start + period * index : start + period * (index + 1)] for index in range(count)
    ]
    groups += [[block] for block in blocks[start + period * count :]]
    return [_joined(index, group) for index, group in enumerate(groups)]


_Kind = tuple[tuple[str, tuple[int, ...]], ...]


def _weight_shapes(model: ir.Model) -> dict[ir.Node, _Kind]:
    """Return op type and weight shape of every site, by the node of the main graph it lies in."""
    owner = _outermost(model)
    found: dict[ir.Node, _Kind] = {}
    for site in find_sites(model)[0]:
        if site.node in owner:
            node = owner[site.node]
            found[node] = (*found.get(node, ()), (site.row.op_type, site.shape))
    return found


def _sizes(kinds: Mapping[ir.Node, _Kind]) -> dict[ir.Node, int]:
    """Return how many weights the sites in every node have."""
    return {node: sum(prod(shape) for _, shape in kind) for node, kind in kinds.items()}


def _kind(block: Block, weights: dict[ir.Node, _Kind]) -> _Kind:
    return tuple(entry for node in block.nodes for entry in weights.get(node, ()))


def _repetition(kinds: Sequence[_Kind]) -> tuple[int, int, int]:
    """Return where the longest repetition starts, its period, and how often it repeats.

    Of equally long ones the shortest period counts, then the first start.
    """
    best = (0, 0, 1, 0)
    for period in range(1, len(kinds) // 2 + 1):
        start = 0
        for index in range(period, len(kinds) + 1):
            if index < len(kinds) and kinds[index] == kinds[index - period]:
                continue
            count = (index - start) // period
            if count > 1 and count * period > best[0]:
                best = (count * period, start, period, count)
            start = index - period + 1
    return best[1:]


def _joined(index: int, blocks: Sequence[Block]) -> Block:
    nodes = tuple(node for block in blocks for node in block.nodes)
    return Block(index, blocks[0].input, blocks[-1].output, nodes, _label(nodes))
