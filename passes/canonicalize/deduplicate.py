"""Stores equal constants once and computes equal values once."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.ir.dataflow import (
    ONNX_DOMAINS,
    RANDOM_OPS,
    all_graphs,
    bodies_of,
    is_op,
    node_name,
)
from qcompiler.ir.editing import record_origin, remove_node
from qcompiler.ir.weights import nbytes_of, read_all, read_slice
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

_SHARE_ACROSS_BODIES_BYTES: Final = 1024
"""Smaller constants of a body stay in it: shapes and axes must be local for some runtimes."""
_SAMPLE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 4 << 20
_PER_EDGE: Final = ("QuantizeLinear", "DequantizeLinear", "Constant")


class Deduplicate(Pass):
    """Let equal initializers share one value, and equal computations one node.

    Before: y = Add(MatMul(x, w1), MatMul(x, w2)), with w1 and w2 equal byte for byte
    After:  y = Add(m, m), m = MatMul(x, w1)
    Refuses: values that are graph outputs, whose names must stay. Left alone without a word:
        random ops, ops with bodies, ops of other domains, and QuantizeLinear and
        DequantizeLinear, which belong to the edge they stand on.
    """

    name: ClassVar = "deduplicate"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Share initializers first, so that computations on them become equal."""
        rewrites = list(_share_initializers(model))
        skips: list[Skip] = []
        for graph in all_graphs(model):
            rewrites.extend(_share_nodes(graph, skips))
        return PassResult(tuple(rewrites), tuple(skips))


def _share_initializers(model: ir.Model) -> Iterator[Rewrite]:
    enclosing = _enclosing_graphs(model.graph, ())
    for group in _equal_initializers(model):
        kept: list[ir.Value] = []
        for value in group:
            graph = value.graph
            assert graph is not None
            keeper = next((other for other in kept if _can_stand_in(other, value, enclosing)), None)
            if keeper is None:
                kept.append(value)
                continue
            value.replace_all_uses_with(keeper)
            assert value.name
            del graph.initializers[value.name]
            yield Rewrite("deduplicate", value.name, f"initializer equal to {keeper.name}")


def _enclosing_graphs(
    graph: ir.Graph, outer: tuple[ir.Graph, ...]
) -> dict[ir.Graph, tuple[ir.Graph, ...]]:
    """Map every graph to the graphs it lies in, itself included."""
    path = (*outer, graph)
    found = {graph: path}
    for node in graph:
        for body in bodies_of(node):
            found.update(_enclosing_graphs(body, path))
    return found


def _can_stand_in(
    keeper: ir.Value, value: ir.Value, enclosing: dict[ir.Graph, tuple[ir.Graph, ...]]
) -> bool:
    assert keeper.graph is not None
    assert value.graph is not None
    if keeper.graph is value.graph:
        return True
    return (
        keeper.graph in enclosing[value.graph]
        and _tensor(value).nbytes >= _SHARE_ACROSS_BODIES_BYTES
    )


def _equal_initializers(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Yield groups of two or more equal initializers, outer graphs first in each.

    Only tensors of equal type and shape are compared: by their first bytes, and only where those
    agree by their place in a file, or else a hash of all bytes, read in pieces.
    """
    alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            fixed = value.is_graph_input() or value.is_graph_output()
            if tensor is None or fixed or tensor.dtype == ir.DataType.STRING:
                continue
            alike[tensor.dtype, tuple(tensor.shape)].append(value)
    for group in alike.values():
        for candidates in _split(group, _first_bytes):
            yield from _split(candidates, partial(_digest, known={}))


def _split(group: list[ir.Value], key: Callable[[ir.Value], Hashable]) -> Iterator[list[ir.Value]]:
    """Yield the parts of two and more values for which `key` gives the same."""
    if len(group) < 2:
        return
    parts: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in group:
        parts[key(value)].append(value)
    yield from (part for part in parts.values() if len(part) > 1)


def _first_bytes(value: ir.Value) -> bytes:
    return next(_pieces(_tensor(value), _SAMPLE_BYTES), b"")


def _digest(value: ir.Value, known: dict[Hashable, str]) -> str:
    """Return a hash of all bytes; a place in a file is read once."""
    tensor = _tensor(value)
    place: Hashable = id(tensor)
    if isinstance(tensor, ir.ExternalTensor):
        place = (tensor.path, tensor.offset, tensor.length)
    if place not in known:
        digest = hashlib.sha256()
        for piece in _pieces(tensor, _CHUNK_BYTES):
            digest.update(piece)
        known[place] = digest.hexdigest()
    return known[place]


def _pieces(tensor: ir.TensorProtocol, nbytes: int) -> Iterator[bytes]:
    """Yield the bytes of a tensor, whole rows of the first axis of about `nbytes` at a time."""
    shape = tensor.shape.numpy()
    if not shape:
        yield read_all(tensor).tobytes()
        return
    step = max(1, nbytes // max(1, nbytes_of(shape[1:], tensor.dtype)))
    for start in range(0, shape[0], step):
        yield read_slice(tensor, 0, start, min(shape[0], start + step)).tobytes()


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    return tensor


def _share_nodes(graph: ir.Graph, skips: list[Skip]) -> Iterator[Rewrite]:
    """Merge equal nodes of one graph; a body keeps its own."""
    first: dict[Hashable, ir.Node] = {}
    for node in list(graph):
        key = _computation(node)
        if key is None:
            continue
        keeper = first.setdefault(key, node)
        if keeper is node:
            continue
        fixed = [value.name for value in node.outputs if value.is_graph_output()]
        if fixed:
            reason = (
                f"it computes the same as {node_name(keeper)}, and its result {fixed[0]} is a "
                "graph output"
            )
            skips.append(Skip("deduplicate", node_name(node), reason))
            continue
        for output, kept in zip(node.outputs, keeper.outputs, strict=True):
            output.replace_all_uses_with(kept)
        label = node_name(node)
        remove_node(node)
        record_origin(keeper, label)
        yield Rewrite("deduplicate", label, f"computes the same as {node_name(keeper)}")


def _computation(node: ir.Node) -> Hashable | None:
    """Return what decides a node's results, None for nodes that are not to be merged."""
    if node.domain not in ONNX_DOMAINS or is_op(node, *RANDOM_OPS, *_PER_EDGE):
        return None
    attributes = [_attribute_key(attribute) for attribute in node.attributes.values()]
    if None in attributes:
        return None
    return (
        node.op_type,
        tuple(None if value is None else id(value) for value in node.inputs),
        tuple(bool(value.name) for value in node.outputs),
        tuple(sorted(key for key in attributes if key is not None)),
    )


def _attribute_key(attribute: ir.Attr) -> tuple[str, str, str] | None:
    """Return an attribute as text (equal floats of unlike sign stay apart), None for tensors."""
    if attribute.type not in _PLAIN:
        return None
    value = attribute.value
    text = repr(tuple(value)) if attribute.type.name.endswith("S") else repr(value)
    return attribute.name, attribute.type.name, text


_PLAIN: Final = (
    *(ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT),
    *(ir.AttributeType.FLOATS, ir.AttributeType.STRING, ir.AttributeType.STRINGS),
)
