"""Quantizes activations: QuantizeLinear and DequantizeLinear on every marked value."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.grid_error import grid_of
from qcompiler.ir.dataflow import is_op
from qcompiler.ir.editing import add_initializer, fresh_name, value_names
from qcompiler.ir.provenance import (
    CREATED_BY,
    PLACEMENT,
    QUANTIZED_INPUTS,
    QUANTIZER,
    RANGE,
    SHARES,
)
from qcompiler.ir.quantizable import FLOAT_TYPES
from qcompiler.ir.substitution import new_node
from qcompiler.quant.qtype import qtype_named
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "insert-activation-qdq"


@dataclass(frozen=True, slots=True)
class _Scale:
    """Scale and zero point of a value, as initializers, and the type of its codes."""

    scale: ir.Value
    zero_point: ir.Value


class InsertActivationQdq(Pass):
    """Put a QuantizeLinear and a DequantizeLinear on every value that has a range.

    Before: y = Conv(x, w)     # x: qcompiler.quantizer = "uint8:asym", qcompiler.range
    After:  y = Conv(DequantizeLinear(QuantizeLinear(x, s, z), s, z), w)
    Refuses: values without a range, because nothing was calibrated or no sample filled them.

    Where the value is computed by an op on integers, everybody reads the dequantized value;
    otherwise only the ops that work on integers do, and the others the float they read before.
    Values that carry the scale of another one share its initializers.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Make scales, then the pairs, in graph order."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        graph = model.graph
        taken = value_names(model) | {node.name for node in graph.all_nodes() if node.name}
        scales: dict[str, _Scale] = {}
        for value in list(_marked(graph)):
            name = value.name or ""
            if _has_pair(value):
                continue
            scale = self._scale(value, scales, graph, taken)
            if scale is None:
                skips.append(Skip(RULE, name, f"{name} has no range: it was not calibrated"))
                continue
            scales[name] = scale
            if self._insert(value, scale, graph, taken):
                rewrites.append(Rewrite(RULE, name, value.metadata_props[QUANTIZER]))
        return PassResult(tuple(rewrites), tuple(skips))

    def _scale(
        self, value: ir.Value, scales: dict[str, _Scale], graph: ir.Graph, taken: set[str]
    ) -> _Scale | None:
        shared = value.metadata_props.get(SHARES)
        if shared is not None:
            return scales.get(shared)
        text = value.metadata_props.get(RANGE)
        if text is None:
            return None
        type_name, _, symmetry = value.metadata_props[QUANTIZER].partition(":")
        qtype = qtype_named(type_name)
        low, high = json.loads(text)
        # DequantizeLinear returns the type of its scale.
        float_type = value.dtype if value.dtype in FLOAT_TYPES else ir.DataType.FLOAT
        grid = grid_of(
            low, high, qtype, symmetric=symmetry == "sym", scale_dtype=float_type.numpy()
        )
        stored = ir.DataType[qtype.onnx_name]
        parts = {
            "scale": ir.tensor(np.array(grid.scale, float_type.numpy()), dtype=float_type),
            "zero_point": ir.tensor(np.array(grid.zero_point, stored.numpy())),
        }
        made = []
        for part, tensor in parts.items():
            part_name = fresh_name(f"{value.name}.{part}", taken)
            tensor.name = part_name
            made.append(add_initializer(graph, part_name, tensor))
        return _Scale(*made)

    def _insert(self, value: ir.Value, scale: _Scale, graph: ir.Graph, taken: set[str]) -> bool:
        """Insert the pair and let the readers of codes read it; False if there are none."""
        producer = value.producer()
        from_codes = producer is not None and PLACEMENT in producer.metadata_props
        readers = [(use.node, use.idx) for use in value.uses() if from_codes or _reads_codes(*use)]
        is_output = from_codes and value.is_graph_output()
        if not readers and not is_output:
            return False
        operands = [scale.scale, scale.zero_point]
        dtype = scale.zero_point.dtype
        quantize = new_node(
            self.name,
            "QuantizeLinear",
            [value, *operands],
            fresh_name(f"{value.name}.quantized", taken),
            dtype=dtype,
        )
        dequantize = new_node(
            self.name,
            "DequantizeLinear",
            [quantize.outputs[0], *operands],
            fresh_name(f"{value.name}.dequantized", taken),
            dtype=value.dtype,
        )
        for node in (quantize, dequantize):
            node.outputs[0].shape = value.shape
        if producer is None:
            graph.insert_before(graph[0], [quantize, dequantize])
        else:
            graph.insert_after(producer, [quantize, dequantize])
        for node, index in readers:
            node.replace_input_with(index, dequantize.outputs[0])
        if is_output:
            _take_over_output(value, dequantize.outputs[0], taken)
        return True


def _marked(graph: ir.Graph) -> Iterator[ir.Value]:
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if QUANTIZER in value.metadata_props:
            yield value


def _has_pair(value: ir.Value) -> bool:
    """Whether this pass was here before."""
    return any(
        is_op(use.node, "QuantizeLinear") and use.node.metadata_props.get(CREATED_BY) == RULE
        for use in value.uses()
    )


def _reads_codes(node: ir.Node, index: int) -> bool:
    return index in json.loads(node.metadata_props.get(QUANTIZED_INPUTS, "[]"))


def _take_over_output(value: ir.Value, instead: ir.Value, taken: set[str]) -> None:
    """Make `instead` the graph output in the place of `value`, under the same name."""
    graph, name = value.graph, value.name or ""
    assert isinstance(graph, ir.Graph)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = instead
    value.name = fresh_name(f"{name}.float", taken)
    instead.name = name
