"""A Q/DQ graph to start from, with what is known of the float graph it was."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.errors import InternalError
from qcompiler.ir.blocks import Block, find_blocks, find_layers
from qcompiler.ir.dataflow import all_nodes, inputs_with_captures, is_op, node_label
from qcompiler.ir.provenance import scheme_of
from qcompiler.ir.quantizable import Site, find_sites, planned_spec
from qcompiler.quant.scheme import QSpec
from qcompiler.reconstruction.weight_rows import WeightRows
from qcompiler.rewriting.base import Pass, PassContext, Rewrite, Skip


@dataclass(frozen=True, slots=True, eq=False)
class CodedWeight:
    """A weight that is codes now, and the float weight it was.

    Attributes:
        sites: Where it is read, in graph order, as they were in the float graph: `tensor` of a
            site is the float weight. Its nodes are those of the Q/DQ graph.
        spec: How it is quantized.
        rows: How it lies as rows.
        codes: Initializer of the codes.
        scale: Initializer of the scales.
        zero_point: Initializer of the zero points; None where there are none.
        dequantized: Names of the values of the main graph that DequantizeLinear makes of it.
    """

    sites: tuple[Site, ...]
    spec: QSpec
    rows: WeightRows
    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    dequantized: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the float weight."""
        return self.sites[0].weight.name or ""

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The float weight."""
        return self.sites[0].tensor


@dataclass(frozen=True, slots=True, eq=False)
class StartingPoint:
    """A model whose planned weights have just become codes.

    Attributes:
        model: The Q/DQ graph.
        original: A clone of the graph before, which shares its tensors.
        blocks: Blocks of the graph before; their cut values have the same names in both.
        layers: The same blocks, joined where they repeat.
        weights: What was quantized, in graph order.
        levels: Of every node that reads such a weight: how many others of its block lie on the
            longest way to it.
        rewrites: What the passes in between did.
        skips: What they did not.
    """

    model: ir.Model
    original: ir.Model
    blocks: tuple[Block, ...]
    layers: tuple[Block, ...]
    weights: tuple[CodedWeight, ...]
    levels: dict[ir.Node, int]
    rewrites: tuple[Rewrite, ...]
    skips: tuple[Skip, ...]


def quantize_to_start(
    model: ir.Model, insert: Sequence[Pass], context: PassContext
) -> StartingPoint:
    """Run the passes that turn planned weights into codes, and keep what they forget.

    Args:
        model: A model at stage ASSIGNED; it is rewritten in place.
        insert: The passes, `insert-qdq` the last of them.
        context: For the passes.
    """
    original = model.clone()
    blocks = tuple(find_blocks(model))
    layers = tuple(find_layers(model))
    levels = _levels(model, blocks)
    rewrites: list[Rewrite] = []
    skips: list[Skip] = []
    planned: dict[tuple[ir.Node, str], Site] = {}
    for each in insert:
        # A pass before the last may give a node another weight: the last float one counts.
        planned |= {(site.node, site.role): site for site in _planned(model)}
        result = each.run(model, context)
        rewrites += result.rewrites
        skips += result.skips
    shared: dict[ir.Value, list[Site]] = {}
    for site in planned.values():
        shared.setdefault(site.weight, []).append(site)
    weights = tuple(_coded(sites, model) for sites in shared.values())
    return StartingPoint(
        model, original, blocks, layers, weights, levels, tuple(rewrites), tuple(skips)
    )


def edges(model: ir.Model) -> list[tuple[object, ...]]:
    """Return every node with what it reads and makes, and every initializer's type and shape.

    Two graphs with equal edges differ in the contents of initializers and in metadata only.
    """
    found: list[tuple[object, ...]] = []
    for node in all_nodes(model):
        read = tuple(None if value is None else value.name for value in node.inputs)
        made = tuple(value.name for value in node.outputs)
        found.append((node.domain, node.op_type, node.name, read, made))
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            shape = None if tensor is None else tuple(tensor.shape.numpy())
            found.append((name, None if tensor is None else tensor.dtype, shape))
    return found


def _planned(model: ir.Model) -> Iterator[Site]:
    yield from (site for site in find_sites(model)[0] if scheme_of(site.node) is not None)


def _coded(sites: Sequence[Site], model: ir.Model) -> CodedWeight:
    nodes = dict.fromkeys(_dequantizer(site) for site in sites)
    first = next(iter(nodes))
    codes, scale, *rest = first.inputs
    spec = planned_spec(sites[0])
    assert codes is not None
    assert scale is not None
    assert spec is not None
    return CodedWeight(
        tuple(sites),
        spec,
        WeightRows.of(sites[0], spec.granularity),
        codes,
        scale,
        rest[0] if rest else None,
        tuple(node.outputs[0].name or "" for node in nodes if node.graph is model.graph),
    )


def _dequantizer(site: Site) -> ir.Node:
    """Return the DequantizeLinear that a site's weight comes from now."""
    value = site.node.inputs[site.weight_input]
    producer = None if value is None else value.producer()
    while producer is not None and is_op(producer, "Transpose"):
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    if producer is None or not is_op(producer, "DequantizeLinear"):
        message = "its weight was planned to be quantized, and no pass did it"
        raise InternalError(message, where=node_label(site.node))
    return producer


def _levels(model: ir.Model, blocks: Sequence[Block]) -> dict[ir.Node, int]:
    """Return the level of every node of a block with a planned weight."""
    readers = {site.node for site in _planned(model)}
    levels: dict[ir.Node, int] = {}
    for block in blocks:
        depth: dict[ir.Value, int] = {}
        for node in block.nodes:
            level = max((depth.get(value, 0) for value in inputs_with_captures(node)), default=0)
            if node in readers:
                levels[node] = level
                level += 1
            depth.update(dict.fromkeys(node.outputs, level))
    return levels
