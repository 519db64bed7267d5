"""Splits a Gemm with a quantized weight into the parts that have kernels."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.execution.ort_fusion import is_plain_product, reads_codes, weight_path
from qcompiler.ir.dataflow import all_nodes, int_attribute, is_op, node_name
from qcompiler.ir.editing import constant_value
from qcompiler.ir.provenance import CREATED_BY, scheme_of
from qcompiler.ir.substitution import new_node, substitute
from qcompiler.quant.scheme import Activations
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage


class DecomposeGemm(Pass):
    """Turn a quantized Gemm that ONNX Runtime does not fuse into MatMul and its neighbours.

    Only a Gemm with alpha = beta = 1, no transposition and a bias of one element per output is
    fused with its DequantizeLinear; dynamic quantization knows MatMul alone.

    Before: y = Gemm(x, DequantizeLinear(codes), c, alpha, beta, transB=1)
    After:  y = alpha * MatMul(x, Transpose(DequantizeLinear(codes))) + beta * c
    Refuses: nothing; a Gemm that is fused as it is, or whose weight is float, is left alone. One
        on quantized activations becomes a QGemm, transposed or not, without alpha and beta and
        with a bias of int32 codes, if any.
    """

    name: ClassVar[str] = "decompose-gemm"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    tolerance: ClassVar[float | None] = 1e-5

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every Gemm whose right input is a coded matrix and that has no kernel."""
        rewrites: list[Rewrite] = []
        for node in list(all_nodes(model)):
            if not is_op(node, "Gemm") or weight_path(node) is None:
                continue
            if _is_fused(node):
                continue
            name = node_name(node)
            parts = self._parts(node, name)
            substitute(node, parts)
            _move_facts(parts)
            rewrites.append(Rewrite("decompose-gemm", name, "MatMul and Add"))
        return PassResult(tuple(rewrites))

    def _parts(self, node: ir.Node, name: str) -> list[ir.Node]:
        nodes: list[ir.Node] = []

        def add(op_type: str, *inputs: ir.Value | None, part: str) -> ir.Value:
            perm = {"perm": (1, 0)} if op_type == "Transpose" else None
            made = new_node(
                self.name,
                op_type,
                inputs,
                f"{name}.{part}",
                attributes=perm,
                dtype=node.outputs[0].dtype,
            )
            nodes.append(made)
            return made.outputs[0]

        left, right = node.inputs[0], node.inputs[1]
        if int_attribute(node, "transA", 0):
            left = add("Transpose", left, part="left")
        if int_attribute(node, "transB", 0):
            right = add("Transpose", right, part="right")
        result = add("MatMul", left, right, part="product")
        alpha = _factor(node, "alpha", name)
        if alpha is not None:
            result = add("Mul", result, alpha, part="scaled")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        beta = _factor(node, "beta", name) if bias is not None else None
        if bias is not None:
            bias = bias if beta is None else add("Mul", bias, beta, part="scaled_bias")
            add("Add", result, bias, part="sum")
        return nodes


def _move_facts(parts: Sequence[ir.Node]) -> None:
    """Give name and metadata of the Gemm to the MatMul: it is the site from now on."""
    last = parts[-1]
    product = next(part for part in parts if part.op_type == "MatMul")
    if product is last:
        return
    own = product.metadata_props[CREATED_BY]
    product.metadata_props.update(last.metadata_props)
    product.metadata_props[CREATED_BY] = own
    last.metadata_props.clear()
    last.metadata_props[CREATED_BY] = own
    product.name, last.name = last.name, product.name


def _is_fused(node: ir.Node) -> bool:
    """Whether ONNX Runtime finds an integer kernel for a Gemm as it is."""
    if not reads_codes(node):
        return is_plain_product(node) and not _is_dynamic(node)
    factors = [node.attributes.get(name) for name in ("alpha", "beta")]
    if any(factor is not None and factor.as_float() != 1.0 for factor in factors):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or is_op(bias.producer(), "DequantizeLinear")


def _is_dynamic(node: ir.Node) -> bool:
    scheme = scheme_of(node)
    return scheme is not None and scheme.activations is Activations.DYNAMIC


def _factor(node: ir.Node, attribute: str, name: str) -> ir.Value | None:
    """Return alpha or beta as an initializer of the node's graph, None where it is 1."""
    found = node.attributes.get(attribute)
    if found is None or found.as_float() == 1.0:
        return None
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    label = f"{name}.{attribute}"
    tensor = ir.tensor(np.array(found.as_float(), dtype.numpy()), dtype=dtype, name=label)
    value = constant_value(label, tensor)
    assert isinstance(node.graph, ir.Graph)
    node.graph.register_initializer(value)
    return value
