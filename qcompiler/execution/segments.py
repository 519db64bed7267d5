"""Cutting a graph into stretches that can be loaded one at a time.

What a runtime fuses lies close together, so a stretch of consecutive nodes shows the same kernels
as the whole model, in a fraction of its memory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

import onnx_ir as ir

from qcompiler.ir.dataflow import bodies_of, constant_of, inputs_with_captures
from qcompiler.ir.weights import read_all

_INTEGER_OPS: Final = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
    }
)
"""Their results are fused with whoever reads them, so no cut may go between."""
_RESCALING_OPS: Final = frozenset({"Cast", "Mul"})
"""Between an integer product and its float result."""
_STRUCTURAL_TYPES: Final = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
_STRUCTURAL_BYTES: Final = 1024
"""Small integers are shapes and axes, which decide what is fused; other values do not."""

_BLOCKED_LAYOUT: Final = "com.microsoft.nchwc"
_REPLACED: Final = re.compile(r"(_token_\d+)+$")
_PRECISION_CAST: Final = "InsertedPrecisionFreeCast_"


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive nodes of a graph, with what they need to run.

    Attributes:
        nodes: The nodes in graph order; those computed from constants alone come with every
            segment that reads them.
        inputs: Values made before the segment, or inputs of the graph, in order of first use.
        outputs: Values read after it, or outputs of the graph.
        initializers: The constants it reads.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    initializers: tuple[ir.Value, ...]

    def as_model(self, whole: ir.Model) -> ir.Model:
        """Return the segment as a model that refers to the weights of the whole one."""
        view = ir.GraphView(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=whole.opset_imports,
            name="segment",
        )
        # A model takes any graph it can serialize; a view copies nothing.
        return ir.Model(cast(ir.Graph, view), ir_version=whole.ir_version)

    def signature(self) -> tuple[object, ...] | None:
        """Return what equal segments have in common: everything but names and weight values.

        None for a segment with If/Loop/Scan bodies, which equals nothing.
        """
        numbers: dict[ir.Value, int] = {}
        for value in (*self.inputs, *self.initializers):
            numbers[value] = len(numbers)
        rows: list[object] = [_describe(value) for value in numbers]
        for node in self.nodes:
            if any(True for _ in bodies_of(node)):
                return None
            read = tuple(-1 if value is None else numbers[value] for value in node.inputs)
            for value in node.outputs:
                numbers[value] = len(numbers)
            made = tuple(_describe(value) for value in node.outputs)
            attributes = tuple(sorted(str(attribute) for attribute in node.attributes.values()))
            rows.append((node.domain, node.op_type, read, made, attributes))
        rows.append(tuple(numbers[value] for value in self.outputs))
        return tuple(rows)


def cut(graph: ir.Graph, memory_limit: int) -> Iterator[Segment]:
    """Cut a graph into segments whose weights take at most `memory_limit` bytes, where it can be.

    A cut goes where every value that crosses it has a known type and is a plain float result. A
    stretch without such a place is one segment, however large.
    """
    constant = _constant_nodes(graph)
    nodes = [node for node in graph if node not in constant]
    legal = _legal_cuts(nodes, constant)
    readers = _readers(nodes)
    start = 0
    while start < len(nodes):
        stop = _stop(nodes, constant, legal, start, memory_limit)
        yield _segment(graph, nodes[start:stop], constant, readers)
        start = stop


def segments_of(graph: ir.Graph, groups: Sequence[Sequence[ir.Node]]) -> list[Segment]:
    """Return one segment for each group of nodes, which need not lie next to each other.

    What a group hands to other nodes and gets back from them is both output and input.
    """
    constant = _constant_nodes(graph)
    readers = _readers([node for node in graph if node not in constant])
    return [_segment(graph, group, constant, readers) for group in groups]


def _constant_nodes(graph: ir.Graph) -> frozenset[ir.Node]:
    """Return the nodes whose result does not depend on the model's inputs."""
    found: set[ir.Node] = set()
    for node in graph:
        read = inputs_with_captures(node)
        if read and all(
            constant_of(value) is not None or value.producer() in found for value in read
        ):
            found.add(node)
    return frozenset(found)


def _legal_cuts(nodes: Sequence[ir.Node], constant: frozenset[ir.Node]) -> list[bool]:
    """Return for each index whether a cut may go right before that node; the end always may."""
    made_at: dict[ir.Value, int] = {}
    last_read: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        for value in node.outputs:
            made_at[value] = index
        for value in _runtime_inputs(node, constant):
            last_read[value] = index
    blocked = [0] * (len(nodes) + 1)
    for value, first in made_at.items():
        last = last_read.get(value, first)
        if last > first and (value.type is None or _is_integer_result(value)):
            blocked[first + 1] += 1
            blocked[last + 1] -= 1
    legal, depth = [], 0
    for change in blocked:
        depth += change
        legal.append(depth == 0)
    legal[-1] = True
    return legal


