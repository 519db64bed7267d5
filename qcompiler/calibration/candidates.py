"""What may be left out of a quantization, and where in the graph its damage shows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from qcompiler.ir.blocks import find_blocks
from qcompiler.ir.dataflow import all_nodes, bodies_of, constant_of, inputs_with_captures
from qcompiler.ir.editing import values_of
from qcompiler.ir.provenance import (
    BYTES_BEFORE,
    QUANTIZED_INPUTS,
    RANGE,
    SCHEME,
    SHARES,
    origins_of,
)
from qcompiler.ir.quantizable import find_sites, row_of
from qcompiler.quant.scheme import FLOAT

BLOCKS_BEYOND: Final = 3
"""At its own block's end, an error says little of what becomes of it: rank correlation with the
damage at the outputs is 0.87 there, 0.94 one or two blocks later and 0.98 three later (MiniLM)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Ops that are quantized or left alone together: one, or several that share a weight.

    Attributes:
        nodes: Their names in the canonical model, in graph order.
        origins: What the source model calls them.
        op_type: Op type of the first.
        scheme: Its scheme, as text.
        weight_bytes: Bytes of their weights in the source model.
    """

    nodes: tuple[str, ...]
    origins: tuple[str, ...]
    op_type: str
    scheme: str
    weight_bytes: int


def find_candidates(model: ir.Model) -> list[Candidate]:
    """Return what a model with schemes quantizes, in graph order."""
    planned = {n: None for n in all_nodes(model) if n.metadata_props.get(SCHEME, FLOAT) != FLOAT}
    group: dict[ir.Node, list[ir.Node]] = {node: [node] for node in planned}
    owner: dict[ir.Value, ir.Node] = {}
    for site in find_sites(model)[0]:
        if site.node not in group:
            continue
        first = owner.setdefault(site.weight, site.node)
        if group[first] is not group[site.node]:
            group[first].extend(group[site.node])
            for node in group[site.node]:
                group[node] = group[first]
    unique = {id(members): members for members in (group[node] for node in planned)}
    return [_candidate(members) for members in unique.values()]


def _candidate(nodes: Sequence[ir.Node]) -> Candidate:
    return Candidate(
        nodes=tuple(node.name or "" for node in nodes),
        origins=tuple(next(iter(origins_of(node)), node.name or "") for node in nodes),
        op_type=row.op_type if (row := row_of(nodes[0])) else nodes[0].op_type,
        scheme=nodes[0].metadata_props[SCHEME],
        weight_bytes=int(nodes[0].metadata_props.get(BYTES_BEFORE, 0)),
    )


def carry_ranges(graph: ir.Graph) -> None:
    """Write on values that share a scale the range it stands for, so that they can have their own.

    Where the op that computes the value they share with is left in float, nothing else has it.
    """
    ranges = {value.name: value.metadata_props.get(RANGE) for value in values_of(graph)}
    for value in values_of(graph):
        shared = value.metadata_props.get(SHARES)
        found = ranges.get(shared) if shared is not None else None
        if found is not None and RANGE not in value.metadata_props:
            value.metadata_props[RANGE] = ranges[value.name] = found


def float_outputs(model: ir.Model) -> list[ir.Value]:
    """Return the outputs of a model that hold floats."""
    return [v for v in model.graph.outputs if v.dtype is not None and v.dtype.is_floating_point()]


def nearby_places(model: ir.Model) -> Mapping[str, tuple[str, ...]]:
    """Return where the damage of each node is looked at when it is not followed to the outputs.

    That is a value through which everything passes that depends on the node: at the end of its
    block and of `BLOCKS_BEYOND` more, and behind what alone reads it there, such as a
    normalization. Near the end of the model these are its float outputs.
    """
    ends = tuple(value.name or "" for value in float_outputs(model))
    values = {value.name: value for value in values_of(model.graph)}
    sites = {site.node for site in find_sites(model)[0]}
    blocks = find_blocks(model)
    places = [
        ends if b.output is None else (_last_alone(values[b.output], sites).name or "",)
        for b in blocks
    ]
    found: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        place = places[min(block.index + BLOCKS_BEYOND, len(blocks) - 1)]
        for node in block.nodes:
            found.update(dict.fromkeys(_names(node), place))
    return found


def _last_alone(value: ir.Value, sites: set[ir.Node]) -> ir.Value:
    """Follow a value through ops that alone read it and read nothing else, up to the next site."""
    while not value.is_graph_output():
        readers = {use.node for use in value.uses()}
        if len(readers) != 1:
            break
        (node,) = readers
        others = [v for v in inputs_with_captures(node) if v is not value]
        used = [output for output in node.outputs if output.uses() or output.is_graph_output()]
        alone = node.graph is value.graph and all(constant_of(v) is not None for v in others)
        if node in sites or not alone or len(used) != 1 or not _is_float(used[0]):
            break
        value = used[0]
    return value


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _names(node: ir.Node) -> Iterator[str]:
    yield node.name or ""
    for body in bodies_of(node):
        yield from (inner.name or "" for inner in body.all_nodes())


def read_by(model: ir.Model, candidate: Candidate) -> list[str]:
    """Return the computed float values of the main graph that the ops of a candidate read."""
    found: dict[str, None] = {}
    wanted = set(candidate.nodes)
    for node in model.graph:
        if node.name not in wanted:
            continue
        positions = json.loads(node.metadata_props.get(QUANTIZED_INPUTS, "[]"))
        for index in positions or range(len(node.inputs)):
            value = node.inputs[index]
            if value is not None and constant_of(value) is None and _is_float(value):
                found[value.name or ""] = None
    return list(found)
