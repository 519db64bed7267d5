"""Writes the decoding of weights without an integer kernel so that it happens once."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.execution.ort_fusion import is_fused_by_runtime, reads_codes, weight_path
from qcompiler.ir.dataflow import all_nodes, constant_of, int_attribute, is_op, node_name
from qcompiler.ir.editing import constant_value
from qcompiler.ir.substitution import new_node, substitute
from qcompiler.ir.weights import read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "decode-at-load"
_DECODED_OPS = ("Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "MatMul", "Gemm", "Gather")


class DecodeAtLoad(Pass):
    """Turn a DequantizeLinear whose reader has no integer kernel into Cast, Sub and Mul.

    ONNX Runtime never folds a DequantizeLinear: before a Conv it runs each time and keeps the
    weights from being prepacked, measured at 1.2 to 1.6 times the float Conv. Cast and Mul of
    constants are folded when the session starts, and the op then runs at float speed from a
    file of a quarter of the size.

    Before: y = Conv(x, DequantizeLinear(codes int8, scale [M]))
    After:  y = Conv(x, Cast(codes) * scale [M, 1, 1, 1])
    Refuses: blocked scales; bfloat16; weights that are also graph outputs.

    In float32 the weights are the same bits; in float16 ONNX Runtime may keep them in float32.
    """

    name: ClassVar[str] = "decode-at-load"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    tolerance: ClassVar[float | None] = 1e-6

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every DequantizeLinear of a constant that feeds no integer kernel."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in list(all_nodes(model)):
            if not is_op(node, "DequantizeLinear") or constant_of(node.inputs[0]) is None:
                continue
            readers = _readers(node.outputs[0])
            if not readers or not all(_needs_decoding(reader, model.graph) for reader in readers):
                continue
            reason = _refusal(node)
            if reason:
                skips.extend(Skip(RULE, node_name(reader), reason) for reader in readers)
                continue
            substitute(node, self._parts(node))
            rewrites.extend(Rewrite(RULE, node_name(reader)) for reader in readers)
        return PassResult(tuple(rewrites), tuple(skips))

    def _parts(self, node: ir.Node) -> list[ir.Node]:
        codes, scale = node.inputs[0], node.inputs[1]
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        assert codes is not None
        assert scale is not None
        name = node_name(node)
        shape = _broadcast_shape(node)
        dtype = scale.dtype or ir.DataType.FLOAT
        nodes = [self._cast(codes, dtype, f"{name}.codes")]
        if zero_point is not None:
            point = self._cast(_reshaped(zero_point, shape), dtype, f"{name}.points")
            centred = new_node(
                self.name,
                "Sub",
                [nodes[0].outputs[0], point.outputs[0]],
                f"{name}.centred",
                dtype=dtype,
            )
            nodes += [point, centred]
        nodes.append(
            new_node(
                self.name,
                "Mul",
                [nodes[-1].outputs[0], _reshaped(scale, shape)],
                name,
                dtype=dtype,
            )
        )
        return nodes

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        return new_node(
            self.name, "Cast", [value], name, attributes={"to": int(dtype)}, dtype=dtype
        )


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return the ops that read a value, behind Transposes, in graph order."""
    found: dict[ir.Node, None] = {}
    for use in value.uses():
        if is_op(use.node, "Transpose"):
            found.update(dict.fromkeys(_readers(use.node.outputs[0])))
        else:
            found[use.node] = None
    return list(found)


def _needs_decoding(node: ir.Node, main: ir.Graph) -> bool:
    if reads_codes(node):
        return False
    if node.op_type == "FusedMatMul":
        return True
    if not is_op(node, *_DECODED_OPS):
        return False
    path = weight_path(node)
    return path is None or not is_fused_by_runtime(node, path, main)


def _broadcast_shape(node: ir.Node) -> tuple[int, ...]:
    """Return the shape in which the scale multiplies the codes."""
    codes, scale = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    assert codes is not None
    assert scale is not None
    if len(scale.shape) == 0:
        return ()
    axis = int_attribute(node, "axis", 1) % len(codes.shape)
    return tuple(size if index == axis else 1 for index, size in enumerate(codes.shape.numpy()))


def _reshaped(value: ir.Value, shape: Sequence[int]) -> ir.Value:
    """Return a scale or zero point as an initializer of a shape that broadcasts, made once."""
    graph, tensor = value.graph, constant_of(value)
    assert isinstance(graph, ir.Graph)
    assert tensor is not None
    if tensor.shape.numpy() == tuple(shape):
        return value
    name = f"{value.name}.x{'x'.join(str(dim) for dim in shape)}"
    found = graph.initializers.get(name)
    if found is None:
        values = np.ascontiguousarray(read_all(tensor)).reshape(tuple(shape))
        found = constant_value(name, ir.tensor(values, dtype=tensor.dtype, name=name))
        graph.register_initializer(found)
    return found


def _refusal(node: ir.Node) -> str:
    """Return why a DequantizeLinear stays, "" if it can be rewritten."""
    if int_attribute(node, "block_size", 0):
        return "blocks of weights are dequantized at each run: no operator folds them at load"
    if node.outputs[0].dtype == ir.DataType.BFLOAT16:
        return "ONNX Runtime has no bfloat16 kernel on CPU"
    if node.outputs[0].is_graph_output():
        return "the dequantized weight is an output of the model"
    return ""