def _is_integer_result(value: ir.Value) -> bool:
    """Whether a value is an integer form of a float one, or a step on its way back to float."""
    producer = value.producer()
    if producer is None:
        return False
    if producer.op_type in _INTEGER_OPS:
        return True
    return producer.op_type in _RESCALING_OPS and any(
        source is not None and _is_integer_result(source) for source in producer.inputs
    )


def _stop(
    nodes: Sequence[ir.Node],
    constant: frozenset[ir.Node],
    legal: Sequence[bool],
    start: int,
    memory_limit: int,
) -> int:
    """Return one past the last node of the segment that begins at `start`."""
    weights: dict[ir.Value, None] = {}
    total, last_legal = 0, start
    for index in range(start, len(nodes)):
        if index > start and legal[index]:
            last_legal = index
        for value in _constants_of(nodes[index], constant):
            if value not in weights:
                weights[value] = None
                tensor = constant_of(value)
                total += 0 if tensor is None else tensor.nbytes
        if total > memory_limit and last_legal > start:
            return last_legal
    return len(nodes)


def _segment(
    graph: ir.Graph,
    own: Sequence[ir.Node],
    constant: frozenset[ir.Node],
    readers: Mapping[ir.Value, Sequence[ir.Node]],
) -> Segment:
    inside = set(own) | _needed_constant_nodes(own, constant)
    ordered = tuple(node for node in graph if node in inside)
    made = {value for node in ordered for value in node.outputs}
    inputs: dict[ir.Value, None] = {}
    initializers: dict[ir.Value, None] = {}
    for node in ordered:
        for value in inputs_with_captures(node):
            if constant_of(value) is not None:
                initializers[value] = None
            elif value not in made:
                inputs[value] = None
    outputs = [
        value
        for node in own
        for value in node.outputs
        if value.is_graph_output() or any(reader not in inside for reader in readers.get(value, ()))
    ]
    if not outputs:
        outputs = [value for value in own[-1].outputs if value.name][:1]
    return Segment(ordered, tuple(inputs), tuple(outputs), tuple(initializers))


def _readers(nodes: Sequence[ir.Node]) -> dict[ir.Value, list[ir.Node]]:
    """Return which of the nodes read each value, themselves or in their bodies."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in nodes:
        for value in inputs_with_captures(node):
            found.setdefault(value, []).append(node)
    return found


def _needed_constant_nodes(own: Sequence[ir.Node], constant: frozenset[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    pending = list(own)
    while pending:
        for value in inputs_with_captures(pending.pop()):
            producer = value.producer()
            if producer is not None and producer in constant and producer not in found:
                found.add(producer)
                pending.append(producer)
    return found


def _constants_of(node: ir.Node, constant: frozenset[ir.Node]) -> Iterator[ir.Value]:
    """Yield the constants a node reads, also through nodes computed from constants."""
    for reader in (node, *_needed_constant_nodes([node], constant)):
        for value in inputs_with_captures(reader):
            if constant_of(value) is not None:
                yield value


def _runtime_inputs(node: ir.Node, constant: frozenset[ir.Node]) -> Iterator[ir.Value]:
    for value in inputs_with_captures(node):
        if constant_of(value) is None and value.producer() not in constant:
            yield value


def _describe(value: ir.Value) -> tuple[object, ...]:
    tensor = constant_of(value)
    if tensor is None:
        return (str(value.type), str(value.shape))
    if tensor.dtype in _STRUCTURAL_TYPES and tensor.nbytes <= _STRUCTURAL_BYTES:
        return (tensor.dtype.name, str(tensor.shape), read_all(tensor).tobytes())
    return (tensor.dtype.name, str(tensor.shape))


def producers_by_name(graphs: Sequence[ir.Graph]) -> Mapping[str, ir.Node]:
    """Return which node computes each named value of some optimized graphs.

    A node in ONNX Runtime's blocked layout computes a value of a new name, and is itself named
    after the value it stands for; one that its optimizer replaced or moved keeps the name of the
    node it stands for, with a number behind, and is found under that. One that computes a 16-bit
    float value in 32 bits gives it a prefix.
    """
    found: dict[str, ir.Node] = {}
    for node in (node for graph in graphs for node in graph):
        if node.domain == _BLOCKED_LAYOUT and node.name:
            found[node.name.removesuffix("_nchwc")] = node
        found.update({value.name: node for value in node.outputs if value.name})
    for node in (node for graph in graphs for node in graph):
        if node.name and _REPLACED.search(node.name):
            found.setdefault(_REPLACED.sub("", node.name), node)
    for name, node in list(found.items()):
        found.setdefault(name.removeprefix(_PRECISION_CAST), node)
    return found
