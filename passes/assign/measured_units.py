"""The stretches of a graph that are measured in float and quantized, and decided as a whole."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.execution.segments import Segment, segments_of
from qcompiler.ir.dataflow import constant_of, is_op
from qcompiler.ir.provenance import (
    OUTLIERS,
    QUANTIZED_INPUTS,
    QUANTIZER,
    REGION,
    SCHEME,
    SHARES,
    TERMS,
    scheme_of,
)
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.quant.scheme import Activations, QScheme
from qcompiler.targets.capability import Resolution, Target, resolve
from qcompiler.targets.site_requests import request_for


@dataclass(frozen=True, slots=True)
class Unit:
    """Integer regions that are measured and decided together.

    These are regions that read the same quantized value, so that they share the cost of quantizing
    it (query, key and value in attention), or the same weight, which is stored once.

    Attributes:
        nodes: The members of the regions, in graph order.
        sites: Their weights, in the same order.
        segment: What is run: the members, and the biases added behind products, which the runtime
            fuses with them.
    """

    nodes: tuple[ir.Node, ...]
    sites: tuple[Site, ...]
    segment: Segment

    @property
    def products_only(self) -> bool:
        """Whether every member is an op with a weight."""
        return {site.node for site in self.sites} == set(self.nodes)

    @property
    def data(self) -> ir.Value:
        """The first value that is read quantized; where none is, the first that is read."""
        quantized = (value for node in self.nodes for value in _read_quantized(node))
        return next(quantized, self.segment.inputs[0])

    @property
    def one_scale_is_coarse(self) -> bool:
        """Whether a value that is read quantized has outlier channels, or two terms."""
        read = (value for node in self.nodes for value in _read_quantized(node))
        return any({OUTLIERS, TERMS} & value.metadata_props.keys() for value in read)

    def plan(self) -> tuple[object, ...]:
        """Return what was planned for its nodes and values, names left out."""
        rows: list[object] = []
        for node in self.segment.nodes:
            facts = node.metadata_props
            rows.append((facts.get(SCHEME), facts.get(QUANTIZED_INPUTS)))
        for value in (*self.segment.inputs, *_computed(self.segment)):
            facts = value.metadata_props
            rows.append((facts.get(QUANTIZER), SHARES in facts, OUTLIERS in facts, TERMS in facts))
        return tuple(rows)

    def what(self, shapes: Mapping[str, Sequence[int]]) -> str:
        """Return what messages call it: its ops, and the shapes of what it reads."""
        ops = " ".join(node.op_type for node in self.segment.nodes[:4])
        more = " ..." if len(self.segment.nodes) > 4 else ""
        read = ", ".join(str(list(shapes[value.name or ""])) for value in self.segment.inputs)
        return f"{ops}{more} on {read}"


def find_units(model: ir.Model) -> list[Unit]:
    """Find what is to be measured, in graph order."""
    regions: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if REGION in node.metadata_props:
            regions.setdefault(node.metadata_props[REGION], []).append(node)
    sites: dict[ir.Node, list[Site]] = {}
    for site in find_sites(model)[0]:
        sites.setdefault(site.node, []).append(site)
    members = _merged(list(regions.values()), sites)
    runs = [[*nodes, *_biases(nodes)] for nodes in members]
    return [
        Unit(tuple(nodes), tuple(site for node in nodes for site in sites.get(node, ())), segment)
        for nodes, segment in zip(members, segments_of(model.graph, runs), strict=True)
        if any(True for node in nodes for _ in _read_quantized(node))
    ]


def find_products(model: ir.Model) -> list[Unit]:
    """Return every op of the main graph that has a scheme as a unit of its own, in graph order.

    It is what ops with integer weights and float data are measured as: they share nothing.
    """
    sites: dict[ir.Node, list[Site]] = {}
    for site in find_sites(model)[0]:
        if site.node.graph is model.graph and scheme_of(site.node) is not None:
            sites.setdefault(site.node, []).append(site)
    segments = segments_of(model.graph, [[node, *_biases([node])] for node in sites])
    return [
        Unit((node,), tuple(found), segment)
        for (node, found), segment in zip(sites.items(), segments, strict=True)
    ]


def alternative(unit: Unit, activations: Activations, target: Target) -> dict[str, Resolution]:
    """Return what the target gives the products of a unit with other activations, by node name.

    Products whose weights the target would rather leave in float are not in it.
    """
    found: dict[str, Resolution] = {}
    for site in unit.sites:
        planned = scheme_of(site.node)
        if planned is None:
            continue
        tied = len(site.weight.uses()) > 1
        asked = replace(planned, activations=activations, symmetric=None)
        if activations is Activations.FLOAT:
            asked = QScheme(8)
        request = request_for(site, asked, tied=tied, in_body=False)
        resolution = resolve(target, request)
        if resolution.scheme is not None and resolution.scheme.activations is activations:
            found[site.node.name or ""] = resolution
    return found


def _merged(
    regions: Sequence[list[ir.Node]], sites: Mapping[ir.Node, Sequence[Site]]
) -> list[list[ir.Node]]:
    """Join regions that read a quantized value or a weight in common; nodes stay in order."""
    group_of = list(range(len(regions)))
    reader: dict[ir.Value, int] = {}

    def root(index: int) -> int:
        while group_of[index] != index:
            index = group_of[index]
        return index

    for index, nodes in enumerate(regions):
        for node in nodes:
            shared = [*_read_quantized(node), *(site.weight for site in sites.get(node, ()))]
            for value in shared:
                first, second = root(reader.setdefault(value, index)), root(index)
                group_of[max(first, second)] = min(first, second)
    groups: dict[int, list[ir.Node]] = {}
    for index, nodes in enumerate(regions):
        groups.setdefault(root(index), []).extend(nodes)
    return list(groups.values())


def _read_quantized(node: ir.Node) -> Iterator[ir.Value]:
    for index in json.loads(node.metadata_props.get(QUANTIZED_INPUTS, "[]")):
        value = node.inputs[index]
        if value is not None:
            yield value


def _biases(nodes: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """Yield the Adds of a constant that alone read a product of these nodes."""
    for node in nodes:
        uses = list(node.outputs[0].uses())
        if not is_op(node, "MatMul") or len(uses) != 1 or node.outputs[0].is_graph_output():
            continue
        add, index = uses[0].node, uses[0].idx
        if add in nodes or not is_op(add, "Add"):
            continue
        if constant_of(add.inputs[1 - index]) is not None:
            yield add


def _computed(segment: Segment) -> Iterator[ir.Value]:
    for node in segment.nodes:
        yield from node.outputs
