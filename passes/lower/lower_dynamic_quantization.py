"""Writes the integer product of w8a8-dynamic: activations quantized when the model runs."""

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qcompiler.execution.ort_fusion import WeightPath, weight_path
from qcompiler.ir.dataflow import all_nodes, node_name
from qcompiler.ir.editing import fresh_name, value_names
from qcompiler.ir.provenance import scheme_of
from qcompiler.ir.substitution import new_node, substitute
from qcompiler.quant.scheme import Activations
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "lower-dynamic-quantization"
_QUANTIZED_TYPES = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)


@dataclass(frozen=True, slots=True)
class _Quantized:
    """The DynamicQuantizeLinear made so far, by value and graph, and the names that are taken."""

    taken: set[str]
    nodes: dict[tuple[ir.Value, ir.Graph], ir.Node] = field(default_factory=dict)


class LowerDynamicQuantization(Pass):
    """Turn products with scheme w8a8-dynamic into integer arithmetic.

    ONNX Runtime fuses the result to DynamicQuantizeMatMul, or to MatMulIntegerToFloat where
    products share a data input. It does so only where the two scales are multiplied first.

    Before: y = MatMul(x, DequantizeLinear(codes int8 [K, N], scale [N]))
    After:  q, s, z = DynamicQuantizeLinear(x)
            y = Cast(MatMulInteger(q, codes, z)) * (s * scale)
    Refuses: weights other than 8-bit matrices with one scale per output channel; float types
        other than float32; a Gemm, which decompose-gemm splits first.

    One DynamicQuantizeLinear serves all products of a graph or body that read the same value.
    """

    name: ClassVar[str] = "lower-dynamic-quantization"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every product whose scheme has dynamic activations."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        names = value_names(model) | {node.name for node in all_nodes(model) if node.name}
        quantized = _Quantized(names)
        for node in list(all_nodes(model)):
            scheme = scheme_of(node)
            if scheme is None or scheme.activations is not Activations.DYNAMIC:
                continue
            path = weight_path(node)
            if path is None and node.op_type not in ("MatMul", "Gemm"):
                continue  # lowered already
            reason = _refusal(node, path)
            if reason or path is None:
                skips.append(Skip(RULE, node_name(node), reason))
                continue
            self._lower(node, path, quantized)
            rewrites.append(Rewrite(RULE, node_name(node), "integer product"))
        return PassResult(tuple(rewrites), tuple(skips))

    def _lower(self, node: ir.Node, path: WeightPath, quantized: _Quantized) -> None:
        data, graph, name = node.inputs[0], node.graph, node_name(node)
        assert data is not None
        assert isinstance(graph, ir.Graph)
        nodes: list[ir.Node] = []
        quantize = quantized.nodes.get((data, graph))
        if quantize is None:
            quantize = self._quantize(data, fresh_name(f"{data.name}.quantized", quantized.taken))
            quantized.nodes[data, graph] = quantize
            nodes.append(quantize)
        codes: ir.Value = path.matrix.codes
        if path.transposed:
            turn = new_node(
                self.name,
                "Transpose",
                [codes],
                f"{name}.codes",
                attributes={"perm": (1, 0)},
                dtype=codes.dtype,
            )
            nodes.append(turn)
            codes = turn.outputs[0]
        levels, scale, zero = quantize.outputs
        operands = [levels, codes, zero]
        if path.matrix.zero_point is not None:
            operands.append(path.matrix.zero_point)
        product = self._node("MatMulInteger", operands, f"{name}.integer", ir.DataType.INT32)
        cast = new_node(
            self.name,
            "Cast",
            [product.outputs[0]],
            f"{name}.float",
            attributes={"to": int(ir.DataType.FLOAT)},
            dtype=ir.DataType.FLOAT,
        )
        scales = self._node("Mul", [scale, path.matrix.scale], f"{name}.scales", scale.dtype)
        result = self._node("Mul", [cast.outputs[0], scales.outputs[0]], name, scale.dtype)
        substitute(node, [*nodes, product, cast, scales, result])

    def _quantize(self, data: ir.Value, name: str) -> ir.Node:
        node = new_node(self.name, "DynamicQuantizeLinear", [data], name, outputs=3)
        for output, dtype in zip(node.outputs, _QUANTIZED_TYPES, strict=True):
            output.type = ir.TensorType(dtype)
        return node

    def _node(
        self, op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType | None
    ) -> ir.Node:
        return new_node(self.name, op_type, inputs, name, dtype=dtype)


def _refusal(node: ir.Node, path: WeightPath | None) -> str:
    """Return why a product stays as it is, "" if it can be rewritten."""
    if path is None:
        return "its right input is not a matrix of constant codes"
    if node.op_type != "MatMul":
        return "it is a Gemm; decompose-gemm splits it"
    if path.matrix.bits != 8:
        return f"its weights have {path.matrix.bits} bits, and MatMulInteger takes 8"
    if path.matrix.block_size is not None or not path.along_reduction:
        return "its weights do not have one scale per output channel"
    dtype = path.matrix.dequantize.outputs[0].dtype
    if dtype is not None and dtype != ir.DataType.FLOAT:
        return f"DynamicQuantizeLinear takes float32, not {dtype.name}"
    return ""
